"""REINFORCE with a leave-one-out baseline, the KL in the reward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored
from tiltlm.weights import leave_one_out


@dataclass(frozen=True)
class RLOO:
    """Leave-one-out policy gradient (Kool et al. 2019; Ahmadian et al. 2024, eq. 6).

    With the log-weight w(x) = log pi0(x) + r(x) / beta - log q(x), the loss is -(w_i - mean of the others' w) log q(x_i),
    averaged over all draws. Its expected gradient is that of KL(q || p*), in nats, and at q = p* every draw's
    weight is log Z, so that every single term vanishes.

    Attributes:
        group: completions of each prompt in a step; at least 2, because the others are the baseline.
    """

    group: int = 8
    updates = 1
    claim = Claim(
        fixed_point="p*",
        objective="KL(q||p*)",
        bias="none",
        source="Ahmadian et al. 2024, eq. 6",
    )

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"group is {self.group}; RLOO needs at least 2 completions a prompt, for the baseline")

    def init(self, prompts: Prompts) -> None:
        """RLOO carries nothing along."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        advantage = leave_one_out(scored.log_weight, scored.draws.prompt_index).detach()
        return -(advantage * forward.log_q.sum(-1)).mean(), {"advantage": advantage.abs()}
