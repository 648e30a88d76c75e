"""The operations of a Llama-like layer on real tokens alone, each with its own backward pass.

Autograd would keep every intermediate result of a norm, a gate or an adapter. Here a product keeps not its input but what
the input is made of, and makes it again in the backward pass; an adapter's products are added into the base's. Without
gradient they are plain functions. Tokens of all rows lie in one axis, N, so that padding costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tiltlm.lm.head import at_least_float32

Grads = tuple[Tensor | None, ...]
Pull = Callable[[Tensor, Sequence[bool]], Grads]
"""From the gradient of a value to those of what it is made of, as far as they are wanted."""


class Formed(Protocol):
    """How the input of a product is made of tensors that are kept."""

    @property
    def value(self) -> Callable[..., Tensor]:
        """From the tensors to the input."""
        ...

    @property
    def again(self) -> Callable[..., tuple[Tensor, Pull]]:
        """The same once more, and its gradient's way back."""
        ...


@dataclass(frozen=True)
class Given:
    """As it is."""

    def value(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        return x

    def again(self, x: Float[Tensor, "N I"]) -> tuple[Float[Tensor, "N I"], Pull]:
        return x, lambda grad, _: (grad,)


@dataclass(frozen=True)
class Normed:
    """x over its root mean square, taken in single precision, times a weight (Zhang & Sennrich 2019)."""

    eps: float

    def value(self, x: Float[Tensor, "... D"], weight: Float[Tensor, " D"]) -> Float[Tensor, "... D"]:
        return at_least_float32(x).mul(self._inverse(x)).to(x.dtype) * weight

    def again(self, x: Float[Tensor, "... D"], weight: Float[Tensor, " D"]) -> tuple[Float[Tensor, "... D"], Pull]:
        inverse = self._inverse(x)
        normed = at_least_float32(x) * inverse

        def pull(grad: Tensor, wants: Sequence[bool]) -> Grads:
            to_x = to_weight = None
            if wants[1]:
                to_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
            if wants[0]:
                slope = at_least_float32(grad * weight)
                along = (slope * normed).mean(-1, keepdim=True)
                to_x = slope.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype)
            return to_x, to_weight

        return normed.to(x.dtype) * weight, pull

    def _inverse(self, x: Tensor) -> Tensor:
        wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return norm.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()


@dataclass(frozen=True)
class Gated:
    """silu(gate) * up (Shazeer 2020)."""

    def value(self, gate: Float[Tensor, "N I"], up: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        return functional.silu(gate).mul_(up)

    def again(self, gate: Float[Tensor, "N I"], up: Float[Tensor, "N I"]) -> tuple[Float[Tensor, "N I"], Pull]:
        opened = functional.silu(gate)

        def pull(grad: Tensor, _: Sequence[bool]) -> Grads:
            return torch.ops.aten.silu_backward(grad * up, gate), opened.mul_(grad)

        return opened * up, pull


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """x over its root mean square, times a weight."""
    how = Normed(eps)
    return _Alone.apply(how, x, weight) if torch.is_grad_enabled() else how.value(x, weight)  # pyright: ignore[reportReturnType]


class _Alone(torch.autograd.Function):
    """A value that goes into no product."""

    @staticmethod
    def forward(ctx: Any, how: Formed, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.how = how
        return how.value(*kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, pull = ctx.how.again(*ctx.saved_tensors)
        return None, *pull(grad, ctx.needs_input_grad[1:])


@dataclass(frozen=True)
class Projection:
    """A linear layer, and the low-rank update that is on: weight + scale * up @ down (Hu et al. 2022)."""

    weight: Float[Tensor, "O I"]
    bias: Float[Tensor, " O"] | None = None
    down: Float[Tensor, "R I"] | None = None
    up: Float[Tensor, "O R"] | None = None
    scale: float = 1.0


def project(layers: Sequence[Projection], how: Formed, *kept: Tensor) -> tuple[Float[Tensor, "N O"], ...]:
    """What each layer makes of the same input."""
    scales = tuple(layer.scale for layer in layers)
    weights = [w for layer in layers for w in (layer.weight, layer.bias, layer.down, layer.up)]
    if not torch.is_grad_enabled():
        return _project(how.value(*kept), scales, weights)[0]
    return _Project.apply(how, len(kept), scales, *kept, *weights)  # pyright: ignore[reportReturnType]


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


def _fours(weights: Sequence[Any]) -> list[Sequence[Any]]:
    return [weights[start : start + 4] for start in range(0, len(weights), 4)]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: Formed, count: int, scales: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        kept: Any = tensors[:count]
        outs, lows = _project(how.value(*kept), scales, tensors[count:])
        ctx.save_for_backward(*tensors, *lows)
        ctx.how, ctx.count, ctx.scales = how, count, scales
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        wants = ctx.needs_input_grad[3:]
        of_kept, of_weights = wants[: ctx.count], wants[ctx.count :]
        saved = ctx.saved_tensors  # once: a layer that is run again gives them once
        x, pull = ctx.how.again(*saved[: ctx.count])
        to_x, to_weights = _back(grads, x, ctx.scales, saved[ctx.count :], of_weights, any(of_kept))
        to_kept = (None,) * ctx.count if to_x is None else pull(to_x, of_kept)
        return None, None, None, *to_kept, *to_weights


def _back(
    grads: Sequence[Tensor],
    x: Tensor,
    scales: Sequence[float],
    saved: Sequence[Tensor | None],
    wanted: Sequence[bool],
    wants_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input, and of each layer's four.

    Args:
        saved: each layer's four, then each one's input as its adapter brought it down.
    """
    to_x: Tensor | None = None
    to_weights: list[Tensor | None] = []
    layers, lows = _fours(saved[: 4 * len(scales)]), saved[4 * len(scales) :]
    for grad, scale, four, low, wants in zip(grads, scales, layers, lows, _fours(wanted), strict=True):
        weight, _, down, up = four
        assert weight is not None
        if wants_x:
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
    return to_x, to_weights


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
