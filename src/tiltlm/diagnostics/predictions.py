"""What `plan` predicts, as records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tiltlm.estimates import Estimate, Interval


@dataclass(frozen=True)
class FrontierPoint:
    """The predicted optimum at one beta, averaged over prompts.

    Attributes:
        reward, kl: E r and KL(p*_beta || pi0) in nats, with intervals for prompts like these.
        log_z: a lower bound in expectation (Jensen).
        ess: effective draws a prompt behind the prediction, mean over prompts.
        pareto_k: median over the prompts that have one of the shape of the weights' tail; above 0.7 do not trust. NaN where no
            prompt has one, -inf where the largest weights are equal: neither says that the draws suffice, `reliable` does.
        needed: draws a prompt that the prediction asks for, MARGIN * exp(KL) of the hardest tenth of the prompts; the KL that a
            plan extrapolates, where its draws do not suffice to tell it.
        reliable: whether there are that many.
    """

    beta: float
    reward: Interval
    kl: Interval
    log_z: Estimate
    ess: float
    pareto_k: float
    needed: int
    reliable: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "beta": self.beta,
            "reward": self.reward.as_dict(),
            "kl": self.kl.as_dict(),
            "log_z": self.log_z.as_dict(),
            "ess": self.ess,
            "pareto_k": self.pareto_k if math.isfinite(self.pareto_k) else None,
            "needed_samples": self.needed,
            "reliable": self.reliable,
        }


@dataclass(frozen=True)
class BestOfNPoint:
    """Best of n, averaged over prompts.

    Attributes:
        reward: E r, the mean over all subsets of n of each prompt's draws; unbiased.
        kl: KL to the prior, ties taken into account: that of the exact law on each prompt's empirical distribution.
        kl_bound: log n - (n - 1) / n, which the KL never exceeds.
    """

    n: int
    reward: float
    kl: float
    kl_bound: float

    def as_dict(self) -> dict[str, float]:
        return {"n": self.n, "reward": self.reward, "kl": self.kl, "kl_bound": self.kl_bound}


@dataclass(frozen=True)
class PromptPlan:
    """The prediction for one prompt at the chosen beta; intervals over its own draws."""

    prompt: str
    n: int
    prior_reward: float
    reward: Interval
    kl: Interval
    log_z: Estimate
    ess: float
    pareto_k: float
    reliable: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "n": self.n,
            "prior_reward": self.prior_reward,
            "reward": self.reward.as_dict(),
            "kl": self.kl.as_dict(),
            "log_z": self.log_z.as_dict(),
            "ess": self.ess,
            "pareto_k": self.pareto_k if math.isfinite(self.pareto_k) else None,
            "reliable": self.reliable,
        }


def clipped(interval: Interval, low: float, high: float = math.inf) -> Interval:
    """An interval of what is nowhere below `low` (0 for a KL divergence) or above `high`; what is not known stays NaN."""
    ends = {name: getattr(interval, name) for name in ("value", "low", "high")}
    return replace(interval, **{name: low if end < low else high if end > high else end for name, end in ends.items()})


def over_prompts(
    estimates: Sequence[tuple[float, float]], n: int, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """95% interval of a mean, for prompts like these: Student's t over prompts, whose estimates carry their own noise.

    Jackknifed estimates are nearly unbiased, so the spread between prompts holds both sources of error. (A percentile
    bootstrap over prompts covers too rarely at 8 to 16 prompts, one over prompts and draws too often; see LAB.md.) With a
    single prompt, by its own standard error.

    Args:
        bounds: of the quantity. The jackknife's correction may carry the mean past them: it is then the bound, and its error as
            it was, because a mean at its bound is not therefore known. A single prompt's estimate may be past them; to clip each
            would bias the mean (LAB.md).
    """
    if any(value == -math.inf for value, _ in estimates):
        return Interval(-math.inf, -math.inf, -math.inf)  # impossible draws: for certain
    values = torch.tensor([value for value, _ in estimates], dtype=torch.float64)
    mean = float(values.mean().clamp(*bounds))
    if len(values) == 1:
        return clipped(own_interval(mean, estimates[0][1], n), *bounds)
    return clipped(own_interval(mean, float(values.std()) / math.sqrt(len(values)), len(values)), *bounds)


def own_interval(value: float, stderr: float, n: int) -> Interval:
    """95% interval by Student's t with n - 1 degrees of freedom; without end where the error is not known."""
    half = math.inf if n < 2 or math.isnan(stderr) else Estimate(value, stderr, n, df=n - 1).margin
    return Interval(value, value - half, value + half)
