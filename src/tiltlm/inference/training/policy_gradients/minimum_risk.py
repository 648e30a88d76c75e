"""Minimum-risk training: the baseline of machine translation, and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.posterior.exact import Exact
from tiltlm.protocols import Claim
from tiltlm.records import Draws, Forward, Info, Prompts, Scored
from tiltlm.weights import normalise


@dataclass(frozen=True)
class MinimumRisk:
    """Expected reward under the policy's own law, sharpened and renormalised over a sample (Shen et al. 2016, eqs. 13 and 14).

    Of a prompt's different draws S, the loss is -sum_S Q(x) r(x) / beta with Q(x) = q(x)^alpha / sum_S q^alpha; a text that was
    drawn twice counts once. The gradient goes through Q: alpha Q(x) (r(x) - sum_S Q r) / beta for each log q(x), a policy
    gradient whose baseline is the sample's own.

    There is no prior in it. Any law that is certain of one reward is at rest, and from a law with the prior's support the updates
    end at a point mass on the largest one: beta scales the loss and nothing else. What keeps a translator near its start is that
    training stops early. For the posterior, take `RLOO`. The paper puts the reference into S as well; here S has draws alone,
    so that rewards without references do.

    Attributes:
        group: draws of each prompt in a step; at least 2, since Q of one draw is 1 whatever it is worth.
        alpha: the sharpness; the paper's is 0.005, at which the draws weigh almost alike.
    """

    group: int = 8
    alpha: float = 0.005
    updates = 1
    claim = Claim(
        fixed_point="point mass",
        objective="risk over a renormalised sample, without a KL: ends at the largest reward",
        bias="none",
        data="on-policy",
        source="Shen et al. 2016, eqs. 13 and 14",
    )

    def __post_init__(self) -> None:
        if self.group < 2:
            raise InputError(f"group is {self.group}; minimum risk compares the draws of a prompt: draw at least 2")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"alpha is {self.alpha}; it is a power of the policy's probability, for example 0.005")

    def init(self, prompts: Prompts) -> None:
        """It carries nothing along: not even the prior."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        """Minus the mean reward under Q in nats, averaged over prompts."""
        index = scored.draws.prompt_index
        once = torch.where(distinct(scored.draws), 0.0, -torch.inf)
        share = normalise(self.alpha * forward.log_q.sum(-1) + once, index, int(index.max()) + 1)
        gain = torch.where(once == 0, share * scored.log_evidence, 0.0)
        return -gain.sum() / len(index.unique()), {"kept": (once == 0).double()}

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        """log of the prior among the completions of the largest reward."""
        return torch.where(exact.reward == exact.reward.max(), exact.log_prior, -torch.inf).log_softmax(0)


def distinct(draws: Draws) -> Bool[Tensor, " B"]:
    """The first draw of each text of a prompt."""
    rows = torch.cat([draws.prompt_index[:, None], draws.tokens.masked_fill(~draws.mask, -1)], dim=1)
    _, text = rows.unique(dim=0, return_inverse=True)
    place = torch.arange(len(rows))
    first = torch.full_like(place, len(rows)).scatter_reduce(0, text, place, "amin")
    return first[text] == place
