"""Rejection sampling: exact posterior samples, where the reward has an upper bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import Claim, Sampler
from tiltlm.records import Prompts, Scored, Weighted
from tiltlm.target import Target
from tiltlm.weights import group_count, log_mean_weight


@dataclass(frozen=True)
class Rejection:
    """Draw from the prior, accept with probability exp((r - r_max) / beta) (von Neumann 1951).

    What is accepted is an exact, independent sample of p*, and the acceptance rate is Z exp(-r_max / beta). All
    accepted draws are returned; a prompt may get none within its budget, which the weights then show.

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

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """Accepted draws with weight 1, the others with weight 0.

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
        drawn = 0
        while open_prompts and drawn < self.n:
            count = min(self.round, self.n - drawn)
            draws = target.prior.draw(prompts.select(open_prompts), count, rng).among(prompts, open_prompts)
            rounds.append(self.weigh(target, target.score(draws), rng))
            drawn += count
            if self.samples is not None:
                accepted = accepted_counts(rounds, len(prompts))
                open_prompts = [p for p in open_prompts if accepted[p] < self.samples]
        scored = Scored.concatenate([part.scored for part in rounds])
        log_z = log_mean_weight(scored.log_evidence, scored.draws.prompt_index, len(prompts))
        return Weighted(scored, torch.cat([part.log_w for part in rounds]), log_z)

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
