"""Advantages from the credits of a group: how a draw compares with the others of its prompt.

Each takes credits (B, T) or rewards (B,), row by row with their prompt's index, and works on every column by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from tiltlm.inference.training.policy_gradients.baselines import of_the_group, of_the_others

Advantage = Callable[[Tensor, Int[Tensor, " B"]], Tensor]

EPS = 1e-4
"""Added to standard deviations (TRL's value): a group that agrees has advantage 0, not 0 / 0."""


def uncentred(credit: Tensor, index: Int[Tensor, " B"]) -> Tensor:
    """The credit as it is."""
    return credit


def leave_one_out(credit: Tensor, index: Int[Tensor, " B"]) -> Tensor:
    """Minus the mean of the others (Kool et al. 2019): unbiased."""
    return credit - of_the_others(credit, index, credit)


def centred(credit: Tensor, index: Int[Tensor, " B"]) -> Tensor:
    """Minus the group's mean (Liu et al. 2025, Dr. GRPO): (1 - 1/G) times `leave_one_out`."""
    return credit - of_the_group(credit, index, credit)


def standardised(credit: Tensor, index: Int[Tensor, " B"]) -> Tensor:
    """Minus the group's mean, over its standard deviation with G - 1 (Shao et al. 2024, GRPO; ddof as in TRL)."""
    return _over_deviation(credit, index, ddof=1)


def standardised_population(credit: Tensor, index: Int[Tensor, " B"]) -> Tensor:
    """Minus the group's mean, over its standard deviation with G."""
    return _over_deviation(credit, index, ddof=0)


def batch_standardised(credit: Tensor, index: Int[Tensor, " B"]) -> Tensor:
    """Minus the group's mean, over the deviation of what is left in the whole batch (Hu et al. 2025, REINFORCE++-baseline)."""
    rest = centred(credit, index)
    return rest / (rest.std(0, keepdim=True) + EPS)


def _over_deviation(credit: Tensor, index: Tensor, ddof: int) -> Tensor:
    rest = centred(credit, index)
    count = torch.bincount(index)[index].to(credit.dtype).view(-1, *[1] * (credit.dim() - 1))
    variance = of_the_group(rest**2, index, credit) * count / (count - ddof).clamp(min=1)
    return rest / (variance.sqrt() + EPS)
