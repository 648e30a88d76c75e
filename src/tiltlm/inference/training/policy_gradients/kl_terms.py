"""The KL to the prior as a policy gradient sees it: what each token is charged for, and what is differentiated outright.

With drift l_t = log pi(a_t|s_t) - log pi0(a_t|s_t) the estimators are k1 = l, k2 = l^2 / 2 and k3 = exp(-l) - 1 + l (Schulman
2020). Which divergence they descend depends on where they stand: k1 in the reward and k2 of the whole completion in the loss
have the gradient of KL(pi || pi0), k3 in the loss that of KL(pi0 || pi), k1 in the loss none at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.records import Forward, Scored


@dataclass(frozen=True)
class TokenKL:
    """The KL to the prior, token by token, in nats; 0 on padding.

    Attributes:
        charge: what is taken off the reward of each token; no gradient.
        penalty: what is added to the loss; carries gradient.
        own: the part of `charge` that is known before the token is drawn. It says nothing about the token, so that a
            reward-to-go may leave it out.
    """

    charge: Float[Tensor, "B T"]
    penalty: Float[Tensor, "B T"]
    own: Float[Tensor, "B T"]

    def times(self, coefficient: float | Tensor) -> TokenKL:
        """The same with another weight against the reward."""
        return TokenKL(self.charge * coefficient, self.penalty * coefficient, self.own * coefficient)


# --- the two terms whose gradient is that of KL(pi || pi0) ---

KLTerm = Callable[[Forward, Scored], TokenKL]


def sampled(forward: Forward, scored: Scored) -> TokenKL:
    """Charge each token its own log pi_old / pi0. At p* it cancels the reward's noise exactly, draw by draw."""
    charge = scored.draws.log_q - scored.log_prior
    nothing = torch.zeros_like(charge)
    return TokenKL(charge, nothing, nothing)


def rao_blackwell(forward: Forward, scored: Scored) -> TokenKL:
    """KL_t = KL(pi(.|s_t) || pi0(.|s_t)) exactly, for each state that was visited (Amini et al. 2025).

    The gradient of E[sum_t KL_t] has two terms, sum_t [grad KL_t + s_t sum_{u>t} KL_u]: the first is the penalty, the second
    comes from the charge. Less noise than `sampled` as long as the policy is near the prior. Near p* it is the other way
    round, because the reward's noise has nothing to cancel against.
    """
    if forward.kl is None:
        raise ValueError("rao_blackwell reads forward.kl; list 'kl' in the claim's needs")
    charge = forward.kl.detach()
    return TokenKL(charge, forward.kl, charge)


# --- estimators: of the drift log pi / pi0, the exact KL of the state, and the age log pi / pi_old ---

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]


def k1(drift: Tensor, kl: Tensor, age: Tensor) -> Tensor:
    """l: unbiased as a value; in the loss its expected gradient is zero."""
    return drift


def k2(drift: Tensor, kl: Tensor, age: Tensor) -> Tensor:
    """l^2 / 2: biased as a value; in the loss its gradient is that of k1 in the reward."""
    return drift**2 / 2


def k3(drift: Tensor, kl: Tensor, age: Tensor) -> Tensor:
    """exp(-l) - 1 + l: unbiased as a value and never negative; in the loss it descends KL(pi0 || pi)."""
    return torch.expm1(-drift) + drift


def k3_corrected(drift: Tensor, kl: Tensor, age: Tensor) -> Tensor:
    """(pi / pi_old) k3, with the ratio differentiated too: its gradient is that of sg(pi / pi_old) k2, draw by draw."""
    return age.exp() * k3(drift, kl, age)


def exact(drift: Tensor, kl: Tensor, age: Tensor) -> Tensor:
    """KL(pi(.|s_t) || pi0(.|s_t)) over the vocabulary."""
    return kl


def no_kl(drift: Tensor, kl: Tensor, age: Tensor) -> Tensor:
    """None: without a KL there is no posterior, and the optimum is a point mass."""
    return torch.zeros_like(drift)


# --- levels: an estimator applied to each token, or to the completion ---

Level = Callable[[Estimator, Tensor, Tensor, Tensor, Tensor], Tensor]


def by_token(
    estimator: Estimator,
    drift: Float[Tensor, "B T"],
    kl: Float[Tensor, "B T"],
    age: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Each token's own. In the loss it leaves out that a token leads to states with a KL of their own."""
    return estimator(drift, kl, age) * mask


def by_sequence(
    estimator: Estimator,
    drift: Float[Tensor, "B T"],
    kl: Float[Tensor, "B T"],
    age: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """The whole completion's, spread evenly over its tokens, so that their sum is the completion's."""
    whole = estimator(drift.sum(-1), kl.sum(-1), age.sum(-1))
    return (whole / mask.sum(-1).clamp(min=1))[:, None] * mask


# --- places: of the estimate at the time of drawing (no gradient), and of the one with gradient ---

Place = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def in_reward(then: Float[Tensor, "B T"], now: Float[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
    """Charge and no penalty."""
    return then, torch.zeros_like(now)


def in_loss(then: Float[Tensor, "B T"], now: Float[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
    """Penalty and no charge."""
    return torch.zeros_like(then), now


def in_both(then: Float[Tensor, "B T"], now: Float[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
    """Charge and penalty: the product rule, so that any unbiased estimator has the gradient of KL(pi || pi0)."""
    return then, now


def token_kl(estimator: Estimator, level: Level, place: Place, forward: Forward, scored: Scored) -> TokenKL:
    """An estimator at a level and a place.

    In the reward stands what the policy's drift was when it drew; in the loss, what it is now.
    """
    draws = scored.draws
    kl = torch.zeros_like(forward.log_q) if forward.kl is None else forward.kl
    drift, age = forward.log_q - scored.log_prior, forward.log_q - draws.log_q
    then = level(estimator, draws.log_q - scored.log_prior, kl, torch.zeros_like(age), draws.mask).detach()
    charge, penalty = place(then, level(estimator, drift, kl, age, draws.mask))
    return TokenKL(charge, penalty, charge if estimator is exact else torch.zeros_like(charge))
