"""Expectation-maximisation with the prior pinned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.training.filtered.raft import weighted_likelihood
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored
from tiltlm.weights import normalise


@dataclass(frozen=True)
class EM:
    """E-step: weigh a group's draws by pi0 exp(r / beta) / q. M-step: their weighted maximum likelihood.

    The weights are the posterior over the draws, normalised by their own sum, as in reward-weighted regression (Dayan & Hinton
    1997; Peters & Schaal 2007) and the E-step of ReST-EM (Singh et al. 2024), but with the prior's probability over that of
    the law that drew. So the target stays p*, whoever drew: a better proposal only makes the weights more even. Without that
    factor every round would tilt the last one's law again, see `IteratedRAFT`. The gradient is that of KL(p* || q) up to a bias
    of 1 / group.

    Attributes:
        group: completions of each prompt in a step; at least 2, since a draw alone has weight one whatever its reward.
    """

    group: int = 8
    updates = 1
    claim = Claim(
        fixed_point="p*",
        objective="KL(p*||q)",
        bias="1/n",
        data="weighted",
        source="Dayan & Hinton 1997; Singh et al. 2024",
    )

    def __post_init__(self) -> None:
        if self.group < 2:
            raise InputError(f"group is {self.group}; EM compares the draws of a prompt: draw at least 2")

    def init(self, prompts: Prompts) -> None:
        """EM carries nothing along."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        """Minus the weighted mean of log q, averaged over prompts."""
        index = scored.draws.prompt_index
        weights = normalise(scored.log_weight.double(), index, int(index.max()) + 1)
        return weighted_likelihood(forward, scored, weights)
