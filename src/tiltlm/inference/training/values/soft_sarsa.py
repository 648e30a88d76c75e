"""Soft SARSA: the soft value of the law that draws, which then moves to its own tilt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.inference.training.values.temporal import lambda_return, per_completion, require_rates, squared
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class SoftSARSA:
    """Soft policy iteration from samples (Haarnoja et al. 2018, eqs. 2 to 4, with the prior for the uniform law).

    Evaluation: Q(s_t, a_t) goes to Q(s_{t+1}, a_{t+1}) - log q(a_{t+1}|s_{t+1}) + log pi0(a_{t+1}|s_{t+1}), an unbiased sample
    of the soft value of s_{t+1} under the law q that drew; and to r / beta after the last token. Improvement: the next draws
    come from pi0 exp(Q), the critic's own law. Evaluated exactly, each law is at least as good as the one before, and p* is
    the only one that stays. The draws must be the critic's: for another law's, the values are that law's.

    Attributes:
        updates: steps of evaluation before the next improvement.
        group, trace, target_rate: as of `SoftQLearning`.
    """

    group: int = 8
    updates: int = 2
    trace: float = 0.9
    target_rate: float = 0.2
    claim = Claim(
        fixed_point="p*",
        objective="soft Bellman error of the law that draws",
        bias="none",
        data="on-policy",
        needs=frozenset({"q", "q_target"}),
        source="Haarnoja et al. 2018, eqs. 2-4",
    )

    def __post_init__(self) -> None:
        require_rates(self.trace, self.target_rate)

    def init(self, prompts: Prompts) -> None:
        """Everything is in the critic."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        assert forward.q is not None
        assert forward.q_target is not None
        log_ratio = scored.draws.log_q - scored.log_prior
        goal = lambda_return(forward.q_target - log_ratio, forward.q_target, scored, self.trace)
        difference = forward.q - goal
        return per_completion(squared(difference), scored), {"td_error": difference.detach()[scored.draws.mask].abs()}
