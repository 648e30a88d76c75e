"""Attention of completions that share their prompt: its keys and values are stored once, and looked at by all of them.

Tensors have the heads of the keys first: queries are (K, B, R * S, D), for K heads of keys, B rows, R heads of queries to
each of them, and S positions; keys and values are (K, B, L, D). Then the queries of a prompt's rows lie together, and a
prompt's keys meet them in one product. Scores exist for some positions at a time and are formed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

SCORES_BYTES = 32 * 2**20
"""What the scores of a block of positions may take."""
POSITIONS = 128
"""Most positions of a block: what is later than its last one is not even looked at."""

KEPT = 2**24
"""Pairs of positions, in all rows, for which it is kept who may look at whom."""


@dataclass(frozen=True)
class Groups:
    """Which prompt each row continues.

    Attributes:
        owner: the prompt of each row; the rows of one prompt need not be neighbours.
        count: prompts, each with at least one row.
    """

    owner: Int[Tensor, " B"]
    count: int

    @cached_property
    def most(self) -> int:
        """Rows of the prompt that has most of them."""
        return int(self.owner.bincount().max())

    @cached_property
    def slot(self) -> Int[Tensor, " B"] | None:
        """Where each row stands if every prompt gets `most` places; None if that is where all of them stand already."""
        order = self.owner.argsort(stable=True)
        by_prompt = self.owner[order]
        rank = torch.arange(len(order), device=order.device) - torch.searchsorted(by_prompt, by_prompt)
        slot = torch.empty_like(order)
        slot[order] = by_prompt * self.most + rank
        in_place = len(slot) == self.count * self.most and torch.equal(
            slot, torch.arange(len(slot), device=slot.device)
        )
        return None if in_place else slot

    def together(self, x: Float[Tensor, "K B N D"]) -> Float[Tensor, "K P M D"]:
        """The rows of each prompt in one axis, filled up with zeros."""
        heads, _, _, width = x.shape
        if self.slot is not None:
            x = x.new_zeros(heads, self.count * self.most, *x.shape[2:]).index_copy_(1, self.slot, x)
        return x.reshape(heads, self.count, -1, width)

    def apart(self, x: Float[Tensor, "K P M D"], each: int) -> Float[Tensor, "K B N D"]:
        """The inverse of `together`, for rows of `each` entries."""
        x = x.view(x.shape[0], self.count * self.most, each, x.shape[-1])
        return x if self.slot is None else x[:, self.slot]


@dataclass(frozen=True)
class Sight:
    """What each new position may look at: real tokens that are not later than itself.

    Attributes:
        real: the tokens that are real, over prompt, cache and the new positions.
        asks: the new positions that are real. The others look at padding too, so that nothing becomes NaN; no one looks at them.
        shared: tokens of the prompts, whose keys are stored apart.
    """

    real: Bool[Tensor, "B L"]
    asks: Bool[Tensor, "B S"]
    shared: int
    _known: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    @cached_property
    def padded(self) -> bool:
        return not bool(self.real.all())

    @property
    def past(self) -> int:
        """Tokens before the new positions."""
        return self.real.shape[1] - self.asks.shape[1]

    def blocks(self, heads: int, size: int) -> Iterator[slice]:
        """Positions whose scores exist together, for `heads` heads of queries and numbers of `size` bytes."""
        rows, length = self.real.shape
        most = max(1, min(POSITIONS, SCORES_BYTES // (heads * rows * length * size)))
        for start in range(0, self.asks.shape[1], most):
            yield slice(start, min(start + most, self.asks.shape[1]))

    def seen(self, block: slice, own: int) -> int:
        """So many of a row's `own` positions meet the positions of a block: all, if there is but one to ask."""
        return own if self.asks.shape[1] == 1 else self.past + block.stop - self.shared

    def hidden(self, block: slice, length: int) -> Bool[Tensor, "B S L"] | None:
        """What the positions of a block may not look at, of the first `length` positions; None for nothing.

        It is the same in every layer, and is kept while it is small.
        """
        key = block.stop, length
        if key in self._known:
            return self._known[key]
        hidden = self._hidden(block, length)
        if hidden is None or self.asks.numel() * length <= KEPT:
            self._known[key] = hidden
        return hidden

    def _hidden(self, block: slice, length: int) -> Bool[Tensor, "B S L"] | None:
        later = None
        if block.stop - block.start > 1 or length > self.past + block.stop:
            here = torch.arange(block.start, block.stop, device=self.real.device) + self.past
            later = (torch.arange(length, device=self.real.device) > here[:, None])[None]
        if not self.padded:
            return later
        real = self.real[:, None, :length]
        padding = ~functional.pad(real, (0, length - real.shape[-1])) & self.asks[:, block, None]
        return padding if later is None else padding | later


@dataclass(frozen=True)
class Keys:
    """Keys or values: those of the prompts, once each, and those of the rows."""

    shared: Float[Tensor, "K P L D"]
    own: Float[Tensor, "K B L D"]


def attend(
    q: Float[Tensor, "K B R S D"], keys: Keys, values: Keys, groups: Groups, sight: Sight
) -> Float[Tensor, "K B R S D"]:
    """softmax(q k) v. The queries are scaled already."""
    tensors = (q, keys.shared, keys.own, values.shared, values.own)
    if not torch.is_grad_enabled():
        return _attend(*tensors, groups, sight)
    return _Attend.apply(*tensors, groups, sight)  # pyright: ignore[reportReturnType]


def _weights(q: Tensor, shared: Tensor, own: Tensor, groups: Groups, hidden: Tensor | None) -> Tensor:
    """Attention's weights (K, B, R * S, L) of some positions, over the prompt and then over what the row has."""
    heads, rows, repeats, positions, width = q.shape
    scores = _products(q.reshape(heads, rows, repeats * positions, width), shared, own, groups)
    if hidden is not None:
        scores.view(heads, rows, repeats, positions, -1).masked_fill_(hidden[:, None], -torch.inf)
    return scores.softmax(-1)


def _weighted(weights: Tensor, shared: Tensor, own: Tensor, groups: Groups) -> Tensor:
    """Sum of the vectors in `shared` and `own` under the weights."""
    length = shared.shape[2]
    out = torch.matmul(weights[..., length:], own)
    if length:
        of_prompt = torch.matmul(groups.together(weights[..., :length]), shared)
        out = out + groups.apart(of_prompt, weights.shape[2])
    return out


def _attend(
    q: Tensor, k_shared: Tensor, k_own: Tensor, v_shared: Tensor, v_own: Tensor, groups: Groups, sight: Sight
) -> Tensor:
    heads, rows, repeats = q.shape[:3]
    parts = []
    for block in sight.blocks(heads * repeats, q.element_size()):
        seen = sight.seen(block, k_own.shape[2])
        hidden = sight.hidden(block, sight.shared + seen)
        weights = _weights(q[:, :, :, block], k_shared, k_own[:, :, :seen], groups, hidden)
        out = _weighted(weights, v_shared, v_own[:, :, :seen], groups)
        parts.append(out.view(heads, rows, repeats, -1, out.shape[-1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_shared: Tensor,
        k_own: Tensor,
        v_shared: Tensor,
        v_own: Tensor,
        groups: Groups,
        sight: Sight,
    ) -> Tensor:
        ctx.save_for_backward(q, k_shared, k_own, v_shared, v_own)
        ctx.groups, ctx.sight = groups, sight
        return _attend(q, k_shared, k_own, v_shared, v_own, groups, sight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k_shared, k_own, v_shared, v_own = ctx.saved_tensors
        groups, sight = ctx.groups, ctx.sight
        heads, rows, repeats, _, width = q.shape
        to_q = torch.empty_like(q)
        to_keys, to_values = (
            _Sum(torch.zeros_like(s), torch.zeros_like(o)) for s, o in ((k_shared, k_own), (v_shared, v_own))
        )
        for block in sight.blocks(heads * repeats, q.element_size()):
            seen = sight.seen(block, k_own.shape[2])
            hidden = sight.hidden(block, sight.shared + seen)
            weights = _weights(q[:, :, :, block], k_shared, k_own[:, :, :seen], groups, hidden)
            its_grad, its_q = (x[:, :, :, block].reshape(heads, rows, -1, width) for x in (grad, q))
            slope = _products(its_grad, v_shared, v_own[:, :, :seen], groups)
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
            to_q[:, :, :, block] = _weighted(slope, k_shared, k_own[:, :, :seen], groups).view(
                heads, rows, repeats, -1, width
            )
            to_keys.add(slope, its_q, groups)
            to_values.add(weights, its_grad, groups)
        return to_q, to_keys.shared, to_keys.own, to_values.shared, to_values.own, None, None


def _products(x: Tensor, shared: Tensor, own: Tensor, groups: Groups) -> Tensor:
    """Inner products of each position's vector with those in `shared` and `own`."""
    products = torch.matmul(x, own.transpose(-1, -2))
    if not shared.shape[2]:
        return products
    of_prompt = torch.matmul(groups.together(x), shared.transpose(-1, -2))
    return torch.cat([groups.apart(of_prompt, x.shape[2]), products], dim=-1)


@dataclass(frozen=True)
class _Sum:
    """A gradient that grows block by block: sum over positions of weight times vector."""

    shared: Tensor
    own: Tensor

    def add(self, weights: Tensor, vectors: Tensor, groups: Groups) -> None:
        length = self.shared.shape[2]
        own = weights[..., length:]
        self.own[:, :, : own.shape[-1]] += torch.matmul(own.transpose(-1, -2), vectors)
        if length:
            together = groups.together(weights[..., :length])
            self.shared.add_(torch.matmul(together.transpose(-1, -2), groups.together(vectors)))
