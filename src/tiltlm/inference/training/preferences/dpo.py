"""Direct preference optimisation, on given pairs and on pairs that the reward labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.errors import InputError
from tiltlm.inference.training.preferences.pairs import Label, bradley_terry, compare, log_ratio, winner
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class DPO:
    """Cross-entropy between a pair's label and the preference that the policy implies (Rafailov et al. 2023, eq. 7).

    The policy implies the reward beta log(q / pi0), so that it prefers x to x' with probability
    sigma(beta log q(x) / pi0(x) - beta log q(x') / pi0(x')); beta is the target's temperature, in the units of the reward.
    Labels that follow Bradley and Terry's model, P(x > x') = sigma(r(x) - r(x')), make p* the minimum, where the loss is the
    labels' entropy; any pairs will do that reach the whole support, and what they do not reach is not constrained.

    Pairs come with the data (`Given(preferences(prior, rows))`). Where there are none, every two completions of a prompt are
    compared by their rewards: of the policy (online DPO, Guo et al. 2024), of a buffer, or of a decoding engine; with
    `Decoded(Rejection())`, exact samples of p*, that is RSO (Liu et al. 2024). The label is then its own expectation, which
    leaves no noise: at p* no pair wants anything.

    Attributes:
        group: completions of each prompt in a step; at least 2, to have a pair. Given pairs are all taken.
        label: what the difference of two rewards says of the pair. With `winner` in place of `bradley_terry` the better
            completion is preferred with certainty, as a judge's verdict is often used; no finite log-ratio fits that, and
            the policy runs towards the best completion.
    """

    group: int = 4
    label: Label = bradley_terry
    updates = 1

    def __post_init__(self) -> None:
        if self.group < 2:
            raise InputError(f"group is {self.group}; DPO compares completions of one prompt: draw at least 2")

    @property
    def claim(self) -> Claim:
        """p* for Bradley-Terry labels, and nothing for others."""
        settles = self.label is bradley_terry
        return Claim(
            fixed_point="p*" if settles else "none",
            objective="preference cross-entropy",
            bias="none" if settles else "unknown",
            data="any",
            source="Rafailov et al. 2023, eq. 7",
        )

    def init(self, prompts: Prompts) -> None:
        """DPO carries nothing along."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        """Mean cross-entropy of the pairs, in nats."""
        pairs, preferred = compare(scored, self.label)
        first, second = log_ratio(forward, scored)[pairs].unbind(-1)
        margin = scored.beta * (first - second)
        loss = -(preferred * logsigmoid(margin) + (1 - preferred) * logsigmoid(-margin)).mean()
        agrees = (margin * (2 * preferred - 1) > 0).double()
        return loss, {"margin": (margin * (2 * preferred - 1)).detach(), "accuracy": agrees.detach()}


PRESETS = {"dpo-winner": DPO(label=winner)}
