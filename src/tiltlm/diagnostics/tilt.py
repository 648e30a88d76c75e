"""Exponential tilting of one sample: what its rewards say about every temperature.

With x_1..x_n from the prior and lambda = 1 / beta, the weights exp(lambda r_i) turn the same sample into one of
p*_beta: kappa(lambda) = log mean exp(lambda r), reward kappa'(lambda), KL(p* || pi0) = lambda kappa' - kappa.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.weights import best_of_subsets, group_mean, group_sum


@dataclass(frozen=True)
class Tilted:
    """Moments of tilted samples; the leading axes are whatever the caller made them."""

    reward: Float[Tensor, "... G"]
    kl: Float[Tensor, "... G"]
    log_z: Float[Tensor, "... G"]
    ess: Float[Tensor, "... G"]


def tilt(reward: Float[Tensor, " N"], betas: Float[Tensor, " G"], counts: Float[Tensor, " N"] | None = None) -> Tilted:
    """Tilt one prompt's prior sample to each temperature. Rewards of -inf are impossible at any; some must be finite.

    Args:
        counts: how often each draw counts; ones by default.
    """
    if counts is None:
        counts = torch.ones_like(reward)
    reward, counts = reward[counts > 0], counts[counts > 0]
    peak, w, below = _weights(reward, betas)
    s0, s1, s2 = counts @ w, (counts * _possible(reward)) @ w, counts @ w.square()
    mean, kl, log_z = _moments(s0, s1, counts @ below, float(counts.sum()), peak)
    return Tilted(mean, kl, log_z, s0.square() / s2)


@dataclass(frozen=True)
class Jackknifed:
    """Moments of one tilted sample without their bias of order 1 / n, and their standard errors."""

    reward: Float[Tensor, " G"]
    reward_stderr: Float[Tensor, " G"]
    kl: Float[Tensor, " G"]
    kl_stderr: Float[Tensor, " G"]


def tilt_jackknife(reward: Float[Tensor, " N"], betas: Float[Tensor, " G"]) -> Jackknifed:
    """Tilt one prompt's prior sample with each draw left out in turn.

    Errors are NaN for a single draw. So is the KL's for two: either one, left alone, is its own posterior, with a KL of 0.
    """
    n, full = len(reward), tilt(reward, betas)
    if n < 2:
        unknown = torch.full_like(betas, torch.nan)
        return Jackknifed(full.reward, unknown, full.kl, unknown)
    peak, below, (s0, s1) = _without_each(reward, betas, [torch.ones_like(reward), _possible(reward)])
    mean, kl, _ = _moments(s0, s1, below, n - 1, peak)
    found = Jackknifed(*_jackknife(full.reward, mean), *_jackknife(full.kl, kl))
    return found if n > 2 else replace(found, kl_stderr=torch.full_like(betas, torch.nan))


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
    r, g = _possible(reward), values
    factors = [torch.ones_like(r), r, g, r * g]

    def estimates(s0: Tensor, sr: Tensor, sg: Tensor, srg: Tensor) -> tuple[Tensor, Tensor]:
        return sg / s0, srg / s0 - (sr / s0) * (sg / s0)

    _, w, _ = _weights(reward, betas)
    mean, slope = estimates(*(factor @ w for factor in factors))
    if len(reward) < 2:
        unknown = torch.full_like(betas, torch.nan)
        return TiltedMean(mean, unknown, slope, unknown)
    _, _, sums = _without_each(reward, betas, factors)
    means, slopes = estimates(*sums)
    return TiltedMean(*_jackknife(mean, means), *_jackknife(slope, slopes))


def best_of_n_shares(reward: Float[Tensor, " N"], n: int) -> Float[Tensor, " N"]:
    """The share of the subsets of n draws of a sample in which each draw is the best, alike for draws of one reward; they sum to 1.

    The mean of anything, weighed by them, is unbiased for its mean under best-of-n. That of n drawn from the sample with
    replacement, F^n - F_-^n, is not: some of the n are the same draw. At n = N / 2 it is a quarter of a standard deviation short
    for exponential rewards, and more prompts do not help.

    Raises:
        InputError: if there are fewer than n draws.
    """
    if n > len(reward):
        raise InputError(f"n is {n}, but the best of n is taken of {len(reward)} draws; draw at least n")
    _, place, counts = reward.unique(return_inverse=True, return_counts=True)
    return group_mean(best_of_subsets(len(reward), n), place.sort().values, len(counts))[place]


def best_of_n_mean(reward: Float[Tensor, " N"], values: Float[Tensor, " N"], n: int) -> tuple[float, float]:
    """The mean of another quantity under best-of-n by `reward`, unbiased, and its jackknifed standard error; NaN for n draws.

    Raises:
        InputError: if there are fewer than n draws.
    """
    mean = best_of_n_shares(reward, n) @ values
    if n == len(reward):
        return float(mean), math.nan
    return float(mean), float(_jackknife(mean, _best_without_each(reward, values, n))[1])


def best_of_n_kl(reward: Float[Tensor, " N"], n: int) -> float:
    """KL to the prior of best-of-n in nats, ties taken into account: sum (F^n - F_-^n) log (F^n - F_-^n) / (F - F_-).

    F and F_- are the sample's shares of rewards at most, and less than, the draw's (Beirami et al. 2024). Where all rewards
    differ it is about (n / N)^2 / 24 nats too small, and more where the best reward is rare: of a prompt without a success in its
    draws it is 0.
    """
    _, counts = reward.unique(return_counts=True)
    share = counts.double() / len(reward)
    upto = share.cumsum(0).clamp(max=1.0)
    mass = upto**n - (upto - share).clamp(min=0) ** n
    return float(torch.where(mass > 0, mass * (mass / share).log(), 0.0).sum())


# --- leaving out each draw in turn ---


def _weights(
    reward: Float[Tensor, " N"], betas: Float[Tensor, " G"]
) -> tuple[Float[Tensor, " G"], Float[Tensor, "N G"], Float[Tensor, "N G"]]:
    """The largest r / beta; w = exp(r / beta) over its exponential; and w log w, in which no large numbers cancel."""
    scaled = reward[:, None] / betas
    peak = scaled.amax(0)
    w = (scaled - peak).exp()
    return peak, w, torch.where(w > 0, w * (scaled - peak), 0.0)


def _possible(reward: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The rewards as factors of their weights: one of -inf has none, and 0 times -inf would be NaN."""
    return torch.where(reward > -torch.inf, reward, 0.0)


def _moments(s0: Tensor, s1: Tensor, below: Tensor, n: float, peak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reward, KL to the prior and log Z, of the sums of w, w r and w log w over n draws."""
    log_mean = s0.log() - math.log(n)
    return s1 / s0, below / s0 - log_mean, log_mean + peak


def _without_each(
    reward: Float[Tensor, " N"], betas: Float[Tensor, " G"], factors: Sequence[Float[Tensor, " N"]]
) -> tuple[Float[Tensor, "N G"], Float[Tensor, "N G"], list[Float[Tensor, "N G"]]]:
    """For each draw left out, the peak of the others and, relative to it, the sums of their w log w, and of w times each factor.

    The others of the best draw may all be beyond e^-745 of it, where a sum relative to the sample's own peak is 0. So theirs are
    taken anew; those of any other draw hold the largest weight, 1, and are what is left of the sample's.
    """
    best = int(reward.argmax())
    others = torch.arange(len(reward)) != best
    peak, w, below = _weights(reward, betas)
    second, w_others, below_others = _weights(reward[others], betas)
    peaks, sums = peak.repeat(len(reward), 1), []
    without = below.sum(0) - below
    peaks[best], without[best] = second, below_others.sum(0)
    for factor in factors:
        left = factor @ w - w * factor[:, None]
        left[best] = factor[others] @ w_others
        sums.append(left)
    return peaks, without, sums


def _best_without_each(reward: Float[Tensor, " N"], values: Float[Tensor, " N"], n: int) -> Float[Tensor, " N"]:
    """The mean of a quantity under best-of-n with each draw left out in turn."""
    _, place, counts = reward.unique(return_inverse=True, return_counts=True)
    mass = best_of_subsets(len(reward) - 1, n)
    within = torch.cat([torch.zeros(1, dtype=mass.dtype), mass.cumsum(0)])  # of the m worst, m = 0 .. N - 1
    sums = group_sum(values, place, len(counts))
    upto = counts.cumsum(0)
    less = upto - counts
    # A level of rewards keeps its places where a better draw is left out, moves down where a worse one is, and is one fewer itself.
    kept = (within[upto.clamp(max=len(mass))] - within[less]) * sums / counts
    moved = (within[upto - 1] - within[(less - 1).clamp(min=0)]) * sums / counts
    fewer = (within[upto - 1] - within[less]) / (counts - 1).clamp(min=1)
    worse = kept.cumsum(0) - kept
    better = moved.sum() - moved.cumsum(0)
    return (worse + better)[place] + fewer[place] * (sums[place] - values)


def _jackknife(full: Float[Tensor, "..."], without: Float[Tensor, "N ..."]) -> tuple[Tensor, Tensor]:
    """An estimate without its bias of order 1 / n, and its standard error, from it with each draw left out in turn.

    Quenouille (1956) and Tukey (1958).
    """
    n, mean = len(without), without.mean(0)
    return n * full - (n - 1) * mean, ((n - 1) / n * (without - mean).square().sum(0)).sqrt()
