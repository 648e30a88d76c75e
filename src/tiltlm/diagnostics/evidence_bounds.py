"""Bounds of log Z and of KL(q || p*) from both sides, in expectation.

From below: the log of any unbiased estimate of Z, by Jensen's inequality; the mean importance weight (Burda et al. 2016), or the
product of mean weights of a run of SMC. From above: the same estimate with an exact posterior sample among its draws
(Grosse et al. 2015; Zhao et al. 2024, Prop. 5.1). Both gaps are KLs between the laws of all that a run draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from tiltlm.inference.decoding.smc import SMC
from tiltlm.inference.source import at_most
from tiltlm.protocols import Sampler
from tiltlm.records import Estimate, Interval, Prompts, Scored
from tiltlm.target import Target

Z95 = 1.959964
"""Standard normal quantile of a 95% interval."""
RUNS = 2
"""Runs of an engine that are enough: with one, the error of its bound cannot be told."""


@dataclass(frozen=True)
class Bounds:
    """One prompt: what the draws say of log Z and KL(q || p*).

    Attributes:
        elbo: mean log-weight of q's draws.
        log_z_low, log_z_high: bounds of log Z in expectation; high is inf without exact samples.
        low, high: bounds of KL(q || p*) in expectation: those of log Z less the ELBO. Both are inf where q has drawn what the
            posterior rules out, for then the KL is.
        low_stderr, high_stderr: their standard errors; in that case, those of the bounds of log Z.
        ess: effective sample size of q's draws as posterior samples.
        exact: exact posterior samples behind `high`.
    """

    elbo: Estimate
    log_z_low: float
    log_z_high: float
    low: float
    low_stderr: float
    high: float
    high_stderr: float
    ess: float
    exact: int

    @property
    def interval(self) -> Interval:
        """KL(q || p*) at 95%; an infinite one has no error."""
        if self.low == math.inf:
            return Interval(math.inf, math.inf, math.inf)
        high = self.high + Z95 * self.high_stderr if math.isfinite(self.high) else math.inf
        value = (self.low + self.high) / 2 if math.isfinite(self.high) else self.low
        return Interval(max(0.0, value), max(0.0, self.low - Z95 * self.low_stderr), high)


def prompt_bounds(
    log_w: Float[Tensor, " N"], log_w_exact: Float[Tensor, " M"], pooled_variance: float | None
) -> Bounds:
    """Bounds of KL(q || p*) for one prompt.

    Lower: log mean w - mean log w over q's draws. Upper: the same with one of the N draws replaced by an exact posterior
    sample, averaged over the M of them. Standard errors by the influence of a single draw, w / mean(w) - log w.

    Args:
        log_w: log-weights of q's draws.
        log_w_exact: log-weights of exact posterior samples; may be empty.
        pooled_variance: of the upper bound's terms between exact samples, used where M = 1; without it a single exact sample
            has no error to go by, and there is no upper side.
    """
    n, m = len(log_w), len(log_w_exact)
    possible = bool((log_w > -torch.inf).all())
    peak = torch.cat([log_w, log_w_exact]).max().nan_to_num(neginf=0.0)
    w = (log_w - peak).exp()
    elbo = Estimate(float(log_w.mean()), mean_stderr(log_w), n)
    log_mean = float(w.mean().log() + peak)
    # with a draw that the posterior rules out, the ELBO is -inf for certain, and only log Z has an error
    influence = w / w.mean() - (log_w if possible else 0.0)
    stderr = float(influence.std()) / math.sqrt(n)
    log_z_high, high_stderr = math.inf, math.nan
    if m > 1 or (m == 1 and pooled_variance is not None):
        terms = upper_terms(log_w, log_w_exact)
        variance = float(terms.var()) if m > 1 else float(pooled_variance or 0.0)
        log_z_high = float(terms.mean())
        high_stderr = math.sqrt(stderr**2 + variance / m)
    low, high = (log_mean - elbo.value, log_z_high - elbo.value) if possible else (math.inf, math.inf)
    ess = float((w.sum().square() / w.square().sum()).nan_to_num(nan=0.0))
    return Bounds(elbo, log_mean, log_z_high, low, stderr, high, high_stderr, ess, m)


def upper_terms(log_w: Float[Tensor, " N"], log_w_exact: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """log of the mean weight of one exact sample and N - 1 draws of q; each bounds log Z from above in expectation."""
    n = len(log_w)
    others = log_w.logsumexp(0) + math.log((n - 1) / n)
    return torch.logaddexp(log_w_exact, others) - math.log(n)


def mean_stderr(values: Float[Tensor, " N"]) -> float:
    """Standard error of a mean; 0 where the mean is -inf, which no further draw can change."""
    return float(values.std()) / math.sqrt(len(values)) if values.isfinite().all() else 0.0


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

    @property
    def mean_lower(self) -> Estimate:
        """Of the mean over prompts."""
        return _mean(self.lower)

    @property
    def mean_upper(self) -> Estimate | None:
        """Of the mean over prompts; None unless every prompt has an upper bound."""
        found = [estimate for estimate in self.upper if estimate is not None]
        return _mean(found) if len(found) == len(self.upper) else None


def log_z_bounds(
    target: Target,
    prompts: Prompts,
    engine: SMC,
    exact: Scored | None,
    rng: Generator,
    *,
    proposal: Sampler | None = None,
) -> LogZBounds:
    """Bidirectional SMC: `engine.repeats` free runs a prompt (at least 2), and a conditional run for each of as many exact samples.

    Without a twist there is no resampling, and these are the two sides of IWAE (Burda et al. 2016; Sobolev & Vetrov 2019).

    Args:
        exact: exact posterior samples of `prompts`, from rejection or enumeration; None if there are none. With anything else
            in their place the upper bound is not one.
        proposal: what the engine draws from; the prior by default.
    """
    runs = max(RUNS, engine.repeats)
    free = engine.log_z_runs(target, prompts, runs, proposal=proposal, rng=rng)
    lower = tuple(
        Estimate(float(row.mean()), mean_stderr(row), runs * engine.particles, "lower") for row in free.double()
    )
    if exact is None or not len(exact):
        return LogZBounds(lower, (None,) * len(prompts))
    some = at_most(exact, runs, rng).draws
    given = engine.log_z_given(target, some, proposal=proposal, rng=rng).double()
    groups = [given[some.prompt_index == p] for p in range(len(prompts))]
    spreads = [float(group.var()) for group in groups if len(group) > 1]
    pooled = sum(spreads) / len(spreads) if spreads else None
    return LogZBounds(lower, tuple(_upper(group, pooled, engine.particles) for group in groups))


def with_log_z(bounds: Bounds, lower: Estimate, upper: Estimate | None) -> Bounds:
    """The same draws with an engine's bounds of log Z in place of their own; the errors are independent of the ELBO's."""
    possible = math.isfinite(bounds.elbo.value)
    elbo, elbo_stderr = (bounds.elbo.value, bounds.elbo.stderr) if possible else (-math.inf, 0.0)
    return replace(
        bounds,
        log_z_low=lower.value,
        low=lower.value - elbo,
        low_stderr=math.hypot(lower.stderr, elbo_stderr),
        log_z_high=math.inf if upper is None else upper.value,
        high=math.inf if upper is None else upper.value - elbo,
        high_stderr=math.nan if upper is None else math.hypot(upper.stderr, elbo_stderr),
    )


def _upper(log_z: Float[Tensor, " M"], pooled: float | None, particles: int) -> Estimate | None:
    m = len(log_z)
    if m == 0 or (m == 1 and pooled is None):
        return None
    stderr = mean_stderr(log_z) if m > 1 else math.sqrt(pooled or 0.0)
    return Estimate(float(log_z.mean()), stderr, m * particles, "upper")


def _mean(estimates: tuple[Estimate, ...] | list[Estimate]) -> Estimate:
    """Of independent estimates, one a prompt."""
    count = len(estimates)
    stderr = math.sqrt(sum(e.stderr**2 for e in estimates)) / count
    value = sum(e.value for e in estimates) / count
    return Estimate(value, stderr, sum(e.n for e in estimates), estimates[0].kind)
