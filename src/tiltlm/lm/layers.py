"""A model's stack of layers, and training its top: everything below stays frozen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from tiltlm.errors import InputError


@dataclass(frozen=True)
class TopLayers:
    """Train the last layers of the model, and what comes after them; everything below stays frozen.

    Attributes:
        count: how many layers; None trains all of the model, its embeddings too.
    """

    count: int | None = 1

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise InputError(
                f"count is {self.count}; unfreeze at least 1 layer, or give no adaptation to train a head only"
            )


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of layers: the module list that is as long as the configuration says.

    Raises:
        InputError: if there is none.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise InputError(
        f"{type(model).__name__} has no list of {depth} layers, so that its top ones cannot be told; use LoRA"
    )


def top_parameters(model: PreTrainedModel, count: int | None) -> dict[str, nn.Parameter]:
    """The last `count` layers' weights, and those of whatever is registered after the stack (a final norm)."""
    named = dict(model.named_parameters())
    if count is None:
        return named
    layers = layers_of(model)
    if count > len(layers):
        raise InputError(
            f"count is {count}, and the model has {len(layers)} layers; give at most that, or None for everything"
        )
    inside = {id(p) for p in layers.parameters()}
    top = {id(p) for layer in layers[len(layers) - count :] for p in layer.parameters()}
    chosen: dict[str, nn.Parameter] = {}
    passed = False
    for name, value in named.items():
        passed = passed or id(value) in inside
        if id(value) in top or (passed and id(value) not in inside):
            chosen[name] = value
    return chosen
