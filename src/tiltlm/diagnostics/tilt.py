"""Exponential tilting of one sample: what its rewards say about every temperature.

With x_1..x_n from the prior and lambda = 1 / beta, the weights exp(lambda r_i) turn the same sample into one of
p*_beta: kappa(lambda) = log mean exp(lambda r), reward kappa'(lambda), KL(p* || pi0) = lambda kappa' - kappa.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BLOCKS = 16
"""Blocks of draws that are left out in turn where leaving out every single draw would take too long."""


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


@dataclass(frozen=True)
class TiltedMean:
    """The mean of another quantity under one tilted sample, and how it goes with the tilt; jackknifed, with standard errors.

    Attributes:
        mean: E g under p*_beta.
        slope: dE g / dlambda = Cov(g, r) under p*_beta, lambda = 1 / beta: how gold answers to a little more tilt.
    """

    mean: Float[Tensor, " G"]
    mean_stderr: Float[Tensor, " G"]
    slope: Float[Tensor, " G"]
    slope_stderr: Float[Tensor, " G"]


def tilt_mean(reward: Float[Tensor, " N"], values: Float[Tensor, " N"], betas: Float[Tensor, " G"]) -> TiltedMean:
    """Another quantity's mean under the tilts of one prompt's prior sample, each draw left out in turn."""
    n = len(reward)
    scaled = reward[:, None] / betas
    w = (scaled - scaled.amax(0)).exp()
    r = torch.where(reward > -torch.inf, reward, 0.0)[:, None]  # a reward of -inf has no weight
    g = values[:, None]

    def estimates(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        s0, sr, sg, srg = parts
        return sg / s0, srg / s0 - (sr / s0) * (sg / s0)

    terms = [w, w * r, w * g, w * r * g]
    totals = [term.sum(0) for term in terms]
    mean, slope = estimates(totals)
    if n < 2:
        unknown = torch.full_like(betas, torch.nan)
        return TiltedMean(mean, unknown, slope, unknown)
    others = torch.ones(n, n, dtype=w.dtype) - torch.eye(n, dtype=w.dtype)
    sums = [others @ term for term in terms]
    # Without a draw that carries all the weight nothing may be left; the floor keeps that finite, and the ESS tells.
    left_out = estimates([sums[0].clamp(min=1e-300), *sums[1:]])
    results = []
    for full, without in zip((mean, slope), left_out, strict=True):
        average = without.mean(0)
        spread = ((n - 1) / n * (without - average).square().sum(0)).sqrt()
        results += [n * full - (n - 1) * average, spread]
    return TiltedMean(*results)


def best_of_n_shares(reward: Float[Tensor, " N"], n: int) -> Float[Tensor, " N"]:
    """Probability with which each draw of a sample is the best of n drawn from it with replacement; they sum to 1.

    With F the distribution of the sample's rewards and F_- without the value itself, the value has F^n - F_-^n (Beirami et al.
    2024), in equal parts for draws of the same reward.
    """
    _, place, counts = reward.unique(return_inverse=True, return_counts=True)
    share = counts.double() / len(reward)
    upto = share.cumsum(0).clamp(max=1.0)
    mass = upto**n - (upto - share).clamp(min=0) ** n
    return (mass / counts)[place]


def best_of_n_mean(reward: Float[Tensor, " N"], values: Float[Tensor, " N"], n: int) -> tuple[float, float]:
    """The mean of another quantity under best-of-n by `reward`, and its standard error by a jackknife over blocks of draws."""

    def mean(r: Tensor, g: Tensor) -> Tensor:
        return best_of_n_shares(r, n) @ g

    blocks = torch.arange(len(reward)) % BLOCKS
    if len(reward) < 2 * BLOCKS:
        return float(mean(reward, values)), math.nan
    left_out = torch.stack([mean(reward[blocks != b], values[blocks != b]) for b in range(BLOCKS)])
    spread = (BLOCKS - 1) / BLOCKS * (left_out - left_out.mean()).square().sum()
    return float(mean(reward, values)), math.sqrt(float(spread))


def _moments(s0: Tensor, s1: Tensor, s2: Tensor, n: Tensor, peak: Tensor, betas: Tensor) -> Tilted:
    mean = s1 / s0
    log_z = s0.log() - n.log() + peak
    return Tilted(mean, mean / betas - log_z, log_z, s0.square() / s2)
