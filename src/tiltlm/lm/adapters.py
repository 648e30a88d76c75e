"""LoRA adapters on one copy of the base weights: which is active, and which receives gradients.

A prior is the base with adapters off, or with a frozen adapter on; a policy is the same base with its own
adapter on. All of them share the base's weights, so whoever runs the model does so with its adapter `on`.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import EncoderDecoderModel, PreTrainedModel, VisionEncoderDecoderModel

from tiltlm.errors import InputError

PEFT_PREFIX = "base_model.model."
"""What PEFT's files put before the names of the model's weights."""
KEPT_AS = "_tiltlm_adapters"
"""Where a model keeps its switch, which lives as long as the model does."""
INITS = (True, False, "gaussian", "orthogonal", "eva")
"""What PEFT calls the ways to begin an adapter that leave the base as it is; others put a part of its weights into the adapter."""


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter (Hu et al. 2022).

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r; None takes 2 r.
        targets: module names, or "all-linear" for every linear layer but the output.
    """

    r: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all-linear"

    def config(self, model: PreTrainedModel, base: str) -> LoraConfig:
        """PEFT's configuration for a model that is called `base`."""
        return LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r if self.alpha is None else self.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            lora_dropout=0.0,  # the policy that is scored must be the policy that drew
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's layers
            task_type=_task_of(model),
            base_model_name_or_path=base,
        )


def _task_of(model: PreTrainedModel) -> str | None:
    """PEFT's name for what the model does; none for composed models, whose inputs PEFT's task classes do not know."""
    if isinstance(model, EncoderDecoderModel | VisionEncoderDecoderModel):
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


@contextmanager
def _both_kinds_of_layers() -> Iterator[None]:
    """A model may have linear layers of both layouts (ViT's and GPT-2's); peft sees to each, and need not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        yield


def require_low_rank(config: PeftConfig, which: str) -> None:
    """Only adapters beside which the base stays what it is, and whose every weight is the adapter's own.

    Raises:
        InputError: for another one, naming what it is.
    """
    kind, begun = config.peft_type, getattr(config, "init_lora_weights", True)
    more = [
        name
        for name in ("modules_to_save", "trainable_token_indices", "layer_replication")
        if getattr(config, name, None)
    ]
    if kind != PeftType.LORA:
        reason = f"is of type {getattr(kind, 'value', kind)}"
    elif getattr(config, "bias", "none") != "none":
        reason = f"trains the base's biases too (bias {config.bias!r})"  # pyright: ignore[reportAttributeAccessIssue]
    elif more:
        reason = f"is more than low-rank updates ({', '.join(more)})"
    elif begun not in INITS:
        reason = f"has taken a part of the base's weights into itself (init_lora_weights {begun!r})"
    else:
        return
    raise InputError(
        f"{which} {reason}; only plain LoRA leaves the base as it is: merge it into its base with peft's merge_and_unload and load "
        f"the result"
    )


def _config_in(folder: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"adapter_config.json in {folder} cannot be read ({str(error)[:160]}); copy or train the adapter anew"
        ) from error


def _linear(model: nn.Module) -> list[str]:
    """The last parts of the names of linear layers, each once."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in found})


def _layers(model: nn.Module) -> list[Any]:
    """The layers that PEFT has put in."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class AdapterSwitch:
    """The adapters that live on one base model.

    Args:
        model: the base.
        peft: what holds its adapters, if it has some already.

    Raises:
        InputError: if somebody else has put adapters into the model: nobody would know which one is on.
    """

    def __init__(self, model: PreTrainedModel, peft: PeftModel | None = None) -> None:
        self.model, self.peft = model, peft
        self._layers = _layers(model)
        self._trained: dict[str, list[nn.Parameter]] = {}
        self._turn = threading.RLock()
        if self._layers and peft is None:
            raise InputError(
                f"the {type(model).__name__} in memory holds adapters already, of add_adapter, or it is an adapter of the hub; "
                f"give its PeftModel, the adapter's folder, or the model without them"
            )
        setattr(model, KEPT_AS, self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, which cannot be copied; a copy has a model of its own, and so a lock of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.RLock())

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> AdapterSwitch:
        """The switch of a model, which has but one, however often it is loaded; of a `PeftModel`, with its adapters.

        Raises:
            InputError: if one of these is none that can be switched off, or is merged into the base.
        """
        base: Any = model if isinstance(model, PreTrainedModel) else model.get_base_model()
        known = getattr(base, KEPT_AS, None)
        known = known if known is not None and known.model is base else None
        if isinstance(model, PreTrainedModel):
            return cls(model) if known is None else known
        for name, config in model.peft_config.items():
            require_low_rank(config, f"the model's adapter {name!r}")
        switch = known or cls(base, model)
        if switch.peft not in (None, model):
            raise InputError("the model is inside another PeftModel as well; load that one, with all its adapters")
        switch.peft = model
        switch._settle()
        if any(layer.merged for layer in switch._layers):
            raise InputError("the model's adapter is merged into its base; call its unmerge_adapter() before loading")
        return switch

    @property
    def names(self) -> tuple[str, ...]:
        return () if self.peft is None else tuple(self.peft.peft_config)

    def new(self, lora: LoRA, base: str, seed: int) -> str:
        """Add a fresh adapter, which leaves the model as it is until it is trained."""
        name = self._free_name()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self._add(name, lora.config(self.model, base))
            except ValueError as error:
                if lora.targets == LoRA.targets:
                    raise
                raise InputError(
                    f"targets of the LoRA are {lora.targets!r}, which the {type(self.model).__name__} has not as layers that can be "
                    f"adapted ({str(error)[:160]}); its linear layers are {', '.join(_linear(self.model)) or 'none'}"
                ) from error
        return name

    def load(self, folder: str | Path) -> str:
        """Add a saved adapter."""
        path = Path(folder)
        if not (path / "adapter_config.json").is_file():
            raise InputError(f"{folder} holds no PEFT adapter (no adapter_config.json); give a folder that does")
        if not any((path / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
            raise InputError(f"the adapter in {folder} has no weights (no adapter_model.safetensors); give a whole one")
        name = self._free_name()
        require_low_rank(_config_in(path), f"the adapter in {folder}")
        try:
            with _both_kinds_of_layers():
                if self.peft is None:
                    self.peft = PeftModel.from_pretrained(
                        self.model, path, adapter_name=name, autocast_adapter_dtype=False
                    )
                else:
                    self.peft.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
        except (SafetensorError, EOFError, UnpicklingError) as error:
            raise InputError(
                f"the weights of the adapter in {folder} are damaged ({error}); copy or train it anew"
            ) from error
        except (ValueError, RuntimeError, KeyError) as error:
            raise InputError(
                f"the adapter in {folder} does not fit this model ({str(error).splitlines()[0][:160]}); load it on "
                f"the base model that its adapter_config.json names"
            ) from error
        self._finish(name)
        return name

    def copy(self, name: str) -> str:
        """Add an adapter with the same weights as `name`."""
        assert self.peft is not None
        fresh = self._free_name()
        config: Any = copy.deepcopy(self.peft.peft_config[name])
        config.init_lora_weights = True  # whatever it began with, its weights follow
        self._add(fresh, config)
        with torch.no_grad():
            source = self.parameters(name)
            for key, value in self.parameters(fresh).items():
                value.copy_(source[key])
        return fresh

    def remove(self, name: str) -> None:
        """Forget an adapter and free its memory."""
        assert self.peft is not None
        self._trained.pop(name, None)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Adapter .* was active", category=UserWarning
            )  # activate() sees to that
            self.peft.delete_adapter(name)
        self._settle()

    @contextmanager
    def on(self, name: str | None) -> Iterator[None]:
        """Run the model with this adapter on; None switches all off.

        Which one is on is the model's state, so a pass in another thread, of a reward that reads this model, waits for its turn.
        """
        with self._turn:
            self.activate(name)
            yield

    def activate(self, name: str | None) -> None:
        """Leave the model with this adapter on.

        Said to the layers themselves: PEFT's own methods also freeze what they switch off, and a backward pass that is under way in
        another thread would lose its gradients.
        """
        wanted = name is None, [name]
        for layer in self._layers:
            layer._disable_adapters = wanted[0]
            if name is not None:
                layer._active_adapter = wanted[1]

    def train(self, name: str) -> None:
        """Let this adapter receive gradients from now on, whichever one is active."""
        self._trained[name] = list(self.parameters(name).values())
        self._settle()

    def freeze(self) -> None:
        """Nothing receives gradients but the adapters that are in training."""
        self.model.requires_grad_(False)
        self._settle()

    def _settle(self) -> None:
        """After adapters have come or gone, which makes PEFT choose one and let it train."""
        self._layers = _layers(self.model)
        for name in self.names:
            for weight in self.parameters(name).values():
                weight.requires_grad_(name in self._trained)

    def parameters(self, name: str) -> Mapping[str, nn.Parameter]:
        """The adapter's weights, named without the adapter's own name."""
        parts = [(key.split("."), value) for key, value in self.model.named_parameters() if "lora_" in key]
        return {".".join(part for part in key if part != name): value for key, value in parts if name in key}

    def scale(self, name: str) -> float:
        """What the adapter's update is multiplied by, over its rank."""
        assert self.peft is not None
        return float(self.peft.peft_config[name].lora_alpha)  # pyright: ignore[reportAttributeAccessIssue]

    def save(self, name: str, folder: Path, task: str | None = None) -> None:
        """Write the adapter in PEFT's format, at the folder's top.

        Args:
            task: PEFT's task type, where the model is another than the adapter's configuration says.
        """
        assert self.peft is not None
        config: PeftConfig = copy.deepcopy(self.peft.peft_config[name])
        config.inference_mode = True
        config.task_type = task or config.task_type
        state = {f"{PEFT_PREFIX}{key}": value.detach().contiguous() for key, value in self.parameters(name).items()}
        folder.mkdir(parents=True, exist_ok=True)
        from safetensors.torch import save_file

        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))

    def _free_name(self) -> str:
        number = len(self.names)
        while f"tilt{number}" in self.names:
            number += 1
        return f"tilt{number}"

    def _add(self, name: str, config: PeftConfig) -> None:
        with _both_kinds_of_layers():
            if self.peft is None:
                self.peft = PeftModel(self.model, config, adapter_name=name, autocast_adapter_dtype=False)
            else:
                self.peft.add_adapter(name, config, autocast_adapter_dtype=False)
        self._finish(name)

    def _finish(self, name: str) -> None:
        """New adapters take the base's precision; nothing trains by accident."""
        assert self.peft is not None
        for value in self.parameters(name).values():
            value.data = value.data.to(self.model.dtype)
        self.peft.eval()
        self._settle()
