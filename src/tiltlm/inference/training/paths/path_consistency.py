"""Path consistency: value and policy agree on every stretch of a completion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


def potential(forward: Forward, scored: Scored) -> tuple[Float[Tensor, "B T+1"], Bool[Tensor, "B T+1"]]:
    """V(s_t) - log q(x_<t) / pi0(x_<t) at every state of a completion, and which states it has.

    State t is the prompt and t tokens. The value of the last one, the whole completion, is its log-evidence. At p* and V* the
    potential is log Z at every state; what stretch (i, j) violates is potential i minus potential j.
    """
    mask = scored.draws.mask
    present = torch.nn.functional.pad(mask, (1, 0), value=True)
    log_ratio = torch.nn.functional.pad((forward.log_q - scored.log_prior).cumsum(-1), (1, 0))
    assert forward.values is not None
    inner = torch.nn.functional.pad(forward.values, (0, 1))
    end = torch.arange(present.shape[1]) == scored.draws.lengths[:, None]
    values = torch.where(end, scored.log_evidence[:, None], inner)
    return values - log_ratio, present


@dataclass(frozen=True)
class PathConsistency:
    """Path consistency learning (PCL; Nachum et al. 2017) without discount, relative to the prior, in nats.

    For a stretch of tokens from state i to state j the residual is V(s_i) - V(s_j) + sum_{i<=t<j} log q(a_t|s_t) / pi0(a_t|s_t);
    V is the policy's value head, and at the end r / beta. The loss is half the squares, summed over the stretches of a
    completion, of which one starts at every token and is `length` tokens long or ends with the completion, and averaged
    over completions. At p* and V* every residual is zero, whoever drew.

    Attributes:
        length: tokens in a stretch; None for the whole completion as the only one, which is trajectory balance with the
            value of the prompt as log Z.
        group: completions of each prompt in a step.
        updates: steps on each batch.
    """

    length: int | None = 4
    group: int = 8
    updates: int = 1
    claim = Claim(
        fixed_point="p*",
        objective="squared path consistency",
        bias="none",
        data="any",
        needs=frozenset({"log_q", "values"}),
        source="Nachum et al. 2017 (PCL)",
    )

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise InputError(
                f"length is {self.length}; a stretch has at least 1 token, and None takes whole completions"
            )
        if self.group < 1 or self.updates < 1:
            raise InputError(f"group is {self.group} and updates is {self.updates}; both must be at least 1")

    def init(self, prompts: Prompts) -> None:
        """The values are the policy's value head."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        level, present = potential(forward, scored)
        width = level.shape[1] - 1
        start = torch.arange(width if self.length is not None else 1)
        stop = torch.minimum(start + (self.length or width), scored.draws.lengths[:, None])
        inside = present[:, 1:][:, start]  # stretch i is there if token i is
        residual = torch.where(inside, level[:, start] - level.gather(1, stop), 0.0)
        return residual.square().sum(-1).mean() / 2, {"residual": residual[inside].detach().abs()}
