"""`plan`: what KL-penalised RL can achieve at every beta, from prior samples alone.

The optimum of RL at temperature beta is p*_beta, and p*_beta is a tilt of the prior, so one set of prior draws
predicts the reward and the KL of every beta's optimum before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from tiltlm.diagnostics.degeneracy import cut_short
from tiltlm.diagnostics.gold import GoldFrontier, gold_frontier
from tiltlm.diagnostics.predictions import BestOfNPoint, FrontierPoint, PromptPlan, clipped, over_prompts, own_interval
from tiltlm.diagnostics.tilt import Tilted, best_of_n_kl, best_of_n_shares, tilt, tilt_jackknife
from tiltlm.errors import InputError
from tiltlm.estimates import Estimate, Interval
from tiltlm.evidence.gold import Gold, as_gold, gold_name, gold_values
from tiltlm.records import Prompts, Scored, shown
from tiltlm.target import Target
from tiltlm.weights import pareto_k

MARGIN = 4.0
"""A tilt is trusted while n >= MARGIN * exp(KL): below that a few draws carry all the weight (Chatterjee & Diaconis 2018)."""
SHARE = 0.9
"""... for at least this share of the prompts."""
GRID = 32
MOST = 1_000_000
"""Nobody draws more samples a prompt; a larger need is shown as this one."""


@dataclass(frozen=True)
class Plan:
    """What the prior's draws say of the target at every beta.

    Attributes:
        prior_reward: E r under the prior.
        frontier: predicted optima, from the largest beta to the smallest.
        chosen: the point at the beta that was asked for, by number, KL budget or reward goal.
        per_prompt: the prediction for each prompt at the chosen beta.
        notes: plain sentences on what the draws cannot tell, and what to look at.
        scored: the prior draws, scored at `beta`.
        gold: what the same draws say of a held-out reward along the frontier, if one was given.
    """

    prior_reward: Interval
    frontier: tuple[FrontierPoint, ...]
    best_of_n: tuple[BestOfNPoint, ...]
    chosen: FrontierPoint | None
    per_prompt: tuple[PromptPlan, ...]
    notes: tuple[str, ...]
    samples: int
    scored: Scored
    beta: float
    gold: GoldFrontier | None = None

    def at(self, beta: float) -> FrontierPoint:
        """The prediction at one beta."""
        return PriorSample.of(self.scored, self.beta).point(beta)

    def __str__(self) -> str:
        rows = [f"{'beta':>8}  {'E r':>22}  {'KL(p*||pi0)':>22}  {'ESS':>6}  {'draws needed':>12}"]
        for point in self.frontier[::3]:
            mark = " " if point.reliable else "?"
            rows.append(
                f"{point.beta:8.3g}  {point.reward!s:>22}  {point.kl!s:>22}  {point.ess:6.1f}  {point.needed:12d} {mark}"
            )
        head = f"prior: E r = {self.prior_reward}, {self.samples} draws a prompt"
        chosen = (
            [f"chosen beta {self.chosen.beta:.3g}: E r {self.chosen.reward}, KL {self.chosen.kl}"]
            if self.chosen
            else []
        )
        gold = [str(self.gold)] if self.gold else []
        return "\n".join([head, *rows, *chosen, *self.notes, *gold])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "prior_reward": self.prior_reward.as_dict(),
            "samples_per_prompt": self.samples,
            "frontier": [point.as_dict() for point in self.frontier],
            "best_of_n": [point.as_dict() for point in self.best_of_n],
            "chosen": self.chosen.as_dict() if self.chosen else None,
            "per_prompt": [prompt.as_dict() for prompt in self.per_prompt],
            "notes": list(self.notes),
            **({"gold": self.gold.as_dict()} if self.gold else {}),
        }


@dataclass(frozen=True)
class PriorSample:
    """Prior rewards by prompt, and what their tilts predict.

    Attributes:
        rewards: of the prompts whose draws tell something: with hard constraints, those with at least two draws inside.
        left_out: the number of the others.
        bounds: smallest and largest reward that there can be, where the evidence knows; no prediction is beyond them.
    """

    rewards: tuple[Float[Tensor, " n"], ...]
    names: tuple[str, ...]
    left_out: int = 0
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @classmethod
    def of(cls, scored: Scored, beta: float, log_bounds: tuple[float, float] | None = None) -> PriorSample:
        """Of draws scored at `beta`; `log_bounds` are the evidence's, at the same temperature."""
        index, reward = scored.draws.prompt_index, beta * scored.log_evidence.double()
        texts = scored.draws.prompts.texts
        drawn = [p for p in range(len(texts)) if (index == p).any()]
        used = [p for p in drawn if enough_possible(reward[index == p])]
        names = [shown(t) for t in texts]
        rewards = tuple(reward[index == p] for p in used)
        return cls(rewards, tuple(names[p] for p in used), len(drawn) - len(used), bounds_at(beta, log_bounds))

    @property
    def spread(self) -> float:
        """Mean over prompts of the standard deviation of the possible rewards."""
        return max(float(torch.stack([r[r.isfinite()].std() for r in self.rewards]).mean()), 1e-6)

    @property
    def n(self) -> int:
        return min(len(r) for r in self.rewards)

    def tilts(self, betas: Float[Tensor, " G"]) -> Tilted:
        """Plain estimates of every prompt, (P, G)."""
        parts = [tilt(r, betas) for r in self.rewards]
        return Tilted(*(torch.stack([getattr(p, name) for p in parts]) for name in ("reward", "kl", "log_z", "ess")))

    def unbiased(self, betas: Float[Tensor, " G"], field: Literal["reward", "kl"]) -> Float[Tensor, "P G"]:
        """Jackknifed estimates of every prompt."""
        return torch.stack([getattr(tilt_jackknife(r, betas), field) for r in self.rewards])

    def point(self, beta: float) -> FrontierPoint:
        """The prediction at one beta."""
        return self.points(torch.tensor([beta], dtype=torch.float64))[0]

    def points(self, betas: Float[Tensor, " G"]) -> list[FrontierPoint]:
        """The prediction at each beta."""
        plain, count = self.tilts(betas), len(self.rewards)
        jackknifed = [tilt_jackknife(r, betas) for r in self.rewards]
        points = []
        for g, beta in enumerate(betas.tolist()):
            hard = float(plain.kl[:, g].quantile(SHARE))
            ks = [pareto_k(r / beta) for r in self.rewards]
            log_z = plain.log_z[:, g]
            spread = float(log_z.std() / math.sqrt(count)) if count > 1 else math.nan
            points.append(
                FrontierPoint(
                    beta=beta,
                    reward=over_prompts(
                        [(float(j.reward[g]), float(j.reward_stderr[g])) for j in jackknifed], self.n, self.bounds
                    ),
                    kl=clipped(
                        over_prompts([(float(j.kl[g]), float(j.kl_stderr[g])) for j in jackknifed], self.n), 0.0
                    ),
                    log_z=Estimate(float(log_z.mean()), spread, self.n * count, "lower"),
                    ess=float(plain.ess[:, g].mean()),
                    pareto_k=float(torch.tensor(ks).nanmedian()),
                    needed=math.ceil(MARGIN * math.exp(hard)),
                    reliable=MARGIN * math.exp(hard) <= self.n,
                )
            )
        return points


def bounds_at(beta: float, log_bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Smallest and largest reward that evidence at a temperature can have; infinite where it does not know."""
    return (-math.inf, math.inf) if log_bounds is None else (beta * log_bounds[0], beta * log_bounds[1])


def enough_possible(reward: Float[Tensor, " n"]) -> bool:
    """Whether the rewards that are not -inf suffice for a prediction: two, so that each can be left out in turn."""
    return int((reward > -torch.inf).sum()) >= 2


def best_of_n(reward: Float[Tensor, " N"], n: int) -> tuple[float, float]:
    """Mean reward, unbiased, and KL to the prior of best-of-n, from one prompt's rewards; -inf where n of these are impossible.

    Raises:
        InputError: if there are fewer than n.
    """
    shares = best_of_n_shares(reward, n)
    return float(torch.where(shares > 0, shares * reward, 0.0).sum()), best_of_n_kl(reward, n)


def plan(
    target: Target,
    prompts: Prompts | Sequence[Any],
    *,
    samples: int = 64,
    beta: float | None = None,
    kl_budget: float | None = None,
    reward_goal: float | None = None,
    scored: Scored | None = None,
    gold: Gold | None = None,
    seed: int = 0,
) -> Plan:
    """Predict the reward-KL frontier over beta from prior samples.

    Args:
        samples: prior draws a prompt, at least 2.
        beta, kl_budget, reward_goal: choose a point by its temperature, by the nats a prompt that the policy may move, or by
            the mean reward it should reach. At most one; without any it is the target's beta.
        scored: prior draws that are there already; nothing is drawn then.
        gold: a held-out reward, evidence or function, to be predicted along the frontier of the target's own.

    Raises:
        InputError: if the budget or goal is out of reach, with the range that can be reached; or if there are fewer than two
            draws a prompt.
    """
    if sum(choice is not None for choice in (beta, kl_budget, reward_goal)) > 1:
        raise InputError("beta, kl_budget and reward_goal are three ways to choose the same thing; give one of them")
    if scored is None and samples < 2:
        raise InputError(
            f"samples is {samples}; a prediction leaves out each draw of a prompt in turn, so draw at least 2"
        )
    if scored is None:
        encoded = target.prior.encode(prompts)
        scored = target.score(target.prior.draw(encoded, samples, Generator().manual_seed(seed)))
    if not len(scored):
        raise InputError("no completion has a reward: all were dropped; look at the reward function")
    sample = PriorSample.of(scored, target.beta, target.evidence.log_bounds)
    if not sample.rewards:
        raise InputError(
            f"samples: of {len(scored)} prior draws {int((scored.log_evidence > -torch.inf).sum())} satisfy the hard constraints, "
            f"for no prompt two of them; draw more samples, or soften the constraint, Constraint(fn, penalty=...)"
        )
    notes = _warnings(scored, sample)
    frontier = sample.points(_grid(sample, target.beta if beta is None else beta))
    if kl_budget is not None:
        beta = _solve(sample, kl_budget, "kl", "kl_budget", "nats")
    elif reward_goal is not None:
        beta = _solve(sample, reward_goal, "reward", "reward_goal", "reward")
    chosen, *frontier = _with_needs(sample, [sample.point(target.beta if beta is None else beta), *frontier])
    means = [(float(r.mean()), float(r.std()) / math.sqrt(len(r))) for r in sample.rewards]
    prior = over_prompts(means, sample.n)
    powers = [2**i for i in range(1, 12) if 2**i <= sample.n // 2]
    return Plan(
        prior_reward=prior,
        frontier=tuple(frontier),
        best_of_n=tuple(_best_of_n_point(sample, n) for n in powers),
        chosen=chosen,
        per_prompt=tuple(_prompt_plan(sample, p, chosen.beta) for p in range(len(sample.rewards))),
        notes=(*notes, *_limits(sample, frontier, chosen)),
        samples=sample.n,
        scored=scored,
        beta=target.beta,
        gold=_gold(scored, target.beta, gold, frontier) if gold is not None else None,
    )


def _gold(scored: Scored, beta: float, gold: Gold, frontier: Sequence[FrontierPoint]) -> GoldFrontier:
    held_out = as_gold(gold)
    values, judged = gold_values(held_out, scored.draws)
    bounds = bounds_at(held_out.beta, held_out.log_bounds)
    return gold_frontier(scored.select(judged), beta, values[judged], frontier, gold_name(held_out), bounds)


def _grid(sample: PriorSample, beta: float) -> Float[Tensor, " G"]:
    """Temperatures from hardly any tilt to hardly any draw left, even in log beta; `beta` is inside."""
    spread = sample.spread
    low, high = min(spread / 6, beta / 2), max(spread * 10, beta * 2)
    return torch.logspace(math.log10(high), math.log10(low), GRID, dtype=torch.float64)


def _solve(sample: PriorSample, goal: float, field: Literal["reward", "kl"], name: str, unit: str) -> float:
    """The largest beta at which the mean over prompts of `field` is `goal`.

    It falls as beta grows. But the jackknife's correction need not, where a single draw has all the weight.
    """
    spread = sample.spread
    betas = torch.logspace(math.log10(spread * 1e3), math.log10(spread / 30), 400, dtype=torch.float64)
    values = sample.unbiased(betas, field).mean(0)
    if field == "reward":
        values = values.clamp(*sample.bounds)
    low, high = float(values[0]), float(values.max())
    if not low <= goal <= high:
        raise InputError(
            f"{name} is {goal:g}, but with these draws the frontier goes from {low:.3g} to {high:.3g} {unit}; choose a value in "
            f"between, or draw more samples"
        )
    return float(betas[int((values >= goal).nonzero()[0])])


def _best_of_n_point(sample: PriorSample, n: int) -> BestOfNPoint:
    pairs = [best_of_n(r, n) for r in sample.rewards]
    reward, kl = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return BestOfNPoint(n, reward, kl, math.log(n) - (n - 1) / n)


def _prompt_plan(sample: PriorSample, prompt: int, beta: float) -> PromptPlan:
    reward = sample.rewards[prompt]
    at = torch.tensor([beta], dtype=torch.float64)
    mean, plain = tilt_jackknife(reward, at), tilt(reward, at)
    n = len(reward)
    relative = float(n / plain.ess[0] - 1)
    return PromptPlan(
        prompt=sample.names[prompt],
        n=n,
        prior_reward=float(reward.mean()),
        reward=over_prompts([(float(mean.reward), float(mean.reward_stderr))], n, sample.bounds),
        kl=clipped(own_interval(float(mean.kl), float(mean.kl_stderr), n), 0.0),
        log_z=Estimate(float(plain.log_z[0]), math.sqrt(max(0.0, relative) / n), n, "lower"),
        ess=float(plain.ess[0]),
        pareto_k=pareto_k(reward / beta),
        reliable=MARGIN * math.exp(float(plain.kl[0])) <= n,
    )


def _warnings(scored: Scored, sample: PriorSample) -> list[str]:
    notes = []
    draws = scored.draws
    outside = float((scored.log_evidence == -torch.inf).double().mean())
    if outside:
        notes.append(
            f"{outside:.1%} of the prior's draws violate a hard constraint: E r of the prior is -inf, and the frontier is that of "
            f"the draws inside."
        )
    if sample.left_out:
        notes.append(
            f"{sample.left_out} prompts had fewer than two draws inside and are left out of all this; draw more samples."
        )
    notes += cut_short(draws)
    if all(float(r.std()) == 0 for r in sample.rewards):
        notes.append(
            f"Every completion of a prompt got the same reward in {sample.n} draws: there is nothing to learn from these, at any beta."
        )
    texts = {}
    for prompt, text in zip(draws.prompt_index.tolist(), draws.texts, strict=True):
        texts.setdefault(prompt, set()).add(text)
    if all(len(found) == 1 for found in texts.values()) and sample.n > 1:
        notes.append("All completions of every prompt are equal: the prior has collapsed; check temperature and model.")
    if scored.dropped:
        notes.append(f"{scored.dropped} completions had no usable reward and were dropped; the target leaves them out.")
    return notes


def _limits(sample: PriorSample, frontier: Sequence[FrontierPoint], chosen: FrontierPoint | None) -> list[str]:
    """The sentence on what the draws cannot tell."""
    reliable = [point for point in frontier if point.reliable]
    if not reliable:
        return [f"{sample.n} samples a prompt cannot say anything about these betas; draw ~{frontier[0].needed}."]
    notes = []
    last = reliable[-1]
    if last is not frontier[-1]:
        beyond = frontier[min(len(frontier) - 1, frontier.index(last) + 6)]
        wanted = beyond if chosen is None else min(beyond, chosen, key=lambda point: point.beta)
        notes.append(
            f"Below beta = {last.beta:.2g} (beyond {last.kl.value:.2f} nats) {sample.n} samples a prompt cannot say; for beta = "
            f"{wanted.beta:.2g} {f'draw ~{wanted.needed}' if wanted.needed < MOST else f'{MOST} would not do'}."
        )
    if chosen is not None and not chosen.reliable:
        notes.append(f"The chosen beta = {chosen.beta:.3g} is below that: its prediction is a guess.")
    return notes


def _with_needs(sample: PriorSample, points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points with what those need that cannot be trusted, whose own KL is that of the draws there are, and too small."""
    trusted = min((point.beta for point in points if point.reliable), default=None)
    if trusted is None:
        return list(points)
    return [
        point
        if point.reliable
        else replace(point, needed=max(point.needed, _extrapolated_need(sample, trusted, point.beta)))
        for point in points
    ]


def _extrapolated_need(sample: PriorSample, trusted: float, wanted: float) -> int:
    """Draws needed at a smaller beta, continuing the KL from where it can be trusted: dKL/dlambda = lambda Var r."""
    at = torch.tensor([trusted, trusted * 1.05], dtype=torch.float64)
    kl = sample.tilts(at).kl.quantile(SHARE, 0)
    slope = float(kl[0] - kl[1]) / (1 / trusted**2 - 1 / (1.05 * trusted) ** 2)
    grown = float(kl[0]) + slope * (1 / wanted**2 - 1 / trusted**2)
    return _round_up(MARGIN * math.exp(min(grown, math.log(MOST / MARGIN))))


def _round_up(number: float) -> int:
    """Two significant digits, upwards."""
    digit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / digit) * digit
