"""How the terms of a batch's tokens become one loss. What lengths weigh is decided here."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor

Aggregate = Callable[[Float[Tensor, "B T"], Bool[Tensor, "B T"], int], Tensor]
"""(terms, mask, longest completion) -> scalar."""


def total(terms: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], longest: int) -> Tensor:
    """The sum over tokens, averaged over completions: what a log-probability of completions asks for."""
    return (terms * mask).sum(-1).mean()


def constant_length(terms: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], longest: int) -> Tensor:
    """`total` over the longest length possible (Liu et al. 2025, Dr. GRPO): only a scale."""
    return total(terms, mask, longest) / longest


def sequence_mean(terms: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], longest: int) -> Tensor:
    """The mean over a completion's tokens, averaged over completions (GRPO): a short completion's tokens weigh more."""
    return ((terms * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def token_mean(terms: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], longest: int) -> Tensor:
    """The mean over the batch's tokens (Yu et al. 2025, DAPO): a completion weighs less in a batch of long ones."""
    return (terms * mask).sum() / mask.sum().clamp(min=1)
