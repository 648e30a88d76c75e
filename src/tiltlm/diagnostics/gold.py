"""What the prior's draws say of a held-out reward along the frontier of the one that would be trained on.

The optimum at temperature beta is a tilt of the prior, so the same weights that predict its reward predict the mean of anything
else: E_{p*_beta} g = E_pi0[w g] / E_pi0[w], w = exp(r / beta). With lambda = 1 / beta its derivative is the covariance of g and r
under p*_beta, so gold peaks where the two stop being correlated. That is over-optimisation (Gao et al. 2023) seen before
anything is trained, as far as the draws reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.diagnostics.predictions import FrontierPoint, over_prompts
from tiltlm.diagnostics.tilt import best_of_n_kl, best_of_n_mean, best_of_n_shares, tilt_mean
from tiltlm.errors import InputError
from tiltlm.estimates import Interval
from tiltlm.records import Scored


@dataclass(frozen=True)
class GoldPoint:
    """The held-out reward of the optimum at one beta, averaged over prompts.

    Attributes:
        gold: E g under p*_beta, with an interval for prompts like these.
        slope: its derivative in 1 / beta, Cov(g, r) under p*_beta: negative where a further tilt costs gold.
        proxy, kl, ess, reliable: the frontier's own; gold rests on the same weights, so it is trusted where they are.
    """

    beta: float
    gold: Interval
    slope: Interval
    proxy: Interval
    kl: Interval
    ess: float
    reliable: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        intervals = {name: getattr(self, name).as_dict() for name in ("gold", "slope", "proxy", "kl")}
        return {"beta": self.beta, **intervals, "ess": self.ess, "reliable": self.reliable}


@dataclass(frozen=True)
class GoldBestOfN:
    """The held-out reward of best-of-n by the trained one, averaged over prompts; from all subsets of n of the prior's draws.

    Attributes:
        gold: E g under best-of-n, unbiased, with an interval for prompts like these.
        proxy: E r, unbiased.
        kl: KL to the prior in nats, ties taken into account; by the law on each prompt's draws (`best_of_n_kl`).
    """

    n: int
    gold: Interval
    proxy: float
    kl: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"n": self.n, "gold": self.gold.as_dict(), "proxy": self.proxy, "kl": self.kl}


@dataclass(frozen=True)
class GoldFrontier:
    """Proxy against gold along the frontier.

    Attributes:
        name: of the held-out reward.
        prior: E g under the prior.
        points: from the largest beta to the smallest, as the plan's frontier.
        peak: the beta at which predicted gold peaks among the points that can be trusted. Its 95% interval holds every beta
            around it whose slope may be 0; low is 0 where nothing bounds it from below. None where no peak can be told.
        best: the point nearest to the peak; without one, the trusted point of the largest predicted gold.
        sentence: what this means, in one line.
        best_of_n: what best-of-n would make of gold, in the place of the optimum.
    """

    name: str
    prior: Interval
    points: tuple[GoldPoint, ...]
    peak: Interval | None
    best: GoldPoint | None
    sentence: str
    best_of_n: tuple[GoldBestOfN, ...] = ()

    def __str__(self) -> str:
        rows = [f"{'beta':>8}  {'E r, trained on':>22}  {'E gold, held out':>22}  {'KL(p*||pi0)':>11}  {'ESS':>6}"]
        for point in self.points[::3]:
            mark = "" if point.reliable else " ?"
            rows.append(
                f"{point.beta:8.3g}  {point.proxy!s:>22}  {point.gold!s:>22}  {point.kl.value:11.3f}  {point.ess:6.1f}{mark}"
            )
        return "\n".join([f"gold {self.name}: E under the prior {self.prior}", *rows, self.sentence])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "prior": self.prior.as_dict(),
            "points": [point.as_dict() for point in self.points],
            "peak_beta": self.peak.as_dict() if self.peak else None,
            "best": self.best.as_dict() if self.best else None,
            "sentence": self.sentence,
            "best_of_n": [point.as_dict() for point in self.best_of_n],
        }


def gold_frontier(
    scored: Scored,
    beta: float,
    gold: Float[Tensor, " B"],
    frontier: Sequence[FrontierPoint],
    name: str,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> GoldFrontier:
    """Predict the held-out reward at the frontier's temperatures.

    Args:
        scored: prior draws, scored at `beta`.
        gold: the held-out reward of each of them.
        frontier: the plan's points, from the largest beta to the smallest.
        bounds: smallest and largest gold, where that is known.

    Raises:
        InputError: if no prompt has two draws that can be judged.
    """
    index, reward = scored.draws.prompt_index, beta * scored.log_evidence.double()
    rows = [index == p for p in index.unique().tolist()]
    rows = [row for row in rows if int((reward[row] > -torch.inf).sum()) >= 2]
    if not rows:
        raise InputError(
            f"gold {name!r} judged fewer than two possible draws of every prompt; draw more samples, or mend it"
        )
    betas = torch.tensor([point.beta for point in frontier], dtype=torch.float64)
    tilted = [tilt_mean(reward[row], gold[row], betas) for row in rows]
    fewest = min(int(row.sum()) for row in rows)

    points = tuple(
        GoldPoint(
            p.beta,
            over_prompts([(float(t.mean[i]), float(t.mean_stderr[i])) for t in tilted], fewest, bounds),
            over_prompts([(float(t.slope[i]), float(t.slope_stderr[i])) for t in tilted], fewest),
            p.reward,
            p.kl,
            p.ess,
            p.reliable,
        )
        for i, p in enumerate(frontier)
    )
    own = [(float(gold[row].mean()), float(gold[row].std()) / math.sqrt(int(row.sum()))) for row in rows]
    prior = over_prompts(own, fewest)
    peak, best, sentence = _peak(points, prior)
    powers = [2**i for i in range(1, 12) if 2**i <= fewest // 2]
    best_of = tuple(_best_of_n([(reward[row], gold[row]) for row in rows], n) for n in powers)
    return GoldFrontier(name, prior, points, peak, best, sentence, best_of)


def _best_of_n(prompts: Sequence[tuple[Tensor, Tensor]], n: int) -> GoldBestOfN:
    """Best-of-n of each prompt's draws, given as rewards and gold."""
    shares = [best_of_n_shares(reward, n) for reward, _ in prompts]
    kl = [best_of_n_kl(reward, n) for reward, _ in prompts]
    proxy = [float(torch.where(s > 0, s * r, 0.0).sum()) for s, (r, _) in zip(shares, prompts, strict=True)]
    # A single prompt's error rests on the few draws that have the shares: its degrees of freedom are theirs, not N - 1.
    effective = round(min(1 / float(s.square().sum()) for s in shares))
    gold = over_prompts([best_of_n_mean(reward, values, n) for reward, values in prompts], effective)
    return GoldBestOfN(n, gold, math.fsum(proxy) / len(proxy), math.fsum(kl) / len(kl))


def _peak(points: Sequence[GoldPoint], prior: Interval) -> tuple[Interval | None, GoldPoint | None, str]:
    """Where the slope crosses zero downwards, among the points before the first that cannot be trusted."""
    trusted = list(points)[: next((i for i, p in enumerate(points) if not p.reliable), len(points))]
    if not trusted:
        return None, None, "gold: these draws cannot say how it goes with beta; draw more samples."
    top = max(range(len(trusted)), key=lambda i: trusted[i].gold.value)
    best, last = trusted[top], trusted[-1]
    if all(p.slope.low <= 0 <= p.slope.high for p in trusted):
        return None, best, "gold: no change along the frontier can be told from noise; draw more samples or prompts."
    falling = [i for i, p in enumerate(trusted) if p.slope.high < 0 and (i > top or top == 0)]
    if not falling:
        return (
            None,
            best,
            (
                f"gold: no peak within the range seen can be told from noise; best at beta = {best.beta:.2g} (E gold {best.gold}), and a "
                f"peak below beta = {last.beta:.2g} is possible."
            ),
        )
    if top == 0 and prior.value >= best.gold.value:
        text = (
            f"gold: best under the prior itself ({prior.value:.3g}); it surely falls below beta = {trusted[falling[0]].beta:.2g}, to "
            f"{last.gold.value:.3g} at beta = {last.beta:.2g}: training on this reward costs it."
        )
        return None, None, text
    beta = _crossing(trusted, top)
    low = trusted[falling[0]].beta
    rising = [p.beta for p in trusted[: top + 1] if p.slope.low > 0]
    peak = Interval(beta, low, min(rising) if rising else math.inf)
    return (
        peak,
        best,
        (
            f"gold: peaks at beta = {beta:.2g} [{peak.low:.2g}, {peak.high:.2g}] ({best.kl.value:.2f} nats, E gold {best.gold}); a "
            f"smaller beta raises the trained reward at its cost."
        ),
    )


def _crossing(points: Sequence[GoldPoint], top: int) -> float:
    """The beta near `top` at which the slope is zero, linear in log beta."""
    for left, right in ((top, top + 1), (top - 1, top)):
        if left >= 0 and right < len(points) and points[left].slope.value > 0 >= points[right].slope.value:
            up, down = points[left].slope.value, points[right].slope.value
            share = up / (up - down)
            return math.exp((1 - share) * math.log(points[left].beta) + share * math.log(points[right].beta))
    return points[top].beta
