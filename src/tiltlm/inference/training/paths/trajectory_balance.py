"""Trajectory balance: the squared distance of every log-weight to a learned log Z."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.training.log_z import LearnedLogZ
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class TrajectoryBalance:
    """Trajectory balance (Malkin et al. 2022, eq. 14; for language models Hu et al. 2024), in nats.

    The residual of a completion is log Z(c) + log q(x) - log pi0(x) - r(x) / beta, with a learned log Z for each prompt; the
    loss is half its mean square. At p* and the true log Z it is zero for every completion, whoever drew it, so the loss
    takes draws of any law. On draws of the policy itself its expected gradient is that of KL(q || p*), at any log Z,
    which then is a baseline. (Malkin's loss has no half, and twice the gradient.)

    Attributes:
        group: completions of each prompt in a step.
        updates: steps on each batch.
    """

    group: int = 8
    updates: int = 1
    claim = Claim(
        fixed_point="p*",
        objective="KL(q||p*)",
        bias="none",
        data="any",
        source="Malkin et al. 2022, eq. 14",
    )

    def __post_init__(self) -> None:
        if self.group < 1 or self.updates < 1:
            raise InputError(f"group is {self.group} and updates is {self.updates}; both must be at least 1")

    def init(self, prompts: Prompts) -> LearnedLogZ:
        return LearnedLogZ(prompts)

    def observe(self, scored: Scored, state: LearnedLogZ) -> None:
        state.observe(scored)

    def loss(self, forward: Forward, scored: Scored, state: LearnedLogZ) -> tuple[Tensor, Info]:
        log_z = state(scored)
        residual = log_z + forward.log_q.sum(-1) - scored.log_target
        return residual.square().mean() / 2, {"residual": residual.detach().abs(), "log_z": log_z.detach()}
