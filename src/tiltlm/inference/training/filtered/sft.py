"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class SFT:
    """Maximum likelihood of given completions: minus the mean of log q(x|c), the whole completion with its end.

    Its minimum is the law of the data, KL(data || q) = 0, whatever the reward. So it reaches p* on exact samples of p*
    (`Decoded(Rejection())`) and the law of best-of-n on its output (`Decoded(BestOfN(16))`); on a data set
    (`Given(demonstrations(prior, rows))`) the prior is only where it starts.

    Attributes:
        group: completions of each prompt in a step, where a decoding engine makes them. Given ones are all taken.
    """

    group: int = 4
    updates = 1
    claim = Claim(fixed_point="data", objective="KL(data||q)", bias="none", data="given", source="maximum likelihood")

    def __post_init__(self) -> None:
        if self.group < 1:
            raise InputError(f"group is {self.group}; SFT needs at least 1 completion a prompt")

    def init(self, prompts: Prompts) -> None:
        """SFT carries nothing along."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        """Nats a completion."""
        log_q = forward.log_q.sum(-1)
        per_token = -forward.log_q.detach().sum() / scored.draws.mask.sum()
        return -log_q.mean(), {"nats_per_token": per_token}
