"""REINFORCE with any baseline, the KL in the reward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.training.policy_gradients.baselines import (
    Baseline,
    RunningMean,
    no_baseline,
    of_earlier_draws,
    of_the_group,
    of_the_others,
)
from tiltlm.inference.training.policy_gradients.credit import Credit, to_go, whole
from tiltlm.inference.training.policy_gradients.kl_terms import KLTerm, rao_blackwell, sampled
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class Reinforce:
    """Policy gradient of KL(q || p*) in nats (Williams 1992; the KL in the reward as in Korbak et al. 2022).

    A draw costs -sum_t (credit_t - baseline_t) log q(a_t|s_t), where its credit is r / beta minus what its tokens are charged
    for their KL. Expected gradient: that of KL(q || p*), for every baseline that does not depend on the draw itself.

    Attributes:
        group: completions of each prompt in a step; at least 2 for `of_the_group`, where a draw alone would cancel itself.
        baseline: `of_the_others`; `of_the_group`, which shrinks by 1 - 1/G what passes through it: with `sampled` the whole
            gradient, with `rao_blackwell` all but the penalty, so that the fixed point moves by order 1/G; `of_earlier_draws`;
            `no_baseline`; or your own function of (credits, prompt index, mean of earlier draws).
        credit: `whole` completions, or the reward `to_go` with the future KL.
        kl: `sampled`, or `rao_blackwell` for the exact KL of every state.
        memory: of the running mean that `of_earlier_draws` subtracts; 0 keeps only the last step.
    """

    group: int = 8
    baseline: Baseline = of_the_others
    credit: Credit = whole
    kl: KLTerm = sampled
    memory: float = 0.9
    updates = 1

    def __post_init__(self) -> None:
        least = 2 if self.baseline is of_the_group else 1
        if self.group < least:
            raise InputError(
                f"group is {self.group}; Reinforce needs at least {least} completions a prompt with this baseline"
            )
        if not 0 <= self.memory < 1:
            raise InputError(f"memory is {self.memory}; it must be at least 0 and less than 1, for example 0.9")

    @property
    def claim(self) -> Claim:
        known = self.credit in (whole, to_go) and self.kl in (sampled, rao_blackwell)
        apart = self.baseline in (no_baseline, of_the_others, of_earlier_draws)
        bias = "none" if apart else "1/n" if self.baseline is of_the_group else "unknown"
        return Claim(
            fixed_point="p*",
            objective="KL(q||p*)",
            bias=bias if known else "unknown",
            needs=needs_of(self.kl),
            zero_variance=self.baseline is not no_baseline and self.credit is whole and self.kl is sampled,
            source="Williams 1992; Korbak et al. 2022",
        )

    def init(self, prompts: Prompts) -> RunningMean:
        return RunningMean(prompts, self.memory)

    def observe(self, scored: Scored, state: RunningMean) -> None:
        state.observe(scored)

    def loss(self, forward: Forward, scored: Scored, state: RunningMean) -> tuple[Tensor, Info]:
        kl = self.kl(forward, scored)
        credit = self.credit(scored.log_evidence, kl)
        advantage = (credit - self.baseline(credit, scored.draws.prompt_index, state(scored))).detach()
        return weighted_score(forward, advantage, kl.penalty), {"advantage": advantage.abs()}


def weighted_score(forward: Forward, advantage: Tensor, penalty: Tensor) -> Tensor:
    """The mean over completions of sum_t (penalty_t - advantage_t log q_t); advantages (B, T) or (B, 1), without gradient."""
    return (penalty - advantage * forward.log_q).sum(-1).mean()


def needs_of(kl: KLTerm) -> frozenset[str]:
    """What a KL term reads of a pass; one of your own may read the exact KL too."""
    return frozenset({"log_q"}) if kl is sampled else frozenset({"log_q", "kl"})
