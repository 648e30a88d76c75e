"""Contrastive twist learning: prefixes of the posterior against prefixes of the twist's own law."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored
from tiltlm.weights import group_logsumexp, normalise


@dataclass(frozen=True)
class ContrastiveTwist:
    """CTL (Zhao et al. 2024, section 4.1): for every length t, the KL from the posterior's law of prefixes to the twist's.

    The twist psi_t(s_{1:t}) = exp Q(s_{t-1}, a_{t-1}) gives prefixes the law pi_t ∝ pi0 psi_t, and p* gives them its marginal
    sigma_t. The gradient is E_{pi_t}[d log psi_t] - E_{sigma_t}[d log psi_t]. Both expectations are over the same draws: with
    the posterior's weights pi0 exp(r / beta) / q of whole completions, and with the twist's pi0 psi_t / q of prefixes, each
    normalised among the draws of a prompt that are at least t long. That costs a bias of order 1 / group, except for the
    critic's own draws at the optimum, whose weights are all equal.

    The contrast leaves a constant of every t open, which the law pi0 exp(Q) does not need. `anchor` fixes it, by the
    squared difference between the logarithms of the two sums of weights, so that Q = Q*; SMC compares prefixes with
    completions that have ended, and there the constant counts.

    Attributes:
        group: completions of each prompt in a step; at least 2, to have a contrast.
        updates: steps on each batch.
        anchor: weight of that squared difference; towards 0 it is the method as published.
    """

    group: int = 16
    updates: int = 2
    anchor: float = 0.3
    claim = Claim(
        fixed_point="p*",
        objective="sum_t KL(sigma_t||pi_t)",
        bias="1/n",
        data="weighted",
        needs=frozenset({"q"}),
        source="Zhao et al. 2024, section 4.1",
    )

    def __post_init__(self) -> None:
        if self.group < 2:
            raise InputError(f"group is {self.group}; ContrastiveTwist needs at least 2 completions a prompt")
        if not self.anchor > 0:
            raise InputError(f"anchor is {self.anchor}; it must be positive, for example 0.3")

    def init(self, prompts: Prompts) -> None:
        """Everything is in the critic."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        assert forward.q is not None
        draws, width = scored.draws, forward.q.shape[1]
        prompts, mask = int(draws.prompt_index.max()) + 1, draws.mask
        level = (draws.prompt_index[:, None] * width + torch.arange(width))[mask]  # the draws a prefix is compared with
        of_posterior = scored.log_weight[:, None].expand(mask.shape)[mask].to(forward.q.dtype)
        of_prefix = (scored.log_prior - draws.log_q).cumsum(-1)[mask].to(forward.q.dtype)
        log_psi = forward.q[mask]
        positive = group_logsumexp(of_posterior, level, prompts * width)
        negative = group_logsumexp(of_prefix + log_psi, level, prompts * width)
        share = normalise(of_posterior, level, prompts * width)
        seen = positive > -torch.inf  # elsewhere nothing is known of the posterior
        gap = torch.where(seen, negative - torch.where(seen, positive, 0.0), 0.0)
        contrast = torch.where(seen, negative, 0.0).sum() - (share * log_psi).sum()
        loss = (contrast + self.anchor * gap.square().sum() / 2) / len(draws.prompt_index.unique())
        return loss, {"normaliser_gap": gap.detach()[seen].abs()}
