"""Exponential tilting of one sample: what its rewards say about every temperature.

With x_1..x_n from the prior and lambda = 1 / beta, the weights exp(lambda r_i) turn the same sample into one of
p*_beta: kappa(lambda) = log mean exp(lambda r), reward kappa'(lambda), KL(p* || pi0) = lambda kappa' - kappa.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Tilted:
    """Moments of tilted samples; the leading axes are whatever the caller made them."""

    reward: Float[Tensor, "... G"]
    kl: Float[Tensor, "... G"]
    log_z: Float[Tensor, "... G"]
    ess: Float[Tensor, "... G"]


def tilt(
    reward: Float[Tensor, " N"], betas: Float[Tensor, " G"], counts: Float[Tensor, "... N"] | None = None
) -> Tilted:
    """Tilt one prompt's prior sample to each temperature. Rewards of -inf are impossible at any; some must be finite.

    Args:
        counts: how often each draw counts; ones by default. Rows of counts are other samples of the same draws.
    """
    if counts is None:
        counts = torch.ones_like(reward)
    scaled = reward[:, None] / betas
    peak = scaled.amax(0)
    w = (scaled - peak).exp()
    weighed = torch.where(w > 0, w * reward[:, None], 0.0)  # a reward of -inf has no weight
    s0, s1, s2 = counts @ w, counts @ weighed, counts @ w.square()
    return _moments(s0, s1, s2, counts.sum(-1)[..., None], peak, betas)


@dataclass(frozen=True)
class Jackknifed:
    """Moments of one tilted sample without their bias of order 1 / n, and their standard errors."""

    reward: Float[Tensor, " G"]
    reward_stderr: Float[Tensor, " G"]
    kl: Float[Tensor, " G"]
    kl_stderr: Float[Tensor, " G"]


def tilt_jackknife(reward: Float[Tensor, " N"], betas: Float[Tensor, " G"]) -> Jackknifed:
    """Tilt one prompt's prior sample with each draw left out in turn (Quenouille 1956; Tukey 1958)."""
    n, full = len(reward), tilt(reward, betas)
    if n < 2:
        unknown = torch.full_like(betas, torch.nan)
        return Jackknifed(full.reward, unknown, full.kl, unknown)
    without = tilt(reward, betas, torch.ones(n, n, dtype=reward.dtype) - torch.eye(n, dtype=reward.dtype))

    def estimate(theta: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
        mean = left_out.mean(0)
        return n * theta - (n - 1) * mean, ((n - 1) / n * (left_out - mean).square().sum(0)).sqrt()

    return Jackknifed(*estimate(full.reward, without.reward), *estimate(full.kl, without.kl))


def _moments(s0: Tensor, s1: Tensor, s2: Tensor, n: Tensor, peak: Tensor, betas: Tensor) -> Tilted:
    mean = s1 / s0
    log_z = s0.log() - n.log() + peak
    return Tilted(mean, mean / betas - log_z, log_z, s0.square() / s2)
