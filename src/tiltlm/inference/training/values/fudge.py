"""FUDGE: the posterior's value function by classifying whether a prefix will succeed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.training.values.temporal import per_completion
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored

EDGE = 1e-3
"""Nats below certain success at which the cross-entropy goes on as its tangent: its slope is infinite at certainty."""


@dataclass(frozen=True)
class Fudge:
    """Binary cross-entropy of the success probability exp(Q - log_bound) at every token of prior draws.

    Success is an event of probability phi = exp(r / beta - log_bound), at most 1 by the bound; given a prefix its probability
    is E_pi0[phi | s + a], so that Q = Q* (Yang & Klein 2021, whose phi is 0 or 1). As for `SoftValueRegression` the
    draws must be the prior's. Prefixes that succeed with probability above 1 - EDGE are learned to within EDGE nats.

    Attributes:
        group: completions of each prompt in a step.
        log_bound: an upper bound of r / beta: the reward's largest value over beta. A higher one is right as well, but makes
            success rare; far above r / beta the loss becomes `generalised_kl`, scaled down.
    """

    group: int = 16
    updates: int = 1
    log_bound: float = 5.0
    claim = Claim(
        fixed_point="p*",
        objective="E_pi0 of the cross-entropy of success",
        bias="none",
        data="prior",
        needs=frozenset({"q"}),
        source="Yang & Klein 2021, section 3",
    )

    def __post_init__(self) -> None:
        if not math.isfinite(self.log_bound):
            raise InputError(f"log_bound is {self.log_bound}; give the reward's largest value divided by beta")

    def init(self, prompts: Prompts) -> None:
        """Everything is in the critic."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        assert forward.q is not None
        if scored.log_evidence.max() > self.log_bound + 1e-9:
            raise InputError(
                f"log_evidence is {float(scored.log_evidence.max()):.6g}, above log_bound {self.log_bound}; raise log_bound to the "
                f"reward's largest value divided by beta"
            )
        success = (scored.log_evidence - self.log_bound).exp().clamp(max=1 - EDGE).to(forward.q.dtype)[:, None]
        log_p = forward.q - self.log_bound
        loss = -success * log_p - (1 - success) * log_failure(log_p)
        return per_completion(loss, scored), {"success": success[:, 0]}


def log_failure(log_p: Tensor) -> Tensor:
    """log(1 - p); above log p = -EDGE, where it would leave the numbers, the tangent there."""
    inside = log_p.clamp(max=-EDGE)
    slope = 1 / (1 - math.exp(EDGE))
    return torch.log(-torch.expm1(inside)) + slope * (log_p - inside)
