"""VarGrad: the variance of the log-weights within a prompt, which needs no log Z."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored
from tiltlm.weights import group_count, group_mean


@dataclass(frozen=True)
class VarGrad:
    """Half the sample variance of log pi0(x) + r(x) / beta - log q(x) within each prompt (Richter et al. 2020, eq. 13).

    It is trajectory balance with the prompt's mean log-weight in the place of log Z; TBA (Bartoldson et al. 2025) trains
    language models with it, on a replay buffer. The variance is zero exactly at p*, under any law with full support, so
    the loss takes draws of any. On draws of the policy itself it is RLOO, draw by draw: the derivative with respect to
    log q(x_i) is minus the leave-one-out advantage over the number of draws.

    Attributes:
        group: completions of each prompt in a step; at least 2, because one has no variance.
        updates: steps on each batch.
    """

    group: int = 8
    updates: int = 1
    claim = Claim(
        fixed_point="p*",
        objective="KL(q||p*)",
        bias="none",
        data="any",
        source="Richter et al. 2020, eq. 13",
    )

    def __post_init__(self) -> None:
        if self.group < 2 or self.updates < 1:
            raise InputError(
                f"group is {self.group} and updates is {self.updates}; VarGrad needs at least 2 completions a prompt and 1 update"
            )

    def init(self, prompts: Prompts) -> None:
        """The group's own mean stands for log Z."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        index = scored.draws.prompt_index
        groups = int(index.max()) + 1
        log_weight = scored.log_target - forward.log_q.sum(-1)
        # TBA's detached mean: the derivative is that of the variance, because the centred values add up to nothing
        centred = log_weight - group_mean(log_weight.detach(), index, groups)[index]
        count = group_count(index, groups)[index]
        unbiased = count / (count - 1).clamp(min=1)
        return (unbiased * centred.square()).mean() / 2, {"residual": centred.detach().abs()}
