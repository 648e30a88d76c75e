"""Soft Q-learning: the posterior's value function by bootstrapping."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.inference.training.values.temporal import lambda_return, per_completion, require_rates, squared
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class SoftQLearning:
    """Squared soft temporal difference (Haarnoja et al. 2017, eq. 7; a twist loss in Zhao et al. 2024, section 4).

    (Q(s_t, a_t) - V(s_{t+1}))^2 / 2 with V(s) = log sum_a pi0(a|s) exp Q(s, a) of the target network, and r / beta after the
    last token. The fixed point is Q*(s, a) = log E_pi0[exp(r / beta) | s + a], whose law pi0 exp(Q*) is p*. There every
    difference is zero, whoever drew, so that old and given completions serve as well as fresh ones.

    Attributes:
        group: completions of each prompt in a step.
        updates: steps on each batch.
        trace: 0 looks one token ahead, 1 carries the evidence to every token; see `lambda_return`.
        target_rate: share of the way that the target network goes towards the critic after each step.
    """

    group: int = 8
    updates: int = 2
    trace: float = 0.9
    target_rate: float = 0.2
    claim = Claim(
        fixed_point="p*",
        objective="soft Bellman error",
        bias="none",
        data="any",
        needs=frozenset({"q", "q_target", "soft_target"}),
        source="Haarnoja et al. 2017, eq. 7; Zhao et al. 2024, section 4",
    )

    def __post_init__(self) -> None:
        require_rates(self.trace, self.target_rate)

    def init(self, prompts: Prompts) -> None:
        """Everything is in the critic."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        assert forward.q is not None
        assert forward.q_target is not None
        assert forward.soft_target is not None
        goal = lambda_return(forward.soft_target, forward.q_target, scored, self.trace)
        difference = forward.q - goal
        info = {"log_z": forward.soft_target[:, 0], "td_error": difference.detach()[scored.draws.mask].abs()}
        return per_completion(squared(difference), scored), info
