"""Quasi-rejection sampling: rejection with a bound that need not be one, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.inference.decoding.proposal import require_same_support
from tiltlm.inference.decoding.rejection import first_accepted, has_upper_bound
from tiltlm.posterior.exact import Exact
from tiltlm.protocols import Claim, Sampler
from tiltlm.records import Prompts, Scored, Weighted
from tiltlm.target import Target, require_finite
from tiltlm.weights import group_mean, log_mean_weight, normalise


@dataclass(frozen=True)
class QuasiRejection:
    """Draw from any proposal q, accept with probability min(1, P / (q b)), P = pi0 exp(r / beta) (Eikema et al. 2022).

    What is accepted is an exact, independent sample of p_b = min(P, b q) / Z_b, which is p* where b bounds P / q and comes near
    it as b grows, while fewer are accepted: the rate is Z_b / b. The result's diagnostics are `acceptance`, the expected
    rate, and `total_variation` between p_b and p*, both estimated from all the draws, accepted or not. The second misses
    what no draw has shown.

    Attributes:
        n: draws a prompt, the budget; a prompt may get none accepted, which the weights then show.
        log_bound: log b, in nats. None takes the reward's declared upper bound, which is exact from the prior only.
    """

    n: int = 256
    log_bound: float | None = None

    @property
    def claim(self) -> Claim:
        """p* with the reward's own bound, p_b with another."""
        law = "p*" if self.log_bound is None else "quasi-rejection"
        return Claim(fixed_point=law, objective="law", bias="none", source="Eikema et al. 2022")

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"n is {self.n}; draw at least 1 completion")
        if self.log_bound is not None and not math.isfinite(self.log_bound):
            raise InputError(
                f"log_bound is {self.log_bound}; it is the log of a bound on weights, a finite number of nats"
            )

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """Accepted draws with weight 1, the others with weight 0.

        Raises:
            InputError: without `log_bound`, if the reward has no bounds or the proposal is not the prior.
        """
        if self.log_bound is None and proposal is not None and proposal is not target.prior:
            raise InputError(
                "log_bound is None, the reward's bound, which bounds the weights of the prior's draws alone; give log_bound for "
                "another proposal: the larger, the nearer p* and the fewer accepted"
            )
        self._bound(target)
        sampler = proposal or target.prior
        require_same_support(target, sampler)
        scored = require_finite(target.score(sampler.draw(prompts, self.n, rng)))
        uniform = torch.rand(len(scored), generator=rng, dtype=torch.float64)
        accepted = uniform.log() < self._log_accept(target, scored)
        index, log_w = scored.draws.prompt_index, scored.log_weight.double()
        return Weighted(
            scored,
            torch.where(accepted, 0.0, -torch.inf).double(),
            log_mean_weight(log_w, index, len(prompts), self.n),
            {
                "acceptance": group_mean(self._log_accept(target, scored).exp(), index, len(prompts)),
                "total_variation": self._total_variation(target, log_w, index, len(prompts)),
            },
        )

    def selection(self, target: Target, scored: Scored) -> Float[Tensor, " B"]:
        """Probability that each of the given draws is the first accepted one; the rest to 1 is "none accepted"."""
        return first_accepted(self._log_accept(target, scored).exp(), scored.draws.prompt_index)

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        """log p_b over all completions, for draws of the prior."""
        bound = math.inf if self.log_bound is None else self.log_bound
        return (exact.log_prior + exact.scored.log_evidence.double().clamp(max=bound)).log_softmax(0)

    def _log_accept(self, target: Target, scored: Scored) -> Float[Tensor, " B"]:
        return (scored.log_weight.double() - self._bound(target)).clamp(max=0.0)

    def _bound(self, target: Target) -> float:
        if self.log_bound is not None:
            return self.log_bound
        if not has_upper_bound(target):
            raise InputError(
                "quasi-rejection needs a bound: give log_bound, or declare the reward's, Reward(fn, bounds=(low, high))"
            )
        bounds = target.evidence.log_bounds
        assert bounds is not None
        return bounds[1]

    def _total_variation(
        self, target: Target, log_w: Float[Tensor, " B"], index: Int[Tensor, " B"], prompts: int
    ) -> Float[Tensor, " P"]:
        """TV(p*, p_b) = sum q |P / (q Z) - min(P / q, b) / Z_b| / 2, with means over the draws for Z and Z_b."""
        ideal = normalise(log_w, index, prompts)
        found = normalise(log_w.clamp(max=self._bound(target)), index, prompts)
        return torch.zeros(prompts, dtype=torch.float64).index_add_(0, index, (ideal - found).abs() / 2)
