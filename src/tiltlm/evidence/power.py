"""`Power`: the prior's own opinion as evidence, so that the posterior is pi0^alpha."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tiltlm.errors import InputError
from tiltlm.evidence.algebra import Algebra
from tiltlm.protocols import Sampler
from tiltlm.records import Draws, Likelihood


@dataclass(frozen=True)
class Power(Algebra):
    """The reward (alpha - 1) log pi0(x|c), in nats: `prior * Power(prior, alpha)` is pi0(x|c)^alpha / Z(c).

    Power sampling (Karan & Du 2025): alpha > 1 sharpens whole completions, alpha < 1 flattens them. It is not sampling tokens
    at temperature 1 / alpha, which normalises at every token and so takes no account of what follows. alpha = 0 leaves of the prior
    only what is possible, and other evidence says the rest. At another temperature the exponent is 1 + (alpha - 1) / beta.

    The prior's own draws carry log pi0 and are not scored again; other draws cost one more pass of the prior.

    Attributes:
        prior: the law whose log-probability is the evidence, usually the target's prior.
        alpha: the exponent, not negative.
    """

    prior: Sampler
    alpha: float
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise InputError(
                f"alpha is {self.alpha}; it is the exponent of the prior and must be 0 or a positive number"
            )
        if not 0 < self.beta < math.inf:
            raise InputError(f"beta is {self.beta!r}; it is a temperature and must be a positive number")

    @property
    def identity(self) -> str:
        """Tells this evidence from another."""
        return f"power {self.alpha}"

    @property
    def log_bounds(self) -> tuple[float, float]:
        """Log-probabilities are at most 0, so for alpha >= 1 the evidence is; for alpha < 1 it has no upper bound."""
        if self.alpha == 1:
            return 0.0, 0.0
        return (-math.inf, 0.0) if self.alpha > 1 else (0.0, math.inf)

    def at(self, beta: float) -> Power:
        """The same reward at another temperature."""
        return replace(self, beta=beta)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        """(alpha - 1) / beta log pi0 of each completion, -inf for one that the prior rules out (0^alpha = 0)."""
        log_prior = self.prior.log_prob(draws).double().sum(-1) if len(draws) else draws.log_q.double().sum(-1)
        impossible = log_prior == -torch.inf
        reward = torch.where(impossible, -torch.inf, (self.alpha - 1) * torch.where(impossible, 0.0, log_prior))
        return Likelihood(reward / self.beta, {"power": reward}, torch.ones(len(draws), dtype=torch.bool))
