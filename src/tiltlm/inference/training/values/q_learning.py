"""Q-learning: the value of the best continuation."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tiltlm.inference.training.values.temporal import lambda_return, per_completion, squared
from tiltlm.posterior.exact import Exact
from tiltlm.posterior.values import Tree, max_backup
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class QLearning:
    """Classical Q-learning (Watkins & Dayan 1992): Q(s_t, a_t) goes to max_a Q(s_{t+1}, a), without a target network.

    It finds the largest evidence that a prefix can still reach, however unlikely the prior finds it. Its greedy completion is
    the limit of p* for beta -> 0, where all of the posterior is on the best completions; at no beta > 0 is its law p*, because
    the maximum forgets the KL. `SoftQLearning` is the version that does not.

    Attributes:
        group: completions of each prompt in a step.
        updates: steps on each batch.
    """

    group: int = 8
    updates: int = 2
    target_rate = 1.0
    claim = Claim(
        fixed_point="greedy",
        objective="Bellman error",
        bias="none",
        data="any",
        needs=frozenset({"q", "max_target"}),
        source="Watkins & Dayan 1992; Sutton & Barto 2018, eq. 6.8",
    )

    def init(self, prompts: Prompts) -> None:
        """Everything is in the critic."""

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        """The law pi0 exp(Q) that its critic draws from in the end; its argmax is the greedy completion."""
        return hard_law(exact)

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        assert forward.q is not None
        assert forward.max_target is not None
        difference = forward.q - lambda_return(forward.max_target, forward.max_target, scored, trace=0.0)
        return per_completion(squared(difference), scored), {"td_error": difference.detach()[scored.draws.mask].abs()}


def hard_law(exact: Exact) -> Float[Tensor, " K"]:
    """pi0 exp(Q), normalised token by token, with Q(s, a) the largest evidence that s + a can reach."""
    tree = Tree(exact)
    return tree.log_law(tree.fixed_point(max_backup))
