"""`RewardModel`: a trunk, heads, and what is believed of their weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.lm.adapters import LoRA
from tiltlm.lm.trunk import Adaptation, Answer, TopLayers, Trunk, load_trunk
from tiltlm.reward_models.data import Kind, answers_of
from tiltlm.reward_models.posterior import Ensemble, LinearPosterior, RewardPosterior, SoftmaxPosterior, Standardiser
from tiltlm.seeds import generator

FORMAT = 2
MODEL_FILE = "reward_model.json"
"""What tells of everything else in a reward model's folder, and so is written last."""


@dataclass(frozen=True)
class Head:
    """What is believed of one task's reward.

    Attributes:
        kind: of the rows it was learned from. A preference head's reward has no zero, a regression head's is the score, a
            classification head's the log-odds of a class.
        parts: one a member; a single one with its Laplace posterior, or an ensemble.
        within: an ensemble's members also draw from their own posteriors.
        classes: names of the classes.
        noise: variance of scores around their mean, in squared score units.
    """

    kind: Kind
    parts: tuple[LinearPosterior, ...] | tuple[SoftmaxPosterior, ...]
    within: bool = False
    classes: tuple[str, ...] = ()
    noise: float = 0.0

    def posterior(self, label: str | None = None) -> LinearPosterior | Ensemble:
        """The belief about the reward.

        Args:
            label: the class whose log-odds are the reward; the last by default. With three or more classes it is the class's
                logit against the mean of the others'.
        """
        parts = [self._scalar(part, label) for part in self.parts]
        return parts[0] if len(parts) == 1 else Ensemble(tuple(parts), self.within)

    def _scalar(self, part: LinearPosterior | SoftmaxPosterior, label: str | None) -> LinearPosterior:
        if label is not None and label not in self.classes:
            raise InputError(f"label is {label!r}; the head knows {', '.join(self.classes) or 'no classes'}")
        place = len(self.classes) - 1 if label is None else self.classes.index(label)
        if isinstance(part, SoftmaxPosterior):
            return part.reward(place)
        if len(self.classes) == 2 and place == 0:
            return LinearPosterior(-part.weights, part.root, part.scaling, part.precision)
        return part


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A learned reward r(x, c) and its uncertainty; `train_reward_model` makes one.

    Attributes:
        trunks: the model below the heads; one, or one a member of an ensemble of adapters.
        heads: by task.
        adaptation: what of the trunks was trained.
    """

    trunks: tuple[Trunk, ...]
    heads: Mapping[str, Head]
    adaptation: Adaptation = None
    __name__ = "reward_model"

    def head(self, task: str | None = None) -> Head:
        """A task's head; the first by default."""
        name = next(iter(self.heads)) if task is None else task
        if name not in self.heads:
            raise InputError(f"task is {name!r}; this model has {', '.join(self.heads)}")
        return self.heads[name]

    def features(
        self, prompts: Sequence[Any], completions: Sequence[Any], progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Features [B, D] of each answer, or [M, B, D] where every member has a trunk of its own."""
        return self.features_of(answers_of(prompts, completions), progress)

    def features_of(self, answers: Sequence[Answer], progress: Callable[[int], None] | None = None) -> Tensor:
        """`features` of answers that are read already."""
        found = [trunk.features(answers, progress=progress) for trunk in self.trunks]
        return found[0] if len(found) == 1 else torch.stack(found)

    def posterior(self, task: str | None = None, label: str | None = None) -> RewardPosterior:
        """The belief about a task's reward as a function of `features`."""
        return self.head(task).posterior(label)

    def mean(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Float[Tensor, " B"]:
        """E r of each completion, by the first task's head."""
        return self.posterior().mean(self.features(prompts, completions))

    def covariance(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Float[Tensor, "B B"]:
        """Covariance of the completions' rewards."""
        return self.posterior().covariance(self.features(prompts, completions))

    def members(
        self, prompts: Sequence[Any], completions: Sequence[Any], k: int, rng: Generator
    ) -> Float[Tensor, "K B"]:
        """k draws of the reward, each judging all completions; centre them per prompt before comparing across draws."""
        return self.posterior().members(self.features(prompts, completions), k, rng)

    def preference(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> Float[Tensor, " B"]:
        """P(first is preferred to second) for each prompt."""
        return self.posterior().preference(self.features(prompts, first), self.features(prompts, second))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """The mean reward, as a reward function: `tl.Reward(model, beta=...)`."""
        return self.mean(prompts, completions).tolist()

    def reward(self, task: str | None = None, label: str | None = None) -> Callable[..., list[float]]:
        """The mean reward of another task, or the log-odds of another class, as a reward function."""
        posterior = self.posterior(task, label)

        def learned_reward(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
            return posterior.mean(self.features(prompts, completions)).tolist()

        return learned_reward

    def functions(
        self, k: int = 8, *, seed: int = 0, task: str | None = None, label: str | None = None
    ) -> tuple[Callable[..., list[float]], ...]:
        """k draws of the reward as reward functions, the same ones whenever they are called: for `tl.Members`."""
        drawn = _Drawn(self, self.posterior(task, label), k, seed)
        return tuple(_Member(drawn, m) for m in range(k))

    def save(self, folder: str | Path) -> Path:
        """Write everything but the base model, which is loaded by its name.

        Members' LoRAs are PEFT adapters, in `adapter-0`, `adapter-1`, …; heads with their posteriors, and layers that were trained
        (for which PEFT has no format), are in `reward_model.safetensors`.

        Raises:
            InputError: if the folder cannot be written.
        """
        folder = Path(folder)
        lora = isinstance(self.adaptation, LoRA)
        layers = [] if lora else [(i, *item) for i, t in enumerate(self.trunks) for item in (t.weights or {}).items()]
        tensors = {f"trunk.{i}.{name}": value for i, name, value in layers}
        for name, head in self.heads.items():
            for i, part in enumerate(head.parts):
                tensors |= {f"head.{name}.{i}.{key}": value for key, value in _tensors(part).items()}
        plain = {
            name: {
                "kind": head.kind,
                "within": head.within,
                "classes": head.classes,
                "noise": head.noise,
                "precision": [part.precision for part in head.parts],
            }
            for name, head in self.heads.items()
        }
        values = {
            "format": FORMAT,
            "trunk": self.trunks[0].settings(),
            "trunks": len(self.trunks),
            "adaptation": _written(self.adaptation),
            "heads": plain,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MODEL_FILE).unlink(missing_ok=True)
            for i, trunk in enumerate(self.trunks if lora else ()):
                trunk.save_adapter(_adapter(folder, i))
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
                folder / "reward_model.safetensors",
            )
            partial = folder / "reward_model.json.tmp"
            partial.write_text(json.dumps(values, indent=1))
            os.replace(partial, folder / MODEL_FILE)  # last, so that its presence means that all is there
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{folder} cannot be written ({reason}); make room or choose another folder") from error
        return folder

    @classmethod
    def load(cls, folder: str | Path, trunk: Trunk | None = None, *, device: str = "auto") -> RewardModel:
        """A model that was saved.

        Args:
            trunk: the base, if it is in memory already or has no name to load it by.

        Raises:
            InputError: if there is none in the folder, it is damaged, or the base is another one.
        """
        saved = _Saved.read(Path(folder))
        base = trunk or load_trunk(**saved.base, device=device)
        trunks = [base]
        if saved.adaptation is not None:
            trunks = [base.with_weights(saved.adaptation, some) for some in saved.weights]
        if base.fingerprint() != saved.fingerprint:
            raise InputError(
                f"the reward model in {folder} was trained on another {saved.base['model']!r}: the base's weights differ; load it "
                f"with the base that it was trained on"
            )
        return cls(tuple(trunks), saved.heads, saved.adaptation)


@dataclass(frozen=True)
class _Saved:
    """What a folder holds, read and found whole, before the base is loaded.

    Attributes:
        base: arguments of `load_trunk`; `fingerprint` is of its weights.
        weights: of each trunk, in place of the base's.
    """

    base: Mapping[str, Any]
    fingerprint: str
    adaptation: Adaptation
    weights: Sequence[Mapping[str, Tensor]]
    heads: Mapping[str, Head]

    @classmethod
    def read(cls, folder: Path) -> _Saved:
        missing = next((file.name for file in files_of(folder) if not file.is_file()), None)
        if missing is not None:
            raise InputError(f"{folder} holds no reward model (no {missing}); give a folder that does")
        try:
            values = json.loads((folder / MODEL_FILE).read_text())
            tensors = load_file(folder / "reward_model.safetensors")
            if values["format"] == FORMAT:
                return cls._of(folder, values, tensors)
        except InputError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} cannot be read ({error}); train the reward model anew") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder} is damaged ({error} is missing or wrong); train the reward model anew"
            ) from error
        raise InputError(f"{folder} has format {values['format']}, and this version reads {FORMAT}; train it anew")

    @classmethod
    def _of(cls, folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> _Saved:
        trunk, adaptation = values["trunk"], _read(values["adaptation"])
        return cls(
            {name: trunk[name] for name in ("model", "pooling", "max_tokens", "dtype")},
            trunk["fingerprint"],
            adaptation,
            [] if adaptation is None else _weights(folder, adaptation, tensors, values),
            {name: _head(name, plain, tensors) for name, plain in values["heads"].items()},
        )


@dataclass(eq=False)
class _Drawn:
    """Draws of a reward, and what they said of the last batch: the members are asked one after the other."""

    model: RewardModel
    posterior: RewardPosterior
    k: int
    seed: int
    last: tuple[Any, Tensor] = field(default=((), torch.zeros(0)))

    def rewards(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Float[Tensor, "K B"]:
        answers = answers_of(prompts, completions)
        if self.last[0] != answers:
            features = self.model.features_of(answers)
            self.last = answers, self.posterior.members(features, self.k, generator(self.seed, "reward members"))
        return self.last[1]


@dataclass(frozen=True, eq=False)
class _Member:
    drawn: _Drawn
    number: int

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        return self.drawn.rewards(prompts, completions)[self.number].tolist()


def files_of(folder: Path) -> list[Path]:
    """Everything that makes a saved reward model what it is, but its base."""
    adapters = sorted(folder.glob("adapter-*/adapter_model.safetensors"))
    return [folder / MODEL_FILE, folder / "reward_model.safetensors", *adapters]


def _adapter(folder: Path, member: int) -> Path:
    return folder / f"adapter-{member}"


def _weights(
    folder: Path, adaptation: Adaptation, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> list[dict[str, Tensor]]:
    """Each trunk's weights."""
    members = range(values["trunks"])
    if not isinstance(adaptation, LoRA):
        return [_under(tensors, f"trunk.{i}.") for i in members]
    try:
        return [Trunk.read_adapter(_adapter(folder, i)) for i in members]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} lacks an adapter ({error}); train the reward model anew") from error


def _tensors(part: LinearPosterior | SoftmaxPosterior) -> dict[str, Tensor]:
    scaling = part.scaling
    return {"weights": part.weights, "root": part.root, "centre": scaling.centre, "scale": scaling.scale}


def _head(name: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Head:
    parts = []
    for i, precision in enumerate(plain["precision"]):
        some = _under(tensors, f"head.{name}.{i}.")
        weights = some["weights"]
        scaling = Standardiser(some["centre"], some["scale"], weights.shape[-1] > len(some["centre"]))
        kind = LinearPosterior if weights.ndim == 1 else SoftmaxPosterior
        parts.append(kind(weights, some["root"], scaling, precision))
    return Head(plain["kind"], tuple(parts), plain["within"], tuple(plain["classes"]), plain["noise"])


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _written(adaptation: Adaptation) -> dict[str, Any] | None:
    return None if adaptation is None else {"kind": type(adaptation).__name__, **asdict(adaptation)}


def _read(values: Mapping[str, Any] | None) -> Adaptation:
    if values is None:
        return None
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "kind"}
    return LoRA(**settings) if values["kind"] == "LoRA" else TopLayers(**settings)
