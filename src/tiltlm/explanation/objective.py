"""A KL-penalised policy-gradient configuration in words of its own, whatever library it was written for.

Every field says what the update does, not what a library calls it. beta is in reward units per nat, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from tiltlm.errors import InputError
from tiltlm.protocols import Claim

Estimator: TypeAlias = Literal["k1", "k2", "k3", "full", "rao-blackwell", "abs"]
Baseline: TypeAlias = Literal[
    "none", "leave-one-out", "group mean", "batch mean", "earlier draws", "critic", "greedy", "other"
]
Scale: TypeAlias = Literal["none", "group std", "batch std"]
Length: TypeAlias = Literal["sequence mean", "batch mean", "constant", "sum"]


@dataclass(frozen=True)
class KLTerm:
    """One KL penalty, in the reward or in the loss.

    With l = log pi - log pi0 of a token (or of the whole completion): k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l
    (Schulman 2020). "full" sums KL(pi(.|s_t) || pi0(.|s_t)) over the vocabulary and differentiates that alone;
    "rao-blackwell" adds the score term, so that both halves of the gradient are there (Amini et al. 2025).

    Attributes:
        beta: its coefficient.
        level: whether the estimator is applied to each token and summed, or to the completion's log-ratio.
        corrected: the estimator is multiplied by the importance ratio pi / pi_old, and that is differentiated too.
    """

    beta: float
    estimator: Estimator = "k1"
    level: Literal["token", "sequence"] = "token"
    corrected: bool = False

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise InputError(
                f"beta is {self.beta:g}; a negative KL coefficient pushes away from the prior, give 0 or more"
            )


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Anything but a temperature leaves tokens out that the scoring law still counts."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(
                f"temperature is {self.temperature:g}; training draws need a positive one, for example 1.0"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p:g}; it must be above 0 and at most 1, which keeps every token")


@dataclass(frozen=True)
class Objective:
    """What an RL configuration does to a policy.

    Attributes:
        reward_kl: the KL penalty subtracted from the reward.
        loss_kl: the KL penalty added to the loss.
        baseline: what is subtracted; "group mean" includes the draw itself, "batch mean" is over all prompts, "earlier
            draws" are the prompt's own of earlier batches, "greedy" is the reward of the greedy completion,
            "other" depends on the draws in another way.
        baseline_on: whether the baseline is taken of the reward alone or of the reward with its KL penalty.
        scale: what the advantage is divided by.
        scale_on: the same question for that division.
        ddof: 0 for the population's standard deviation, 1 for the sample's.
        eps: added to the standard deviation.
        group: completions a prompt; None stands for very many.
        length: how token losses of a batch are put together.
        loss_kl_length: the same for the KL in the loss, where a library treats it differently; None: as `length`.
        gamma: discount of later rewards.
        lam: lambda of the generalised advantage estimate.
        clip: lower and upper distance of the ratio from 1; None does not clip.
        importance: one ratio a token, or one a completion.
        updates: optimiser steps on one batch of draws.
        policy_scale: a constant that multiplies the policy term alone on the first update (CISPO's clamp).
        reward_clip: range that rewards are clipped to.
        reward_whitening: "score" divides the reward by its own running deviation, "tokens" whitens the token rewards
            with their KL penalty and adds the mean back.
        shaping: penalties that are added to the reward.
        sampling: the law that draws.
        scoring_temperature: the temperature at which draws are scored.
        prior_temperature: the temperature that the configuration itself states for the prior: 1 where a library knows none.
        mask_truncated: completions without EOS carry no gradient.
        sync_every: steps between updates of the reference towards the policy; 0 leaves it alone.
        sync_mix: the policy's share in such an update.
        kl_target: where an adaptive controller of beta wants the KL.
        entropy: coefficient of an entropy bonus.
        drops_uniform_groups: prompts whose completions all have the same reward are left out.
        unmodelled: options that change the gradient already on the first update, in a way that has no closed form.
        unit: what the coefficients are multiples of: "β" where a plan will choose it; empty where they are numbers.
    """

    reward_kl: KLTerm | None = None
    loss_kl: KLTerm | None = None
    baseline: Baseline = "leave-one-out"
    baseline_on: Literal["reward", "total"] = "total"
    scale: Scale = "none"
    scale_on: Literal["reward", "total"] = "total"
    ddof: int = 1
    eps: float = 0.0
    group: int | None = 8
    length: Length = "sum"
    loss_kl_length: Length | None = None
    gamma: float = 1.0
    lam: float = 1.0
    clip: tuple[float, float] | None = None
    importance: Literal["token", "sequence"] = "token"
    updates: int = 1
    policy_scale: float = 1.0
    reward_clip: tuple[float, float] | None = None
    reward_whitening: Literal["none", "score", "tokens"] = "none"
    shaping: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    scoring_temperature: float = 1.0
    prior_temperature: float = 1.0
    mask_truncated: bool = False
    sync_every: int = 0
    sync_mix: float = 1.0
    kl_target: float | None = None
    entropy: float = 0.0
    drops_uniform_groups: bool = False
    unmodelled: tuple[str, ...] = ()
    unit: str = ""

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise InputError(f"group is {self.group}; it must be at least 1 completion a prompt")
        if not 0 < self.gamma <= 1:
            raise InputError(f"gamma is {self.gamma:g}; it must be above 0 and at most 1")
        if self.updates < 1:
            raise InputError(f"updates is {self.updates}; there must be at least 1 a batch")

    @property
    def beta(self) -> float:
        """Sum of both coefficients."""
        return sum(term.beta for term in (self.reward_kl, self.loss_kl) if term is not None)

    def amount(self, beta: float) -> str:
        """A coefficient as it is written: with its unit."""
        number = f"{beta:.6g}"
        return f"{number}·{self.unit}" if self.unit and beta != 1 else self.unit or number

    @property
    def kl_outside_baseline(self) -> bool:
        """Whether some of the KL does not pass through the baseline, so that a shrunken reward changes their balance."""
        return _active(self.loss_kl) or (_active(self.reward_kl) and self.baseline_on == "reward")

    @property
    def kl_outside_scale(self) -> bool:
        """The same for the division by a standard deviation."""
        return _active(self.loss_kl) or (_active(self.reward_kl) and self.scale_on == "reward")


@dataclass(frozen=True)
class PairLoss:
    """A loss on pairs of completions (the DPO family), for configurations of that kind.

    Attributes:
        kind: "sigmoid" (DPO), "ipo", or the library's name of another.
        labels: who says which completion is better: a data set of preferences, or a reward that is compared.
        online: whether the pairs are drawn from the policy itself.
    """

    beta: float
    kind: str = "sigmoid"
    labels: Literal["data", "reward"] = "data"
    online: bool = False


@dataclass(frozen=True)
class Claimed:
    """An engine of ours that says itself where it settles; the conformance suite proves it.

    Attributes:
        claim: what it says.
        engine: its name.
        beta: the target's; None where a plan will choose it.
        temperature: of the prior.
        taught: the law of the completions that it is given, where a teacher makes them; empty where that is not known.
        refused: why it is not trained as configured; empty where it is.
    """

    claim: Claim
    engine: str
    beta: float | None
    temperature: float = 1.0
    taught: str = ""
    refused: str = ""

    @property
    def fixed_point(self) -> str:
        """The claim's, or the teacher's where what is given is what is learned."""
        return self.taught if self.taught and self.claim.fixed_point == "data" else self.claim.fixed_point


def _active(term: KLTerm | None) -> bool:
    return term is not None and term.beta != 0
