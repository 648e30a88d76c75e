"""Sub-trajectory balance: path consistency on every stretch of a completion, weighted by its length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.training.paths.path_consistency import potential
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class SubTrajectoryBalance:
    """SubTB(lambda) of Madan et al. 2023, with flows relative to the prior, in nats.

    The flow of a state is pi0(s) exp V(s), with the policy's value head as V and the log-evidence r / beta at the end. Every
    pair of states i < j of a completion has the residual V(s_i) - V(s_j) + sum_{i<=t<j} log q / pi0, as in `PathConsistency`; the
    loss is half the mean of their squares with weights lambda^(j - i) that sum to one in each completion. A small lambda
    compares neighbours (detailed balance: little variance, slow news from the end), a large one whole completions
    (trajectory balance). At p* and V* every residual is zero, whoever drew.

    Attributes:
        lambda_: weight of a stretch relative to one that is a token shorter.
        group: completions of each prompt in a step.
        updates: steps on each batch.
    """

    lambda_: float = 1.0
    group: int = 8
    updates: int = 1
    claim = Claim(
        fixed_point="p*",
        objective="squared sub-trajectory balance",
        bias="none",
        data="any",
        needs=frozenset({"log_q", "values"}),
        source="Madan et al. 2023 (SubTB(lambda))",
    )

    def __post_init__(self) -> None:
        if not 0 < self.lambda_ < math.inf:
            raise InputError(f"lambda_ is {self.lambda_}; it must be positive, for example 1.0")
        if self.group < 1 or self.updates < 1:
            raise InputError(f"group is {self.group} and updates is {self.updates}; both must be at least 1")

    def init(self, prompts: Prompts) -> None:
        """The log-flows are the policy's value head."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        level, present = potential(forward, scored)
        state_number = torch.arange(level.shape[1])
        gap = state_number - state_number[:, None]
        pairs = (gap > 0) & present[:, None, :]  # states are there from the first on
        log_weight = torch.where(pairs, gap.to(level.dtype) * math.log(self.lambda_), -torch.inf)
        weight = log_weight.flatten(1).softmax(-1).view_as(log_weight)
        residual = level[:, :, None] - level[:, None, :]
        loss = (weight * residual.square()).sum((-2, -1)).mean() / 2
        return loss, {"residual": residual[pairs].detach().abs()}
