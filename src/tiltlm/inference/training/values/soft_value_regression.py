"""Regression of exp(r / beta) on prefixes of prior draws: the posterior's value function without bootstrapping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.training.values.temporal import per_completion
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored

Regression = Callable[[Tensor, Tensor], Tensor]
"""(u, log phi) -> a loss that is least at u = log E[phi]."""


def generalised_kl(u: Tensor, log_phi: Tensor) -> Tensor:
    """exp(u) - phi u: the generalised KL from phi to exp(u), less what does not depend on u (a Poisson likelihood)."""
    return u.exp() - log_phi.exp() * u


def squared_weight(u: Tensor, log_phi: Tensor) -> Tensor:
    """(exp(u) - phi)^2 / 2."""
    return (u.exp() - log_phi.exp()).square() / 2


@dataclass(frozen=True)
class SoftValueRegression:
    """Fit exp Q(s_t, a_t) to phi = exp(r / beta) at every token of prior draws: Q* = log E_pi0[phi | s + a] (Monte Carlo).

    The mean given a prefix is the prior's, so what follows the prefix must have been drawn by the prior: with a policy's
    draws the same loss learns the policy's mean, and the critic's law is then not p*. Nothing is bootstrapped, at the price
    of the spread of phi.

    Both sides are divided by a scale, the larger of exp Q(s_t, a_t), without gradient, and the mean phi of the prompt's other
    draws. It knows nothing of what this draw did after the prefix, so it moves the noise and not the fixed point, and the
    gradient stays of order one whatever log Z is.

    Attributes:
        group: completions of each prompt in a step; at least 2, because the others give the scale.
        updates: steps on each batch.
        regress: how exp Q and phi are compared: `generalised_kl` or `squared_weight`.
    """

    group: int = 16
    updates: int = 2
    regress: Regression = generalised_kl
    claim = Claim(
        fixed_point="p*",
        objective="E_pi0 of the regression of exp(r / beta)",
        bias="none",
        data="prior",
        needs=frozenset({"q"}),
        source="Zhao et al. 2024, prop. 3.2; Zhou et al. 2025, thm. 2.2",
    )

    def __post_init__(self) -> None:
        if self.group < 2:
            raise InputError(f"group is {self.group}; SoftValueRegression needs at least 2 completions a prompt")

    def init(self, prompts: Prompts) -> None:
        """Everything is in the critic."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        assert forward.q is not None
        log_phi = scored.log_evidence.to(forward.q.dtype)[:, None]
        scale = torch.maximum(forward.q.detach(), others_log_mean(log_phi[:, 0], scored)[:, None])
        loss = self.regress(forward.q - scale, log_phi - scale)
        return per_completion(loss, scored), {"log_phi_gap": (forward.q.detach() - log_phi)[scored.draws.mask].abs()}


def others_log_mean(log_phi: Float[Tensor, " B"], scored: Scored) -> Float[Tensor, " B"]:
    """log of the mean phi of the other draws of a draw's prompt; -inf where there is none with any weight."""
    index = scored.draws.prompt_index
    others = (index[:, None] == index) & ~torch.eye(len(index), dtype=torch.bool)
    total = torch.where(others, log_phi, -torch.inf).logsumexp(-1)
    return total - others.sum(-1).clamp(min=1).log()
