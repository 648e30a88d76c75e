"""Weights laid out for small products on a CPU.

A product with a few dozen rows in bfloat16 spends as much time on bringing the weights into the order that the instructions
want as on multiplying. oneDNN can keep them in that order; the layers that read the same input, and their adapters, become
one product each. The copy takes as much memory as the weights, so it is made of small models only, and only
without gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from tiltlm.lm.operations import Projection

MOST_BYTES = 2**30
"""Weights of a model that are worth a second copy."""
ROWS = 32
"""Rows of the products that oneDNN chooses the order for."""


@dataclass(frozen=True)
class Packed:
    """Layers that read the same input, as one product, and one of each side of their adapters.

    Attributes:
        weight: in oneDNN's own order.
        widths: outputs of each layer.
        down, up: what the adapters add is up @ down; `up` has a block for each layer, and the scales in it.
    """

    weight: Tensor
    bias: Float[Tensor, " O"] | None
    widths: tuple[int, ...]
    down: Float[Tensor, "R I"] | None
    up: Float[Tensor, "O R"] | None

    def __call__(self, x: Float[Tensor, "N I"]) -> tuple[Float[Tensor, "N O"], ...]:
        """What each layer makes of `x`."""
        out = multiply(x, self.weight, self.bias)
        if self.down is not None and self.up is not None:
            out.addmm_(torch.mm(x, self.down.t()), self.up.t())
        return out.split(self.widths, dim=-1)


def multiply(x: Float[Tensor, "N I"], packed: Tensor, bias: Tensor | None) -> Float[Tensor, "N O"]:
    """x @ weight.T + bias, for a weight in oneDNN's order."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class Packer:
    """Keeps the packed form of base weights, and makes it anew when they have changed."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[Tensor], list[tuple[int, float]], Tensor]] = {}

    def weight(self, place: Hashable, weights: Sequence[Tensor]) -> Tensor:
        """Weights with the same input, one under the other, in oneDNN's order; those of a `place` are kept until it has others."""
        versions = [_version(weight) for weight in weights]
        kept = self._kept.get(place)
        if kept is None or kept[1] != versions or any(a is not b for a, b in zip(kept[0], weights, strict=True)):
            whole = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
            kept = [*weights], versions, torch.ops.mkldnn._reorder_linear_weight(whole, ROWS)
            self._kept[place] = kept
        return kept[2]

    def pack(self, place: Hashable, layers: Sequence[Projection]) -> Packed:
        """Layers with the same input."""
        biases = [layer.bias for layer in layers]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
            )
        adapters = [(layer.down, layer.up, layer.scale) for layer in layers]
        down = up = None
        if any(d is not None for d, _, _ in adapters):
            down = torch.cat([d for d, _, _ in adapters if d is not None])
            none = layers[0].weight.new_zeros
            up = torch.block_diag(
                *(none(len(layer.weight), 0) if layer.up is None else layer.up * layer.scale for layer in layers)
            )
        return Packed(
            self.weight(place, [layer.weight for layer in layers]),
            bias,
            tuple(len(layer.weight) for layer in layers),
            down,
            up,
        )


def _version(weight: Tensor) -> tuple[int, float]:
    """Tells a weight from what it was: by torch's count of changes, and by a few entries, as changes of `.data` are not counted."""
    some = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
    return 0 if weight.is_inference() else weight._version, float(some.float().sum())


def worth_packing(weights: Sequence[Tensor]) -> bool:
    """Whether these are weights that packing helps: plain ones in bfloat16, on a CPU that multiplies it, and not too many."""
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return _cpu_packs() and size <= MOST_BYTES and all(map(_is_plain, weights))


def _is_plain(weight: Tensor) -> bool:
    whole = type(weight) in (Tensor, torch.nn.Parameter)  # and no share of a tensor that several processes hold
    return whole and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


@cache
def _cpu_packs() -> bool:
    """Whether this build of torch keeps weights in oneDNN's order, and gives with them what it gives without."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()):
        return False
    x, weight = (torch.linspace(-1, 1, n * 64).view(n, 64).sin().bfloat16() for n in (3, 48))
    try:
        got = multiply(x, torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), None)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(got, x @ weight.t(), rtol=0.02, atol=0.02)
