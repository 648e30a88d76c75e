"""Arithmetic of log-weights: normalising, effective sample size, Pareto-k, resampling.

Everything works per prompt on rows that may be ragged, through `prompt_index`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tiltlm.estimates import Estimate
from tiltlm.records import Weighted


def group_sum(values: Float[Tensor, " B"], index: Int[Tensor, " B"], groups: int) -> Float[Tensor, " P"]:
    """Sum of the rows of each prompt."""
    return torch.zeros(groups, dtype=values.dtype).index_add_(0, index, values)


def group_count(index: Int[Tensor, " B"], groups: int) -> Int[Tensor, " P"]:
    """Rows of each prompt."""
    return torch.bincount(index, minlength=groups)


def group_mean(values: Float[Tensor, " B"], index: Int[Tensor, " B"], groups: int) -> Float[Tensor, " P"]:
    """Mean of the rows of each prompt; NaN for a prompt without rows."""
    return group_sum(values, index, groups) / group_count(index, groups)


def group_logsumexp(values: Float[Tensor, " B"], index: Int[Tensor, " B"], groups: int) -> Float[Tensor, " P"]:
    """log sum exp of the rows of each prompt; -inf for a prompt without rows."""
    peak = torch.full((groups,), -torch.inf, dtype=values.dtype)
    peak = peak.scatter_reduce(0, index, values, "amax")
    shift = torch.where(peak.isfinite(), peak, 0.0)
    return group_sum((values - shift[index]).exp(), index, groups).log() + shift


def leave_one_out(values: Float[Tensor, " B"], index: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Each value minus the mean of the other rows of its prompt (Kool et al. 2019).

    A row alone with its prompt has no baseline and keeps its value, which is still unbiased.
    """
    groups = int(index.max()) + 1 if len(index) else 0
    count = group_count(index, groups)[index]
    others = group_sum(values, index, groups)[index] - values
    return values - others / (count - 1).clamp(min=1)


def normalise(log_w: Float[Tensor, " B"], index: Int[Tensor, " B"], groups: int) -> Float[Tensor, " B"]:
    """Weights that sum to one within each prompt; zero where a prompt's weights all vanish."""
    total = group_logsumexp(log_w, index, groups)[index]
    return torch.where(total > -torch.inf, (log_w - total).exp(), 0.0)


def ess(log_w: Float[Tensor, " B"], index: Int[Tensor, " B"], groups: int) -> Float[Tensor, " P"]:
    """Kish's effective sample size (sum w)^2 / sum w^2 of each prompt; 0 where all of a prompt's weights vanish."""
    total, squares = group_logsumexp(log_w, index, groups), group_logsumexp(2 * log_w, index, groups)
    return torch.where(squares > -torch.inf, 2 * total - squares, -torch.inf).exp()


def resample(
    log_w: Float[Tensor, " B"], index: Int[Tensor, " B"], groups: int, n: int, rng: Generator
) -> Int[Tensor, "P n"]:
    """Draw `n` rows of each prompt in proportion to exp(log_w); -1 where a prompt has no weight."""
    chosen = torch.full((groups, n), -1)
    weights = normalise(log_w.double(), index, groups)
    for prompt in range(groups):
        rows = (index == prompt).nonzero().flatten()
        if len(rows) and weights[rows].sum() > 0:
            chosen[prompt] = rows[torch.multinomial(weights[rows], n, replacement=True, generator=rng)]
    return chosen


# --- resampling within a population: (weights, uniform numbers) -> each slot's ancestor ---
#
# Functions of their uniform numbers, so that a test can integrate over these. Weights sum to one in each row; slot j's
# expected number of copies is N w_j in each scheme (Douc, Cappe & Moulines 2005).


def multinomial(weights: Float[Tensor, "P N"], uniform: Float[Tensor, "P N"]) -> Int[Tensor, "P N"]:
    """Independent ancestors (Gordon et al. 1993)."""
    return _inverse(weights, uniform)


def stratified(weights: Float[Tensor, "P N"], uniform: Float[Tensor, "P N"]) -> Int[Tensor, "P N"]:
    """One ancestor from each N-th of the distribution function (Kitagawa 1996)."""
    n = weights.shape[-1]
    return _inverse(weights, (torch.arange(n) + uniform) / n)


def systematic(weights: Float[Tensor, "P N"], uniform: Float[Tensor, "P N"]) -> Int[Tensor, "P N"]:
    """Stratified, with the same uniform number in each stratum: the first of each row (Carpenter et al. 1999)."""
    return stratified(weights, uniform[:, :1].expand_as(uniform))


def residual(weights: Float[Tensor, "P N"], uniform: Float[Tensor, "P N"]) -> Int[Tensor, "P N"]:
    """floor(N w) copies for certain, the rest multinomial from what is left (Liu & Chen 1998)."""
    n = weights.shape[-1]
    certain = (n * weights).floor()
    copies = certain.cumsum(-1)
    slot = torch.arange(n, dtype=weights.dtype).expand_as(weights).contiguous()
    kept = torch.searchsorted(copies, slot, right=True).clamp(max=n - 1)
    return torch.where(slot < copies[:, -1:], kept, _inverse(n * weights - certain, uniform))


def _inverse(weights: Float[Tensor, "P N"], points: Float[Tensor, "P M"]) -> Int[Tensor, "P M"]:
    """Where each point of [0, 1) falls in the distribution function of weights that need not be normalised."""
    cumulative = weights.cumsum(-1)
    scaled = points * cumulative[:, -1:]
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)  # rounding must not reach a slot without weight
    return torch.minimum(torch.searchsorted(cumulative, scaled.contiguous(), right=True), last)


def best_of_subsets(count: int, n: int) -> Float[Tensor, " count"]:
    """The share of the subsets of `n` among `count` draws whose best is the draw with k worse ones, k = 0, 1, …, count - 1.

    C(k, n - 1) / C(count, n), without replacement: values weighed by it are a U-statistic (Hoeffding 1948), the mean over all
    subsets, and unbiased for the best of n at any count >= n. Zero throughout where n > count.
    """
    if n > count:
        return torch.zeros(count, dtype=torch.float64)
    size = torch.arange(count, 0, -1, dtype=torch.float64)
    # The share within the m worst is C(m, n) / C(count, n): its ratios are (m - n) / m, and the m-th worst has n / m of it.
    within = torch.cat([torch.ones(1, dtype=torch.float64), ((size - n) / size).clamp(min=0).cumprod(0)])[:count]
    return (within * n / size).flip(0)


TIE = 1e-3
"""Log-weights closer than this are equal: scored again in single precision, a text of 32 tokens is off by 3e-4 (SmolLM2-135M)."""
LEVELS = 5
"""Different weights that a tail's shape is fitted to, at least."""


def pareto_k(log_w: Float[Tensor, " N"]) -> float:
    """Shape of a generalised Pareto fitted to the largest weights (Vehtari et al. 2024, PSIS).

    Below 0.7 an importance-sampling mean from these weights can be trusted; above, its error shrinks so
    slowly that more samples of the same kind do not help. Fitted by Zhang & Stephens (2009) to the largest
    min(N/5, 3 sqrt N) weights, with the weakly informative prior of PSIS.

    Rewards of few values make few weights. Those that tie with the threshold are not above it, and are left out of the fit. NaN
    for fewer than 25 weights, or fewer than five different ones above the threshold: nothing can be said of the tail. -inf where
    the tail is constant: the largest weight was seen often. Neither says that there are draws enough; the ESS does.
    """
    ordered = log_w[log_w > -torch.inf].double().sort().values
    n = len(ordered)
    tail = int(min(n / 5, 3 * math.sqrt(n)))
    if tail < 5:
        return math.nan
    if ordered[-1] <= ordered[-tail] + TIE:
        return -math.inf
    threshold = ordered[-tail - 1]
    above = ordered[ordered > threshold + TIE]
    if _levels(above, LEVELS) < LEVELS:
        return math.nan
    if len(above) < tail:  # as grouped data are: what ties with the threshold reaches half way to the next level
        threshold = (threshold + above[0]) / 2
    excess = ((above - above[-1]).exp() - (threshold - above[-1]).exp()).clamp(min=1e-300)  # e^-745 is 0
    tail = len(excess)
    points = 30 + int(math.sqrt(tail))
    quartile = excess[int(tail / 4 + 0.5) - 1]
    grid = torch.arange(1, points + 1, dtype=torch.float64)
    theta = 1 / excess[-1] + (1 - (points / (grid - 0.5)).sqrt()) / (3 * quartile)
    shape = torch.log1p(-theta[:, None] * excess).mean(-1)
    profile = tail * ((-theta / shape).log() - shape - 1)
    posterior = torch.softmax(profile.nan_to_num(nan=-torch.inf), 0)
    k = torch.log1p(-(posterior * theta).sum() * excess).mean()
    return float((k * tail + 0.5 * 10) / (tail + 10))


def _levels(ordered: Float[Tensor, " N"], most: int) -> int:
    """How many log-weights are different, of an ascending row; counted up to `most`."""
    count = at = 0
    while at < len(ordered) and count < most:
        at = int(torch.searchsorted(ordered, ordered[at] + TIE, right=True))
        count += 1
    return count


def log_mean_weight(
    log_w: Float[Tensor, " B"], index: Int[Tensor, " B"], groups: int, drawn: int | None = None
) -> tuple[Estimate, ...]:
    """log of each prompt's mean weight: by Jensen's inequality a lower bound of log Z in expectation.

    The standard error is the delta method's, sd(w) / (mean(w) sqrt n).

    Args:
        drawn: completions drawn of each prompt, if some have no row here because nobody could judge them: their weight is 0.
    """
    log_w = log_w.double()
    rows = group_count(index, groups)
    count = rows if drawn is None else torch.full_like(rows, drawn)
    value = group_logsumexp(log_w, index, groups) - count.log()
    relative = (group_logsumexp(2 * log_w, index, groups) - count.log() - 2 * value).exp() - 1  # var(w) / mean(w)^2
    stderr = (relative.clamp(min=0) / (count - 1).clamp(min=1)).sqrt()
    stderr = torch.where(count > 1, stderr, torch.nan)
    return tuple(
        Estimate(v, s, n, "lower", max(1, n - 1))
        for v, s, n in zip(value.tolist(), stderr.tolist(), count.tolist(), strict=True)
    )


def weighted_means(weighted: Weighted, values: Float[Tensor, " B"], groups: int) -> tuple[Estimate | None, ...]:
    """Mean of each prompt's rows under their weights; None for a prompt without weight.

    The standard error is the delta method's for a ratio of means, over rows, or over the runs that rows come from; NaN where all
    weight is in one.
    """
    index = weighted.scored.draws.prompt_index
    share = normalise(weighted.log_w.double(), index, groups)
    found: list[Estimate | None] = []
    for prompt in range(groups):
        rows = ((index == prompt) & (share > 0)).nonzero().flatten()
        if not len(rows):
            found.append(None)
            continue
        mean = float(share[rows] @ values[rows].double())
        of = torch.arange(len(rows)) if weighted.run is None else weighted.run[rows].unique(return_inverse=True)[1]
        parts = group_sum(share[rows] * (values[rows].double() - mean), of, int(of.max()) + 1)
        n = len(parts)
        stderr = math.sqrt(float(parts.square().sum()) * n / (n - 1)) if n > 1 else math.nan
        found.append(Estimate(mean, stderr, len(rows), df=max(1, n - 1)))
    return tuple(found)
