"""Rejection sampling: exact posterior samples, where the reward has an upper bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.estimates import Estimate
from tiltlm.protocols import Claim, Sampler
from tiltlm.records import Prompts, Scored, Weighted
from tiltlm.target import Target
from tiltlm.weights import group_count, log_mean_weight


@dataclass(frozen=True)
class Rejection:
    """Draw from the prior, accept with probability exp((r - r_max) / beta) (von Neumann 1951).

    What is accepted is an exact, independent sample of p*, and the acceptance rate is Z exp(-r_max / beta). All
    accepted draws are returned; a prompt may get none within its budget, which the weights then show.

    Where drawing stops at `samples`, it stops because a heavy weight has come, so that the plain mean weight is too large on
    average: by a factor of 2.7 where Z is a tenth of its bound and the first accepted draw ends it. The estimate of log Z allows
    for that (`share_accepted`). It says nothing for `samples=1`: what would be unbiased then leaves the accepted draw out.

    Attributes:
        n: most draws a prompt, the budget.
        samples: stop drawing for a prompt once it has this many accepted; None spends the budget.
        round: draws a prompt between two looks at what has been accepted.
    """

    n: int = 256
    samples: int | None = None
    round: int = 64
    claim = Claim(fixed_point="p*", objective="law", bias="none", source="von Neumann 1951")

    def __post_init__(self) -> None:
        if self.n < 1 or self.round < 1:
            raise InputError(f"n is {self.n} and round is {self.round}; both must be at least 1")
        if self.samples is not None and self.samples < 1:
            raise InputError(f"samples is {self.samples}; it must be at least 1, or None to spend the budget")

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """Accepted draws with weight 1, the others with weight 0; the diagnostics are `acceptance`, the share that was accepted.

        Raises:
            InputError: if the reward has no bounds, or a proposal other than the prior is asked for (log pi0 / q has no
                known bound, so that nothing could be accepted exactly).
        """
        if proposal is not None and proposal is not target.prior:
            raise InputError(
                "rejection is exact only from the prior, whose weights the reward's bounds bound; with a trained "
                "proposal use importance"
            )
        log_accept_bound(target)
        rounds: list[Weighted] = []
        open_prompts = list(range(len(prompts)))
        drawn, before = [0] * len(prompts), [0] * len(prompts)
        while open_prompts and max(drawn) < self.n:
            count = min(self.round, self.n - max(drawn))
            draws = target.prior.draw(prompts.select(open_prompts), count, rng).among(prompts, open_prompts)
            rounds.append(self.weigh(target, target.score(draws), rng))
            for p in open_prompts:
                drawn[p], before[p] = drawn[p] + count, drawn[p]
            if self.samples is not None:
                accepted = accepted_counts(rounds, len(prompts))
                open_prompts = [p for p in open_prompts if accepted[p] < self.samples]
        scored = Scored.concatenate([part.scored for part in rounds])
        log_w = torch.cat([part.log_w for part in rounds])
        rate = accepted_counts(rounds, len(prompts)).double() / torch.tensor(drawn)
        return Weighted(scored, log_w, self._log_z(scored, log_w > -torch.inf, drawn, before), {"acceptance": rate})

    def _log_z(
        self, scored: Scored, accepted: Bool[Tensor, " B"], drawn: list[int], before: list[int]
    ) -> tuple[Estimate, ...] | None:
        """log Z of each prompt from all that was `drawn` for it, of which some came `before` its last round."""
        index = scored.draws.prompt_index
        if self.samples is None:
            return log_mean_weight(scored.log_evidence, index, len(drawn), self.n)
        if self.samples == 1:
            return None
        found: list[Estimate] = []
        for prompt, (count, earlier) in enumerate(zip(drawn, before, strict=True)):
            rows = index == prompt
            many = int(accepted[rows].sum())
            share = share_accepted(count, earlier, many, self.samples)
            # rows count as if the accepted ones were that share of all
            factor = torch.where(accepted[rows], share / max(1, many), (1 - share) / max(1, count - many)) * count
            log_w = scored.log_evidence[rows].double() + factor.log()
            found += log_mean_weight(log_w, torch.zeros_like(index[rows]), 1, count)
        return tuple(found)

    def weigh(self, target: Target, scored: Scored, rng: Generator) -> Weighted:
        """Accept or reject given prior draws; for draws that are there already."""
        log_accept = scored.log_evidence - log_accept_bound(target)
        uniform = torch.rand(len(scored), generator=rng, dtype=torch.float64)
        return Weighted(scored, torch.where(uniform.log() < log_accept, 0.0, -torch.inf))

    def selection(self, target: Target, scored: Scored) -> Float[Tensor, " B"]:
        """Probability that each of the given draws is the first accepted one; the rest to 1 is "none accepted"."""
        return first_accepted((scored.log_evidence - log_accept_bound(target)).exp(), scored.draws.prompt_index)


def first_accepted(accept: Float[Tensor, " B"], index: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Probability that each row is its prompt's first accepted one, the rows accepted independently."""
    chosen = torch.zeros_like(accept)
    for prompt in index.unique():
        rows = (index == prompt).nonzero().flatten()
        before = torch.cat([accept.new_ones(1), (1 - accept[rows]).cumprod(0)[:-1]])
        chosen[rows] = accept[rows] * before
    return chosen


def share_accepted(drawn: int, before: int, accepted: int, enough: int) -> float:
    """Probability that the first draw was an accepted one, given all of the draws but not their order.

    A first draw's weight has expectation Z, whatever ends the drawing. So has its expectation given all of the draws (Blackwell
    1947), which is this share of the accepted draws' mean weight and the rest of the others'. Any order is as likely as any
    other in which fewer than `enough` of the draws `before` the last round were accepted, else there had been no last
    round. With rounds of one draw it is (enough - 1) / (drawn - 1) (Haldane 1945); with a single one accepted / drawn.

    Args:
        drawn: completions drawn; those that nobody could judge count as not accepted.
        enough: accepted draws that end the drawing.
    """
    if not before:
        return accepted / drawn
    count = torch.arange(min(enough, accepted + 1), dtype=torch.float64)  # accepted before the last round
    parts = torch.stack([count, before - count, accepted - count, drawn - before - accepted + count])
    log_law = -torch.lgamma(parts + 1).sum(0)  # hypergeometric; -inf where a part is negative
    return float(log_law.softmax(0) @ count) / before


def log_accept_bound(target: Target) -> float:
    """The largest log-likelihood, which the acceptance probability divides by."""
    if not has_upper_bound(target):
        raise InputError(
            "rejection needs a reward with bounds; declare them, Reward(fn, bounds=(low, high)), or use importance"
        )
    bounds = target.evidence.log_bounds
    assert bounds is not None
    return bounds[1]


def has_upper_bound(target: Target) -> bool:
    """Whether the log-likelihood is known not to exceed a number; the lower bound may be -inf (hard constraints)."""
    bounds = target.evidence.log_bounds
    return bounds is not None and bounds[1] < math.inf


def accepted_counts(rounds: list[Weighted], prompts: int) -> Tensor:
    """Accepted draws of each prompt."""
    index = torch.cat([part.scored.draws.prompt_index[part.log_w > -torch.inf] for part in rounds])
    return group_count(index, prompts)
