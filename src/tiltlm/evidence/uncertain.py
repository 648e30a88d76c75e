"""An uncertain reward as evidence: what "the posterior" can mean when there are several rewards for one thing.

Given members r_m(x, c) with probabilities w_m, three targets are usually confused:

- `EvidenceAverage`: average the likelihoods, pi0 · E_m exp(r_m / beta);
- `MixtureOfPosteriors`: average the posteriors, E_m p*_m;
- `LogPool`: average the rewards, pi0 exp(E_m r_m / beta).

For r_m(x) ~ N(mu, s^2) independently over x the first is pi0 exp(mu / beta + s^2 / (2 beta^2)): it seeks what is uncertain. The
second minimises E_m KL(p*_m || q) over q, the third E_m KL(q || p*_m). The second and third do not change if a member's reward is
shifted by a constant at some prompt; the first does. `LowerConfidenceBound`, `WorstOfEnsemble` and `VariancePenalised` avoid what
is uncertain, and are none of the three.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError, TiltWarning
from tiltlm.evidence.algebra import Algebra
from tiltlm.evidence.members import Members, PriorRewards, moments_of, weighted_log_mean
from tiltlm.records import Draws, Likelihood


class _Uncertain(Algebra, ABC):
    """Evidence u / beta of a reward u that is made of the members' rewards."""

    members: Members | PriorRewards

    @property
    def _members(self) -> Members:
        return self.members.members if isinstance(self.members, PriorRewards) else self.members

    @property
    @abstractmethod
    def beta(self) -> float: ...

    @property
    @abstractmethod
    def _word(self) -> str: ...

    @abstractmethod
    def _combined(self, rewards: Float[Tensor, "M B"], draws: Draws) -> Float[Tensor, " B"]:
        """u of each completion, in reward units."""

    @property
    @abstractmethod
    def _reward_bounds(self) -> tuple[float, float] | None:
        """Smallest and largest u, None where the members' bounds are unknown."""

    @property
    def log_bounds(self) -> tuple[float, float] | None:
        bounds = self._reward_bounds
        return None if bounds is None else (bounds[0] / self.beta, bounds[1] / self.beta)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        """u / beta of each completion. Logged as well: the members' mean, and their standard deviation, centred where they can be."""
        rewards, kept = self._members.rewards(draws)
        mean, _ = moments_of(rewards, self._members.probabilities)
        _, variance = moments_of(self._centred(rewards, draws), self._members.probabilities)
        if not len(draws):
            return Likelihood(mean, {self._word: mean}, kept)
        judged = draws if bool(kept.all()) else draws.select(kept)
        combined = torch.full_like(mean, torch.nan)
        combined[kept] = self._combined(rewards[:, kept], judged)
        name = self._members.name
        parts = {self._word: combined, f"{name}_mean": mean, f"{name}_sd": variance.sqrt()}
        return Likelihood(combined / self.beta, parts, kept)

    def _centred(self, rewards: Float[Tensor, "M B"], draws: Draws) -> Float[Tensor, "M B"]:
        """The rewards from the members' common zero, if their prior means are known."""
        return rewards - self.members.means(draws) if isinstance(self.members, PriorRewards) else rewards


# --- the three that are usually confused ---


@dataclass(frozen=True)
class EvidenceAverage(_Uncertain):
    """pi0(x|c) E_m exp(r_m(x, c) / b): the posterior if which member is right were drawn anew, unnormalised, for every text.

    Risk-seeking: a completion on which the members disagree gains, by about var / (2 b^2) nats. A member's offset is its weight:
    shifted by +2 at some prompt, it counts exp(2 / b) times there, though no comparison could tell.

    The reward is the certainty equivalent u = b log E_m exp(r_m / b). `at(beta)` tempers the target as a whole, exp(u / beta) with
    the same u, as `plan` needs it; the evidence average of other tilts is another `member_beta`.

    Attributes:
        members: r_m; or centred ones, `PriorRewards`, which take each member's prior mean off it, prompt by prompt.
        member_beta: b, the temperature at which a member's reward is evidence.
        temperature: of u; None for `member_beta`.

    Warns:
        TiltWarning: if the members are not centred.
    """

    members: Members | PriorRewards
    member_beta: float = 1.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        _require_temperature(self.member_beta)
        _require_temperature(self.beta)
        if isinstance(self.members, Members) and len(self.members) > 1 and self.temperature is None:
            warnings.warn(
                "an evidence average depends on every member's offset at every prompt, and comparisons do not tell of it; if the "
                "members were learned from comparisons, centre them: EvidenceAverage(prior_rewards(prior, members, prompts))",
                TiltWarning,
                stacklevel=3,
            )

    @property
    def beta(self) -> float:
        return self.member_beta if self.temperature is None else self.temperature

    @property
    def identity(self) -> str:
        """Tells this evidence from another."""
        return f"evidence average at {self.member_beta} of {self.members.identity}"

    @property
    def _word(self) -> str:
        return "evidence_average"

    @property
    def _reward_bounds(self) -> tuple[float, float] | None:
        return _centred_bounds(self.members)

    def _combined(self, rewards: Float[Tensor, "M B"], draws: Draws) -> Float[Tensor, " B"]:
        centred = self._centred(rewards, draws)
        return self.member_beta * weighted_log_mean(centred / self.member_beta, self._members.probabilities)

    def at(self, beta: float) -> EvidenceAverage:
        """The same u at another temperature."""
        return replace(self, temperature=beta)


@dataclass(frozen=True)
class MixtureOfPosteriors(_Uncertain):
    """E_m p*_m(x|c), p*_m = pi0 exp(r_m / b) / Z_m(c): draw a member, then a text of its posterior.

    Of all laws q it has the least E_m KL(p*_m || q): no member's posterior is missed. Members' offsets cancel.

    The reward is u = b log E_m exp(r_m / b - log Z_m(c)), so that log Z(c) of this target is 0 at its own temperature as far as the
    log Z_m are known: they are estimated from the prior draws of `members`, and `log_z_estimates(b)` has their errors. `at(beta)`
    tempers the mixture as a whole, exp(u / beta) with the same u.

    Attributes:
        members: with their rewards on prior draws.
        member_beta: b.
        temperature: of u; None for `member_beta`.

    Warns:
        TiltWarning: if some log Z_m is known too badly.
    """

    members: PriorRewards  # pyright: ignore[reportIncompatibleVariableOverride]
    member_beta: float = 1.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        _require_temperature(self.member_beta)
        _require_temperature(self.beta)
        if not isinstance(self.members, PriorRewards):
            raise InputError(
                "members have no prior draws; give prior_rewards(prior, members, prompts), which a mixture needs for log Z"
            )
        if self.temperature is None:
            self.members.warn_if_loose(self.member_beta)

    @property
    def beta(self) -> float:
        return self.member_beta if self.temperature is None else self.temperature

    @property
    def identity(self) -> str:
        """Tells this evidence from another."""
        return f"mixture of posteriors at {self.member_beta} of {self.members.identity}"

    @property
    def _word(self) -> str:
        return "mixture_of_posteriors"

    @property
    def _reward_bounds(self) -> tuple[float, float] | None:
        bounds = self._members.bounds
        if bounds is None:
            return None
        known = [e.value for some in self.members.log_z_estimates(self.member_beta).values() for e in some]
        return bounds[0] - self.member_beta * max(known), bounds[1] - self.member_beta * min(known)

    def _combined(self, rewards: Float[Tensor, "M B"], draws: Draws) -> Float[Tensor, " B"]:
        log_ratio = rewards / self.member_beta - self.members.log_z(draws, self.member_beta)
        return self.member_beta * weighted_log_mean(log_ratio, self._members.probabilities)

    def at(self, beta: float) -> MixtureOfPosteriors:
        """The same u at another temperature."""
        return replace(self, temperature=beta)


@dataclass(frozen=True)
class _Tempered(_Uncertain):
    """A reward that does not depend on the temperature."""

    @property
    def identity(self) -> str:
        """Tells this evidence from another."""
        return f"{self._word} of {self._members.identity}"

    def at(self, beta: float) -> Self:
        """The same reward at another temperature."""
        return replace(self, beta=beta)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True)
class LogPool(_Tempered):
    """pi0(x|c) exp(E_m r_m(x, c) / beta): the posterior of the mean reward, a geometric mean of the members' posteriors.

    Of all laws q it has the least E_m KL(q || p*_m). Members' offsets cancel. It knows no risk: where all members share an error,
    or where they disagree, only their mean counts.
    """

    members: Members | PriorRewards
    beta: float = 1.0  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __post_init__(self) -> None:
        _require_temperature(self.beta)

    @property
    def _word(self) -> str:
        return "log_pool"

    @property
    def _reward_bounds(self) -> tuple[float, float] | None:
        return self._members.bounds

    def _combined(self, rewards: Float[Tensor, "M B"], draws: Draws) -> Float[Tensor, " B"]:
        return moments_of(rewards, self._members.probabilities)[0]


# --- risk-averse ---


@dataclass(frozen=True)
class _Averse(_Tempered):
    """A pessimistic reward of centred members, r_m(x, c) - E_pi0[r_m | c]."""

    members: PriorRewards  # pyright: ignore[reportIncompatibleVariableOverride]
    beta: float = 1.0  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __post_init__(self) -> None:
        _require_temperature(self.beta)
        if not isinstance(self.members, PriorRewards):
            raise InputError(
                "members are not centred; give prior_rewards(prior, members, prompts), because rewards of different members are "
                "comparable only from a common zero"
            )

    @property
    def identity(self) -> str:
        """Tells this evidence from another."""
        return f"{self._word} {self._setting:g} of {self.members.identity}"

    @property
    def _setting(self) -> float:
        return 0.0

    @property
    def _reward_bounds(self) -> tuple[float, float] | None:
        bounds = _centred_bounds(self.members)
        return None if bounds is None else (bounds[0] - self._worst_loss(bounds[1] - bounds[0]), bounds[1])

    def _worst_loss(self, width: float) -> float:
        """What uncertainty can cost at most, if centred rewards lie in an interval of this width."""
        return 0.0

    def _combined(self, rewards: Float[Tensor, "M B"], draws: Draws) -> Float[Tensor, " B"]:
        return self._pessimistic(self._centred(rewards, draws))

    @abstractmethod
    def _pessimistic(self, centred: Float[Tensor, "M B"]) -> Float[Tensor, " B"]: ...


@dataclass(frozen=True)
class LowerConfidenceBound(_Averse):
    """pi0(x|c) exp((mean_m r_m - k sd_m r_m) / beta), members centred: a reward counts as far as it is sure (Yang et al. 2024).

    Attributes:
        k: standard deviations, not negative; 0 is the log-pool.
    """

    k: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_not_negative("k", self.k)

    @property
    def _word(self) -> str:
        return "lower_confidence_bound"

    @property
    def _setting(self) -> float:
        return self.k

    def _worst_loss(self, width: float) -> float:
        return self.k * width / 2  # Popoviciu's inequality

    def _pessimistic(self, centred: Float[Tensor, "M B"]) -> Float[Tensor, " B"]:
        mean, variance = moments_of(centred, self._members.probabilities)
        return mean - self.k * variance.sqrt()


@dataclass(frozen=True)
class WorstOfEnsemble(_Averse):
    """pi0(x|c) exp(min_m r_m / beta), members centred: what the most sceptical member grants (Coste et al. 2024, WCO).

    Every member of positive probability counts alike.
    """

    @property
    def _word(self) -> str:
        return "worst_of_ensemble"

    def _pessimistic(self, centred: Float[Tensor, "M B"]) -> Float[Tensor, " B"]:
        return centred[self._members.probabilities > 0].amin(0)


@dataclass(frozen=True)
class VariancePenalised(_Averse):
    """pi0(x|c) exp((mean_m r_m - penalty var_m r_m) / beta), members centred (Coste et al. 2024, UWO).

    With penalty = 1 / (2 beta) the loss is what an evidence average of Gaussian members gains.

    Attributes:
        penalty: in 1 / reward units, not negative; 0 is the log-pool.
    """

    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_not_negative("penalty", self.penalty)

    @property
    def _word(self) -> str:
        return "variance_penalised"

    @property
    def _setting(self) -> float:
        return self.penalty

    def _worst_loss(self, width: float) -> float:
        return self.penalty * width**2 / 4  # Popoviciu's inequality

    def _pessimistic(self, centred: Float[Tensor, "M B"]) -> Float[Tensor, " B"]:
        mean, variance = moments_of(centred, self._members.probabilities)
        return mean - self.penalty * variance


def _centred_bounds(members: Members | PriorRewards) -> tuple[float, float] | None:
    """Bounds of the rewards, less their prior means where these are known: any member's, at any prompt."""
    if isinstance(members, Members):
        return members.bounds
    bounds = members.members.bounds
    if bounds is None:
        return None
    means = torch.cat([members.mean_of(key) for key in members.rewards])
    return bounds[0] - float(means.max()), bounds[1] - float(means.min())


def _require_temperature(beta: float) -> None:
    if not isinstance(beta, int | float) or not 0 < beta < math.inf:
        raise InputError(f"beta is {beta!r}; it is a temperature in reward units per nat and must be a positive number")


def _require_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InputError(f"{name} is {value!r}; give a number that is not negative (0 leaves the mean reward)")
