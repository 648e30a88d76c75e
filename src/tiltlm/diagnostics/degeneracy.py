"""Is the sampler still alive? Diversity, length, truncation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.estimates import Z95, Interval
from tiltlm.records import Draws
from tiltlm.weights import group_mean


@dataclass(frozen=True)
class Diversity:
    """Signs of collapse in a batch of draws.

    Attributes:
        entropy: mean -log q of a completion, in nats (an unbiased estimate of the entropy).
        distinct_1, distinct_2: distinct token 1-grams and 2-grams over all, per prompt, averaged (Li et al. 2016).
        unique: fraction of a prompt's completions that are different texts, averaged.
        length: mean tokens.
        truncated: fraction cut at `max_new_tokens`.
    """

    entropy: float
    distinct_1: float
    distinct_2: float
    unique: float
    length: float
    truncated: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def diversity(draws: Draws) -> Diversity:
    """Diversity of draws, within prompts and then averaged over them."""
    groups: dict[int, list[tuple[int, ...]]] = {}
    for prompt, ids, keep in zip(draws.prompt_index.tolist(), draws.tokens, draws.mask, strict=True):
        groups.setdefault(prompt, []).append(tuple(ids[keep].tolist()))
    shares = [(_distinct(rows, 1), _distinct(rows, 2), len(set(rows)) / len(rows)) for rows in groups.values()]
    distinct_1, distinct_2, unique = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    surprisal = group_mean(-draws.log_prob.double(), draws.prompt_index, len(draws.prompts))
    return Diversity(
        entropy=float(surprisal.nanmean()),
        distinct_1=distinct_1,
        distinct_2=distinct_2,
        unique=unique,
        length=float(draws.lengths.double().mean()),
        truncated=float((~draws.ended).double().mean()),
    )


def cut_short(draws: Draws) -> list[str]:
    """What to know of draws most of which have no end: one sentence, or none."""
    cut = float((~draws.ended).double().mean()) if len(draws) else 0.0
    if cut <= 0.5:
        return []
    return [
        f"{cut:.0%} of the completions were cut at max_new_tokens = {int(draws.lengths.max())}; that is part of the target, so raise "
        f"max_new_tokens if your reward judges whole texts."
    ]


def _distinct(rows: list[tuple[int, ...]], n: int) -> float:
    grams = [row[i : i + n] for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def length_correlation(lengths: Int[Tensor, " B"], reward: Float[Tensor, " B"], index: Int[Tensor, " B"]) -> Interval:
    """Pearson's correlation of reward and length within prompts, with a 95% interval by Fisher's z.

    A reward that pays for length is the commonest hack (Singhal et al. 2023, "A long way to go"). Both are centred prompt by prompt,
    so that prompts with long answers and high rewards do not count for it. NaN where either is constant.
    """
    possible = reward.isfinite()
    x, y, group = lengths[possible].double(), reward[possible].double(), index[possible]
    if len(x) == 0:
        return Interval(math.nan, -1.0, 1.0)
    count = int(group.max()) + 1
    x, y = x - group_mean(x, group, count)[group], y - group_mean(y, group, count)[group]
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    freedom = len(x) - len(group.unique()) - 2
    if scale < 1e-12 or freedom < 1:
        return Interval(math.nan, -1.0, 1.0)
    r = max(-1.0, min(1.0, float(x @ y) / scale))
    if abs(r) > 1 - 1e-12:
        return Interval(r, r, r)
    half = Z95 / math.sqrt(freedom)
    return Interval(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))
