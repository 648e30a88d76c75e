"""Importance resampling."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import Claim, Sampler
from tiltlm.records import Prompts, Scored, Weighted
from tiltlm.target import Target, require_finite
from tiltlm.weights import ess, log_mean_weight, normalise


@dataclass(frozen=True)
class Importance:
    """Sampling importance resampling (Rubin 1987), also called soft best-of-n.

    `n` draws of the proposal, weighted by w = pi0 exp(r / beta) / q. Picking one in proportion to w has a law that
    approaches p*: pi_n(x) / p*(x) = 1 + (1 + chi^2 - p*(x) / q(x)) / n + O(1 / n^2), and KL(pi_n || p*) falls as
    Var_{p*}(p* / q) / (2 n^2). The mean weight is an unbiased estimate of Z.
    """

    n: int = 64
    claim = Claim(fixed_point="p*", objective="law", bias="1/n", source="Rubin 1987")

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"n is {self.n}; draw at least 1 completion")

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """`n` weighted draws a prompt, with the estimate of log Z; the diagnostics are `ess`, the effective sample size."""
        scored = require_finite(target.score((proposal or target.prior).draw(prompts, self.n, rng)))
        log_w, index = scored.log_weight, scored.draws.prompt_index
        log_z = log_mean_weight(log_w, index, len(prompts), self.n)
        return Weighted(scored, log_w, log_z, {"ess": ess(log_w, index, len(prompts))})

    def selection(self, target: Target, scored: Scored) -> Float[Tensor, " B"]:
        """Probability that each of the given draws is the one resampled."""
        index = scored.draws.prompt_index
        return normalise(scored.log_weight, index, int(index.max()) + 1)
