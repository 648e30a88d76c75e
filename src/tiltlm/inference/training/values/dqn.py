"""DQN: Q-learning made steady by a target network, double estimates, and replay."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tiltlm.inference.training.values.q_learning import hard_law
from tiltlm.inference.training.values.temporal import huber, lambda_return, per_completion, require_rates
from tiltlm.posterior.exact import Exact
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class DQN:
    """Double DQN (Mnih et al. 2015; van Hasselt et al. 2016, eq. 4): Q(s_t, a_t) goes to Q'(s_{t+1}, argmax_a Q(s_{t+1}, a)).

    Q' is the target network. Replay is the loop's: `fit(…, source=Replay())`. The fixed point is that of `QLearning`, which
    is the limit of p* for beta -> 0 and not p*.

    Attributes:
        group: fresh completions of each prompt in a step.
        updates: steps on each batch.
        target_rate: share of the way that the target network goes towards the critic after each step.
    """

    group: int = 8
    updates: int = 4
    target_rate: float = 0.1
    claim = Claim(
        fixed_point="greedy",
        objective="Huber's function of the double Bellman error",
        bias="none",
        data="any",
        needs=frozenset({"q", "double_target"}),
        source="van Hasselt et al. 2016, eq. 4",
    )

    def __post_init__(self) -> None:
        require_rates(0.0, self.target_rate)

    def init(self, prompts: Prompts) -> None:
        """Everything is in the critic."""

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        """The law pi0 exp(Q) that its critic draws from in the end; its argmax is the greedy completion."""
        return hard_law(exact)

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        assert forward.q is not None
        assert forward.double_target is not None
        difference = forward.q - lambda_return(forward.double_target, forward.double_target, scored, trace=0.0)
        return per_completion(huber(difference), scored), {"td_error": difference.detach()[scored.draws.mask].abs()}
