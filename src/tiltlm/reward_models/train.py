"""`train_reward_model`: from rows of judgements to a reward with its uncertainty."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.lm.adapters import LoRA
from tiltlm.lm.trunk import Adaptation, Answer, TopLayers, Trunk, load_trunk
from tiltlm.reward_models.data import Task, task_of
from tiltlm.reward_models.glm import Gaussian, best_noise
from tiltlm.reward_models.model import Head, RewardModel
from tiltlm.reward_models.posterior import LinearPosterior, SoftmaxPosterior, laplace
from tiltlm.reward_models.tune import Tuning, head_design, scaling_of, tune
from tiltlm.seeds import generator

Belief = LinearPosterior | SoftmaxPosterior
CHUNK = 256
"""Answers whose features are written together; a crash loses at most so many."""

Progress = Callable[[str, int], Callable[[int], None]]
"""`progress(what, count)` begins a bar and returns what moves it on."""


def train_reward_model(
    data: Sequence[Mapping[str, Any]] | Task | Mapping[str, Sequence[Mapping[str, Any]] | Task],
    model: str | Path | Trunk = "all-minilm-l6-v2",
    *,
    adaptation: Adaptation = None,
    members: int = 1,
    bootstrap: bool | None = None,
    within: bool = False,
    precision: float | None = None,
    tuning: Tuning | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> RewardModel:
    """Learn a reward from comparisons, scores or labels; its heads are Bayesian.

    Features come from the trunk, whose weights may be trained first, on all tasks together. Each head is then the MAP of a linear
    model on these features, with Laplace's approximation of its posterior. That takes the features as given: where the trunk was
    trained on the same few rows, it is too sure of itself, and an ensemble of adapters (`members`) says more.

    Args:
        data: rows for `task_of`, or several such by name: heads that share the trunk.
        model: a hub id, a folder, "smollm2-135m-instruct", "all-minilm-l6-v2", or a trunk.
        adaptation: `LoRA(...)` or `TopLayers(k)` to train the trunk; None learns heads only, on features that are cached once.
        members: 1 for one model with its Laplace posterior, more for an ensemble; each member of an adapted ensemble has a trunk
            with weights, seeds and batches of its own.
        bootstrap: whether each member sees rows drawn with replacement. By default if they would else be the same, that is
            without an adaptation.
        within: an ensemble's members also carry their Laplace posteriors.
        precision: of the weights' prior, for features of unit variance; None takes the one with the largest evidence.
        tuning: how an adaptation is trained.
        folder: where the model is saved, and what a resumed training needs is kept. Without it nothing is written.
        resume: go on with what is in the folder.
        seed: of adapters, batches and bootstraps.

    Raises:
        InputError: for rows, settings or a folder that cannot be used.
    """
    tasks = _tasks(data)
    bootstrap = _bootstrapped(members, adaptation, bootstrap)
    trunk = model if isinstance(model, Trunk) else load_trunk(model)
    tuning = tuning or Tuning()
    place = None if folder is None else _workplace(Path(folder), resume)
    plan = _Plan(
        tasks, tuning, precision, bootstrap, seed, place, resume, progress or (lambda what, count: lambda done: None)
    )
    trunks, parts = plan.parts(trunk, adaptation, members)
    heads = {
        name: Head(
            task.kind,
            cast("Any", tuple(p[name][0] for p in parts)),
            within,
            task.classes,
            max(p[name][1] for p in parts),
        )
        for name, task in tasks.items()
    }
    learned = RewardModel(trunks, heads, adaptation)
    if folder is not None:
        learned.save(folder)
    return learned


@dataclass(frozen=True)
class _Plan:
    """What is the same for all members."""

    tasks: Mapping[str, Task]
    tuning: Tuning
    precision: float | None
    bootstrap: bool
    seed: int
    place: Path | None
    resume: bool
    progress: Progress

    def parts(
        self, trunk: Trunk, adaptation: Adaptation, members: int
    ) -> tuple[tuple[Trunk, ...], list[dict[str, tuple[Belief, float]]]]:
        """The trunks, one a member if they are trained, and each member's heads with their noises."""
        base = self.features(trunk, "base")
        if adaptation is None:
            return (trunk,), [self.heads(base, m) for m in range(members)]
        trunks, parts = [], []
        for m in range(members):
            own = self.tuned(trunk.adapted(adaptation, self.seed + m), base, m, adaptation)
            trunks.append(own)
            parts.append(self.heads(self.features(own, f"member {m}"), m))
        return tuple(trunks), parts

    def rows(self, name: str, member: int) -> Task:
        """The rows that a member sees."""
        task = self.tasks[name]
        return task.bootstrapped(generator(self.seed, f"bootstrap {name}", member)) if self.bootstrap else task

    def features(self, trunk: Trunk, what: str) -> dict[str, Tensor]:
        """Features of every task's answers, from the folder as far as they are there."""
        bar = self.progress(f"features ({what})", sum(len(task.answers) for task in self.tasks.values()))
        store = None if self.place is None else self.place / "features"
        return {name: _features(trunk, task.answers, store, bar) for name, task in self.tasks.items()}

    def tuned(self, trunk: Trunk, base: Mapping[str, Tensor], member: int, adaptation: LoRA | TopLayers) -> Trunk:
        """A member's trunk, trained."""
        tasks = {name: _standardised(self.rows(name, member))[0] for name in self.tasks}
        starts = {name: self.head(task, base[name])[0] for name, task in tasks.items()}
        told = {
            "tuning": asdict(self.tuning),
            "adaptation": [type(adaptation).__name__, asdict(adaptation)],
            "data": {name: _digest(task) for name, task in tasks.items()},
            "seed": [self.seed, member],
            "precision": self.precision,
        }
        bar = self.progress(f"training (member {member})", self.tuning.steps)
        return tune(
            trunk,
            tasks,
            starts,
            self.tuning,
            seed=self.seed * 1000 + member,
            folder=None if self.place is None else self.place / f"member-{member}",
            key=hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16],
            resume=self.resume,
            progress=bar,
        )

    def heads(self, features: Mapping[str, Tensor], member: int) -> dict[str, tuple[Belief, float]]:
        """A member's heads and noises; a bootstrap's take the prior that all rows ask for, whose evidence counts no row twice."""
        found = {}
        for name, task in self.tasks.items():
            head, noise = self.head(task, features[name])
            if self.bootstrap:
                head, noise = self.head(self.rows(name, member), features[name], head.precision)
            found[name] = head, noise
        return found

    def head(self, task: Task, features: Tensor, precision: float | None = None) -> tuple[Belief, float]:
        """A task's posterior on features of its answers, and the noise of its scores."""
        precision = precision or self.precision
        scaling = scaling_of(task, features)
        first, second = head_design(task, features)
        if task.kind != "regression":
            return laplace(
                first, task.loss(), other=second, precision=precision, bias=task.biased, scaling=scaling
            ), 0.0
        task, centre, unit = _standardised(task)
        noise = best_noise(scaling(first), task.target, precision, bias=True)
        found = laplace(first, Gaussian(task.target, noise), precision=precision, bias=True, scaling=scaling)
        assert isinstance(found, LinearPosterior)
        weights = unit * found.weights
        weights[-1] += centre
        return replace(found, weights=weights, root=unit * found.root), noise * unit**2


def _standardised(task: Task) -> tuple[Task, float, float]:
    """A task whose scores have zero mean and unit variance, and what their mean and deviation were; others as they are."""
    if task.kind != "regression":
        return task, 0.0, 1.0
    centre, unit = float(task.target.mean()), float(task.target.std(correction=0)) or 1.0
    return replace(task, target=(task.target - centre) / unit), centre, unit


def _bootstrapped(members: int, adaptation: Adaptation, asked: bool | None) -> bool:
    """Whether members see rows drawn with replacement; without it, or trunks of their own, they would be the same."""
    if members < 1:
        raise InputError(f"members is {members}; train at least 1")
    needed = members > 1 and adaptation is None
    if needed and asked is False:
        raise InputError(
            "bootstrap is off and only heads are learned, so that all members would be the same; turn it on, or adapt"
        )
    return needed if asked is None else asked


def _tasks(data: Any) -> dict[str, Task]:
    if isinstance(data, Task):
        return {data.kind: data}
    if isinstance(data, Mapping):
        if not data:
            raise InputError("there are no tasks: the mapping is empty; give at least one")
        return {name: rows if isinstance(rows, Task) else task_of(rows) for name, rows in data.items()}
    task = task_of(data)
    return {task.kind: task}


def _workplace(folder: Path, resume: bool) -> Path:
    """Where features and checkpoints are kept; old checkpoints are another training's, unless it is resumed."""
    place = folder / "work"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not resume:
            for old in place.glob("member-*/step-*"):
                for file in old.iterdir():
                    file.unlink()
                old.rmdir()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}); choose another folder") from error
    return place


def _features(trunk: Trunk, answers: Sequence[Answer], store: Path | None, bar: Callable[[int], None]) -> Tensor:
    """Features of answers, chunk by chunk; a chunk that is in the store already is read from there."""
    if store is None:
        return trunk.features(answers, progress=bar)
    identity = _trunk_key(trunk)
    return torch.cat(
        [_chunk(trunk, answers[start : start + CHUNK], store, identity, bar) for start in range(0, len(answers), CHUNK)]
    )


def _chunk(trunk: Trunk, answers: Sequence[Answer], store: Path, identity: str, bar: Callable[[int], None]) -> Tensor:
    key = hashlib.sha256(f"{identity} {trunk.texts(answers)!r}".encode()).hexdigest()[:24]
    file = store / f"{key}.safetensors"
    try:
        found = load_file(file)["features"]
        bar(len(answers))
    except (OSError, SafetensorError, KeyError):
        found = trunk.features(answers, progress=bar)
        try:
            store.mkdir(parents=True, exist_ok=True)
            partial = store / f".{key}.{os.getpid()}.tmp"
            save_file({"features": found}, partial)
            os.replace(partial, file)  # a reader never sees half a file
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{store} cannot be written ({reason}); make room or choose another folder") from error
    return found


def _trunk_key(trunk: Trunk) -> str:
    digest = hashlib.sha256(json.dumps(trunk.settings(), sort_keys=True).encode())
    for name, value in (trunk.weights or {}).items():
        digest.update(name.encode())
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest(task: Task) -> str:
    values = (
        task.kind,
        task.answers,
        task.rows.tolist(),
        task.target.tolist(),
        task.margin.tolist(),
        task.smoothing,
        task.classes,
    )
    return hashlib.sha256(repr(values).encode()).hexdigest()
