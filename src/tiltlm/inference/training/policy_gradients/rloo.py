"""REINFORCE with a leave-one-out baseline, the KL in the reward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.training.policy_gradients.baselines import of_the_others
from tiltlm.inference.training.policy_gradients.credit import Credit, to_go, whole
from tiltlm.inference.training.policy_gradients.kl_terms import KLTerm, rao_blackwell, sampled
from tiltlm.inference.training.policy_gradients.reinforce import needs_of, weighted_score
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class RLOO:
    """Leave-one-out policy gradient (Kool et al. 2019; Ahmadian et al. 2024, eq. 6).

    With the log-weight w(x) = log pi0(x) + r(x) / beta - log q(x), the loss is -(w_i - mean of the others' w) log q(x_i),
    averaged over all draws. Its expected gradient is that of KL(q || p*), in nats, and at q = p* every draw's
    weight is log Z, so that every single term vanishes.

    The options change the noise, not the expectation. Both lower it while the policy is near the prior, where log q / pi0 is
    noise beside the reward; near p* nothing is as quiet as the defaults.

    Attributes:
        group: completions of each prompt in a step; at least 2, because the others are the baseline.
        credit: `whole` completions, or the reward `to_go` with the future KL.
        kl: `sampled`, or `rao_blackwell` for the exact KL of every state.
    """

    group: int = 8
    credit: Credit = whole
    kl: KLTerm = sampled
    updates = 1

    def __post_init__(self) -> None:
        if self.group < 2:
            raise InputError(f"group is {self.group}; RLOO needs at least 2 completions a prompt, for the baseline")

    @property
    def claim(self) -> Claim:
        known = self.credit in (whole, to_go) and self.kl in (sampled, rao_blackwell)
        return Claim(
            fixed_point="p*",
            objective="KL(q||p*)",
            bias="none" if known else "unknown",
            needs=needs_of(self.kl),
            zero_variance=self.credit is whole and self.kl is sampled,
            source="Ahmadian et al. 2024, eq. 6",
        )

    def init(self, prompts: Prompts) -> None:
        """RLOO carries nothing along."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        kl = self.kl(forward, scored)
        credit = self.credit(scored.log_evidence, kl)
        index = scored.draws.prompt_index
        advantage = (credit - of_the_others(credit, index, credit[:, 0])).detach()
        return weighted_score(forward, advantage, kl.penalty), {"advantage": advantage.abs()}
