"""Several rewards for one thing: draws of a reward model's posterior, or the members of an ensemble.

A reward that was learned from comparisons is known only up to an offset b(c) for every prompt, and each member has its own. So
members are centred at their prior means E_pi0[r_m | c] before anything is compared across them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.errors import InputError, TiltWarning
from tiltlm.estimates import Estimate
from tiltlm.evidence.function import OnError, TextFunction, number_fault, values_of
from tiltlm.evidence.reward_law import prompt_keys
from tiltlm.protocols import Prior
from tiltlm.records import Draws, Prompts
from tiltlm.seeds import generator
from tiltlm.weights import normalise

LOOSE_LOG_Z = 0.5
"""A standard error of log Z, in nats, from which on a mixture's shares are not to be trusted."""


@dataclass(frozen=True)
class Members:
    """M rewards r_m(x, c), functions as `Reward` takes them, each with its probability.

    Attributes:
        functions: one a member; `RewardModel.functions(k, seed)` gives those of a learned reward.
        weights: probabilities of the members, which sum to one; None for equal ones.
        bounds: smallest and largest reward that any member can return; a value outside them is an error.
        name: in logs, where `name_mean` and `name_sd` are the members' mean and standard deviation.
        on_error: as `Reward`'s; a completion is dropped if one member cannot judge it.
    """

    functions: tuple[TextFunction, ...]
    weights: tuple[float, ...] | None = None
    bounds: tuple[float, float] | None = None
    name: str = "reward"
    on_error: OnError = "fail"

    def __post_init__(self) -> None:
        object.__setattr__(self, "functions", tuple(self.functions))
        if not self.functions:
            raise InputError("functions is empty; give the members' reward functions, better four or more")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise InputError(f"bounds are {self.bounds}; give them as (smallest, largest), or None if unknown")
        if self.weights is None:
            return
        if len(self.weights) != len(self.functions):
            raise InputError(
                f"weights has {len(self.weights)} values for {len(self.functions)} members; give one a member"
            )
        if min(self.weights) < 0 or abs(math.fsum(self.weights) - 1) > 1e-9:
            raise InputError(f"weights sum to {math.fsum(self.weights):g}; give probabilities, which sum to 1")

    def __len__(self) -> int:
        return len(self.functions)

    @property
    def probabilities(self) -> Float[Tensor, " M"]:
        if self.weights is None:
            return torch.full((len(self),), 1 / len(self), dtype=torch.float64)
        return torch.tensor(self.weights, dtype=torch.float64)

    @property
    def identity(self) -> str:
        """Tells these members from others."""
        return f"{self.name} of {len(self)} members {self.bounds} {self.on_error}"

    def rewards(self, draws: Draws) -> tuple[Float[Tensor, "M B"], Bool[Tensor, " B"]]:
        """Every member's reward of every completion, NaN where it could not judge; and which completions all could."""
        fault = number_fault(self.bounds)
        judged = [
            values_of(fn, draws, "reward", f"{self.name} {m}", fault, self.on_error)
            for m, fn in enumerate(self.functions, 1)
        ]
        return torch.stack([values for values, _ in judged]), torch.stack([kept for _, kept in judged]).all(0)


@dataclass(frozen=True)
class PriorRewards:
    """What the members say of prior draws, prompt by prompt: it fixes each member's mean, and its log Z at any temperature.

    Attributes:
        members: whose rewards these are.
        rewards, log_weights: [M, N] and [N] for each prompt: rewards of draws, and log pi0 / q of each.
    """

    members: Members
    rewards: Mapping[str, Float[Tensor, "M N"]] = field(repr=False)
    log_weights: Mapping[str, Float[Tensor, " N"]] = field(repr=False)
    exact: bool = False

    @classmethod
    def of(
        cls, members: Members, draws: Draws, log_prior: Float[Tensor, "B T"] | None = None, *, exact: bool = False
    ) -> PriorRewards:
        """From draws that are there already.

        Args:
            draws: of the prior, or of anything if `log_prior` is given.
            log_prior: the prior's log-probabilities of them, such as `scored.log_prior`.
            exact: the draws are all completions, and their weights pi0 / q the probabilities (`Exact.listed`).
        """
        values, kept = members.rewards(draws)
        log_w = torch.zeros(len(draws), dtype=torch.float64)
        if log_prior is not None:
            log_w = (log_prior - draws.log_q).double().sum(-1)
        keys = prompt_keys(draws.prompts)
        rewards, log_weights = {}, {}
        for prompt in draws.prompt_index.unique().tolist():
            rows = ((draws.prompt_index == prompt) & kept).nonzero().flatten()
            if len(rows):
                rewards[keys[prompt]], log_weights[keys[prompt]] = values[:, rows], log_w[rows]
        return cls(members, rewards, log_weights, exact)

    def means(self, draws: Draws) -> Float[Tensor, "M B"]:
        """E_pi0[r_m | c] for the prompt of each completion."""
        return self._by_row(draws, {key: self.mean_of(key) for key in self.rewards})

    def log_z(self, draws: Draws, beta: float) -> Float[Tensor, "M B"]:
        """log Z_m(c) = log E_pi0[exp(r_m / beta) | c] for the prompt of each completion."""
        return self._by_row(draws, {key: self._log_z(key, beta)[0] for key in self.rewards})

    def log_z_estimates(self, beta: float) -> Mapping[str, tuple[Estimate, ...]]:
        """log Z_m(c) of every prompt, a member after the other, with the error that the draws leave."""
        found = {}
        for key, values in self.rewards.items():
            log_z, errors = self._log_z(key, beta)
            pairs = zip(log_z.tolist(), errors.tolist(), strict=True)
            found[key] = tuple(Estimate(value, error, values.shape[1]) for value, error in pairs)
        return found

    def warn_if_loose(self, beta: float) -> None:
        """Warn where the draws do not tell some log Z well enough.

        Warns:
            TiltWarning: with the largest standard error.
        """
        errors = [e.stderr for some in self.log_z_estimates(beta).values() for e in some]
        worst = max((math.inf if math.isnan(error) else error for error in errors), default=0.0)
        if worst > LOOSE_LOG_Z:
            warnings.warn(
                f"a member's log Z is known only to ± {worst:.2g} nats at beta {beta:g}, so that its share of the mixture is "
                f"uncertain; raise samples or beta",
                TiltWarning,
                stacklevel=4,
            )

    @property
    def identity(self) -> str:
        """Tells these from others: the members, and how many draws."""
        return f"{self.members.identity} by {sum(v.shape[1] for v in self.rewards.values())} draws of {len(self.rewards)} prompts"

    def _shares(self, key: str) -> Float[Tensor, " N"]:
        log_w = self.log_weights[key]
        return normalise(log_w, torch.zeros(len(log_w), dtype=torch.long), 1)

    def mean_of(self, key: str) -> Float[Tensor, " M"]:
        """E_pi0[r_m | c] of the prompt with this key."""
        return self.rewards[key] @ self._shares(key)

    def _log_z(self, key: str, beta: float) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
        """log Z and its standard error, of a self-normalised mean by the delta method."""
        shares, log_f = self._shares(key), self.rewards[key] / beta
        log_z = (log_f + shares.log()).logsumexp(-1)
        relative = (log_f - log_z[:, None]).exp() - 1
        count = len(shares)
        if self.exact:
            return log_z, torch.zeros_like(log_z)
        if count < 2:
            return log_z, torch.full_like(log_z, torch.nan)
        return log_z, ((shares * relative).square().sum(-1) * count / (count - 1)).sqrt()

    def _by_row(self, draws: Draws, known: Mapping[str, Float[Tensor, " M"]]) -> Float[Tensor, "M B"]:
        keys = prompt_keys(draws.prompts)
        table = torch.full((len(self.members), len(keys)), torch.nan, dtype=torch.float64)
        for prompt in draws.prompt_index.unique().tolist():
            if keys[prompt] not in known:
                raise InputError(
                    f"the members have no prior draws of prompt {str(draws.prompts.texts[prompt])!r:.80}; make them with all the "
                    f"prompts that you train, plan or decode on: prior_rewards(prior, members, prompts)"
                )
            table[:, prompt] = known[keys[prompt]]
        return table[:, draws.prompt_index]


def prior_rewards(
    prior: Prior, members: Members, prompts: Prompts | Sequence[Any], *, samples: int = 256, seed: int = 0
) -> PriorRewards:
    """The members' rewards on `samples` fresh prior draws a prompt.

    Raises:
        InputError: if samples is less than 2, or some prompt has no draw that all members could judge.
    """
    if samples < 2:
        raise InputError(f"samples is {samples}; draw at least 2 completions a prompt, better some hundreds")
    encoded = prior.encode(prompts)
    found = PriorRewards.of(members, prior.draw(encoded, samples, generator(seed, "prior rewards")))
    missing = len(set(prompt_keys(encoded)) - found.rewards.keys())
    if missing:
        raise InputError(
            f"{missing} of {len(encoded)} prompts have no completion that all members can judge in {samples} samples; raise "
            f"samples, or mend the members"
        )
    return found


def weighted_log_mean(log_values: Float[Tensor, "M B"], probabilities: Float[Tensor, " M"]) -> Float[Tensor, " B"]:
    """log sum_m p_m exp(v_m)."""
    return (log_values + probabilities.log()[:, None]).logsumexp(0)


def moments_of(
    values: Float[Tensor, "M B"], probabilities: Float[Tensor, " M"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Mean and variance over members."""
    mean = probabilities @ values
    return mean, probabilities @ (values - mean).square()


__all__ = ["Members", "PriorRewards", "moments_of", "prior_rewards", "weighted_log_mean"]
