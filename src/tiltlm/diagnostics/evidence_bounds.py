"""Bounds of log Z and of KL(q || p*) from both sides, in expectation.

From below: the log of any unbiased estimate of Z, by Jensen's inequality; the mean importance weight (Burda et al. 2016), or the
product of mean weights of a run of SMC. From above: the same estimate with an exact posterior sample among its draws
(Grosse et al. 2015; Zhao et al. 2024, Prop. 5.1). Both gaps are KLs between the laws of all that a run draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from tiltlm.estimates import Estimate, Interval
from tiltlm.inference.decoding.smc import SMC
from tiltlm.inference.source import at_most
from tiltlm.protocols import Sampler
from tiltlm.records import Prompts, Scored
from tiltlm.target import Target

RUNS = 4
"""Runs of an engine that are enough: with fewer, the error of its bound can hardly be told."""


@dataclass(frozen=True)
class Bounds:
    """One prompt: what the draws say of log Z and KL(q || p*).

    Attributes:
        elbo: mean log-weight of q's draws.
        log_z_low, log_z_high: bounds of log Z in expectation; the upper one is None without exact samples.
        low, high: bounds of KL(q || p*) in expectation: those of log Z less the ELBO. Both are inf where q has drawn what the
            posterior rules out, for then the KL is.
        ess: effective sample size of q's draws as posterior samples.
        exact: exact posterior samples behind the upper bounds.
    """

    elbo: Estimate
    log_z_low: Estimate
    log_z_high: Estimate | None
    low: Estimate
    high: Estimate | None
    ess: float
    exact: int

    @property
    def interval(self) -> Interval:
        """KL(q || p*) at 95%."""
        return kl_interval(self.low, self.high)


def kl_interval(low: Estimate, high: Estimate | None) -> Interval:
    """A KL at 95% from its bounds in expectation: not negative; an infinite one has no error."""
    if low.value == math.inf:
        return Interval(math.inf, math.inf, math.inf)
    value = low.value if high is None else (low.value + high.value) / 2
    top = math.inf if high is None else max(0.0, high.value + high.margin)
    return Interval(max(0.0, value), max(0.0, low.value - low.margin), top)


def prompt_bounds(
    log_w: Float[Tensor, " N"],
    log_w_exact: Float[Tensor, " M"],
    pooled: Estimate | None,
    drawn: int | None = None,
) -> Bounds:
    """Bounds of log Z and of KL(q || p*) for one prompt.

    Lower: log mean w, and less mean log w, over q's draws. Upper: the same with one of the N draws replaced by an exact posterior
    sample, averaged over the M of them. Standard errors by the influence of a single draw, w / mean(w) and w / mean(w) - log w.

    Args:
        log_w: log-weights of q's draws.
        log_w_exact: log-weights of exact posterior samples; may be empty.
        pooled: how the upper bound's terms differ between exact samples (`pooled_spread`), used where M = 1; without it a
            single exact sample has no error to go by, and there is no upper side.
        drawn: completions that were drawn, if some of them had no reward and are not among the N: q is then what it is of
            completions with a reward, and Z, to which the others add nothing, is N / drawn of what the N say. The log of
            that share is too low by (1/share - 1) / (2 drawn) in expectation, and the upper bound of log Z a bound up to that.
    """
    n = len(log_w)
    drawn = drawn or n
    peak = torch.cat([log_w, log_w_exact]).max().nan_to_num(neginf=0.0)
    w = (log_w - peak).exp()
    relative = w / w.mean()
    share = Estimate(math.log(n / drawn), math.sqrt((drawn - n) / (drawn * n)), n)
    elbo = Estimate.of(log_w)
    log_z = Estimate.of(relative, "lower").off(float(w.mean().log() + peak))
    # with a draw that the posterior rules out, the ELBO is -inf for certain, and so the gap is inf, whatever log Z is
    impossible = elbo.value == -math.inf
    gap = Estimate.of(relative - log_w, "lower").off(math.inf if impossible else log_z.value - elbo.value)
    terms = of_samples(upper_terms(log_w, log_w_exact), pooled)
    log_z_high = None if terms is None else terms.plus(log_z.off(0.0)).plus(share)
    high = None if terms is None else terms.plus(gap.off(-elbo.value))
    ess = float((w.sum().square() / w.square().sum()).nan_to_num(nan=0.0))
    return Bounds(elbo.plus(share), log_z.plus(share), log_z_high, gap, high, ess, len(log_w_exact))


def upper_terms(log_w: Float[Tensor, " N"], log_w_exact: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """log of the mean weight of one exact sample and N - 1 draws of q; each bounds log Z from above in expectation."""
    n = len(log_w)
    others = log_w.logsumexp(0) + math.log((n - 1) / n)
    return torch.logaddexp(log_w_exact, others) - math.log(n)


def pooled_spread(groups: Sequence[Float[Tensor, " M"]]) -> Estimate | None:
    """0, with the standard error of a single term as the prompts with several tell it; None if there is no such prompt."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return None
    variance = sum(float(group.var()) for group in several) / len(several)
    return Estimate(0.0, math.sqrt(variance), 1, df=sum(len(group) - 1 for group in several))


def of_samples(terms: Float[Tensor, " M"], pooled: Estimate | None, each: int = 1) -> Estimate | None:
    """An upper bound from one term for each exact sample; None where there is no sample, or a single one without an error to go by.

    Args:
        each: draws behind a term.
    """
    m = len(terms)
    if m == 0 or (m == 1 and pooled is None):
        return None
    if m == 1 and pooled is not None:
        return replace(pooled, value=float(terms), n=each, kind="upper")
    return Estimate.of(terms, "upper", each)


# --- bounds by an engine ---


@dataclass(frozen=True)
class LogZBounds:
    """log Z of each prompt, from below and from above, in expectation.

    Attributes:
        lower: mean log Z-hat of free runs.
        upper: mean log Z-hat of runs given an exact posterior sample; None for a prompt without one, or where a single one has
            no error to go by.
    """

    lower: tuple[Estimate, ...]
    upper: tuple[Estimate | None, ...]


def log_z_bounds(
    target: Target,
    prompts: Prompts,
    engine: SMC,
    exact: Scored | None,
    rng: Generator,
    *,
    proposal: Sampler | None = None,
) -> LogZBounds:
    """Bidirectional SMC: `engine.repeats` free runs a prompt (at least 4), and a conditional run for each of as many exact samples.

    Without a twist there is no resampling, and these are the two sides of IWAE (Burda et al. 2016; Sobolev & Vetrov 2019).

    Args:
        exact: exact posterior samples of `prompts`, from rejection or enumeration; None if there are none. With anything else
            in their place the upper bound is not one.
        proposal: what the engine draws from; the prior by default.
    """
    runs = max(RUNS, engine.repeats)
    free = engine.log_z_runs(target, prompts, runs, proposal=proposal, rng=rng)
    lower = tuple(Estimate.of(row, "lower", engine.particles) for row in free.double())
    if exact is None or not len(exact):
        return LogZBounds(lower, (None,) * len(prompts))
    some = at_most(exact, runs, rng).draws
    given = engine.log_z_given(target, some, proposal=proposal, rng=rng).double()
    groups = [given[some.prompt_index == p] for p in range(len(prompts))]
    pooled = pooled_spread(groups)
    return LogZBounds(lower, tuple(of_samples(group, pooled, engine.particles) for group in groups))


def with_log_z(bounds: Bounds, lower: Estimate, upper: Estimate | None) -> Bounds:
    """The same draws with an engine's bounds of log Z in place of their own; the errors are independent of the ELBO's."""
    possible = math.isfinite(bounds.elbo.value)
    low = lower.less(bounds.elbo) if possible else bounds.low
    high = None if upper is None else upper.less(bounds.elbo) if possible else bounds.low
    return replace(bounds, log_z_low=lower, low=low, log_z_high=upper, high=high)
