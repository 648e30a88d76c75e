"""Which part of a completion's reward and KL each of its tokens answers for."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from tiltlm.inference.training.policy_gradients.kl_terms import TokenKL

Credit = Callable[[Float[Tensor, " B"], TokenKL], Float[Tensor, "B T"]]


def whole(reward: Float[Tensor, " B"], kl: TokenKL) -> Float[Tensor, "B T"]:
    """Reward minus the KL of all tokens, for every token.

    What was charged before a token is a baseline for it. It is the one that makes every draw's signal vanish at p*, where the
    total is log Z.
    """
    return (reward - kl.charge.sum(-1))[:, None].expand_as(kl.charge)


def to_go(reward: Float[Tensor, " B"], kl: TokenKL) -> Float[Tensor, "B T"]:
    """Reward minus the KL from this token on, future tokens included; what is past is left out.

    Unbiased as `whole` is: E[s_t | what came before] = 0. Less noise as long as the KL is not yet what cancels the reward's.
    """
    return reward[:, None] - from_here(kl.charge) + kl.own


def from_here(values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Sum over this token and those after it."""
    return values.flip(-1).cumsum(-1).flip(-1)
