"""The operations of a Llama-like layer on real tokens alone, each with its own backward pass.

Autograd would keep every intermediate result of a norm, a gate or an adapter. Here each operation keeps its inputs, and an
adapter's products are added into the base's. Without gradient they are plain functions. Tokens of all rows lie in one
axis, N, so that padding costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tiltlm.lm.head import at_least_float32


@dataclass(frozen=True)
class Projection:
    """A linear layer, and the low-rank update that is on: weight + scale * up @ down (Hu et al. 2022)."""

    weight: Float[Tensor, "O I"]
    bias: Float[Tensor, " O"] | None = None
    down: Float[Tensor, "R I"] | None = None
    up: Float[Tensor, "O R"] | None = None
    scale: float = 1.0


def project(x: Float[Tensor, "N I"], layers: Sequence[Projection]) -> tuple[Float[Tensor, "N O"], ...]:
    """What each layer makes of the same input."""
    scales = tuple(layer.scale for layer in layers)
    weights = [w for layer in layers for w in (layer.weight, layer.bias, layer.down, layer.up)]
    if not torch.is_grad_enabled():
        return _project(x, scales, weights)[0]
    return _Project.apply(x, scales, *weights)  # pyright: ignore[reportReturnType]


def _project(
    x: Tensor, scales: Sequence[float], weights: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The outputs, and the input as each adapter brings it down, scaled."""
    outs: list[Tensor] = []
    lows: list[Tensor | None] = []
    for scale, (weight, bias, down, up) in zip(scales, _fours(weights), strict=True):
        assert weight is not None
        out = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        low = None
        if down is not None and up is not None:
            low = torch.mm(x, down.t())
            if scale != 1.0:
                low *= scale
            out.addmm_(low, up.t())
        outs.append(out)
        lows.append(low)
    return tuple(outs), lows


def _fours(weights: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
    return [weights[start : start + 4] for start in range(0, len(weights), 4)]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *weights: Tensor | None) -> tuple[Tensor, ...]:
        outs, lows = _project(x, scales, weights)
        ctx.save_for_backward(x, *weights, *lows)
        ctx.scales = scales
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        count = len(ctx.scales)
        x, *kept = ctx.saved_tensors
        weights, lows = _fours(kept[: 4 * count]), kept[4 * count :]
        wanted = _fours(ctx.needs_input_grad[2:])
        to_x: Tensor | None = None
        to_weights: list[Tensor | None] = []
        for grad, scale, four, low, wants in zip(grads, ctx.scales, weights, lows, wanted, strict=True):
            weight, _, down, up = four
            assert weight is not None
            if ctx.needs_input_grad[0]:
                to_x = torch.mm(grad, weight) if to_x is None else to_x.addmm_(grad, weight)
            to_down = to_up = None
            if low is not None and down is not None and up is not None:
                back = torch.mm(grad, up)
                if scale != 1.0:
                    back *= scale
                if to_x is not None:
                    to_x.addmm_(back, down)
                to_down = torch.mm(back.t(), x) if wants[2] else None
                to_up = torch.mm(grad.t(), low) if wants[3] else None
            to_weight = torch.mm(grad.t(), x) if wants[0] else None
            to_weights += [to_weight, grad.sum(0) if wants[1] else None, to_down, to_up]
        return to_x, None, *to_weights


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """x over its root mean square, taken in single precision, times a weight (Zhang & Sennrich 2019)."""
    if not torch.is_grad_enabled():
        return _rms_norm(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = at_least_float32(x)
    inverse = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse).to(x.dtype) * weight, inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        normed = at_least_float32(x) * inverse
        to_x = to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            slope = at_least_float32(grad * weight)
            along = (slope * normed).mean(-1, keepdim=True)
            to_x = slope.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype)
        return to_x, to_weight, None


def swiglu(gate: Float[Tensor, "N I"], up: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
    """silu(gate) * up (Shazeer 2020)."""
    if not torch.is_grad_enabled():
        return functional.silu(gate).mul_(up)
    return _SwiGLU.apply(gate, up)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)


def rotate(
    x: Float[Tensor, "N H D"], cos: Float[Tensor, "N 1 D"], sin: Float[Tensor, "N 1 D"]
) -> Float[Tensor, "N H D"]:
    """Rotary positions (Su et al. 2021): the first half of each head's entries turned against the second.

    `cos` and `sin` repeat themselves in their second half.
    """
    if not torch.is_grad_enabled():
        return _rotate(x, cos, sin)
    return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., :half])
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None  # the transpose turns back
