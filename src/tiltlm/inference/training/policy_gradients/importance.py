"""Ratios of the policy to the one that drew, and PPO's clipped surrogate.

On the policy's own draws every ratio is 1 and its gradient, summed over a completion's tokens, that of log q(x).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Importance = Callable[[Float[Tensor, "B T"], Bool[Tensor, "B T"]], Float[Tensor, "B T"]]
"""(log pi / pi_old, mask) -> ratio of each token."""


def token_ratio(age: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Each token's own (Schulman et al. 2017): leaves out how likely the states before it have become."""
    return age.exp()


def sequence_ratio(age: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The completion's geometric mean, (pi / pi_old)^(1/|x|), for each of its tokens (Zheng et al. 2025, GSPO)."""
    mean = age.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.exp().expand_as(age)


def clipped(ratio: Float[Tensor, "B T"], advantage: Tensor, low: float, high: float) -> Float[Tensor, "B T"]:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A) (Schulman et al. 2017, eq. 7; `high` above `low`: Yu et al. 2025)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
