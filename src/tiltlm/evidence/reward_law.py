"""The law of a reward under the prior, prompt by prompt: what a reward's rank among the prior's completions is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import Evidence, Prior
from tiltlm.records import Draws, Likelihood, Prompts, Scored
from tiltlm.seeds import generator
from tiltlm.target import Target

TIE = 1e-12
"""Rewards that differ by less, relative to 1 or to their size, are equal."""


@dataclass(frozen=True)
class Steps:
    """One prompt's reward law: a step function.

    Attributes:
        values: the rewards, ascending.
        below: weight of the rewards before each of them, and of all of them at the end; the last is `total`.
    """

    values: Float[Tensor, " M"]
    below: Float[Tensor, " N"]

    @property
    def total(self) -> float:
        return float(self.below[-1])

    @classmethod
    def of(cls, reward: Float[Tensor, " M"], weight: Float[Tensor, " M"]) -> Steps:
        values, order = reward.sort()
        return cls(values, torch.cat([weight.new_zeros(1), weight[order].cumsum(0)]))

    def upto(self, reward: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Weight of the rewards at most `reward`."""
        return self.below[torch.searchsorted(self.values, reward + _tie(reward), right=True)]

    def less(self, reward: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Weight of the rewards less than `reward`."""
        return self.below[torch.searchsorted(self.values, reward - _tie(reward))]


@dataclass(frozen=True)
class RewardLaw:
    """F(r|c), the prior's probability of a reward at most r, and F_-(r|c), of one less than r, for each prompt.

    From M independent prior draws, F and F_- are their shares, with the completion that is judged counted among them:
    F = (1 + #{r_i <= r}) / (M + 1) and F_- = #{r_i < r} / (M + 1). So F is never 0, however bad a completion, and no ratio of
    it infinite; F is biased upwards by (1 - F) / (M + 1), F_- downwards by F_- / (M + 1), and log F besides by about
    -(1 - F) / (2 M F). From a list of all completions, both are exact.

    Attributes:
        reward: whose law it is; only its order matters.
        own: what the judged completion itself counts: 1 draw, or 0 where the law is exact.
    """

    reward: Evidence
    steps: Mapping[str, Steps] = field(repr=False)
    own: float = 1.0

    @classmethod
    def of(cls, reward: Evidence, scored: Scored, *, own: float = 1.0) -> RewardLaw:
        """From scored draws, weighted by pi0 / q: prior draws count one each.

        Args:
            scored: draws scored with `reward` as the evidence, at any beta; for instance those of `plan`. For an exact law,
                all completions with log q = 0 (`Exact.listed`) and own=0.
        """
        index, value = scored.draws.prompt_index, scored.beta * scored.log_evidence.double()
        weight = (scored.log_prior - scored.draws.log_q).double().sum(-1).exp()
        keys = prompt_keys(scored.draws.prompts)
        steps = {keys[p]: Steps.of(value[index == p], weight[index == p]) for p in index.unique().tolist()}
        return cls(reward, steps, own)

    def judge(self, draws: Draws) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"], Likelihood]:
        """F and F_- of each completion's reward (NaN where it was dropped), and what the reward said.

        Raises:
            InputError: for a prompt that the law does not know.
        """
        likelihood = self.reward.log_likelihood(draws)
        value = self.reward.beta * likelihood.log.double()
        upto, less = torch.full_like(value, torch.nan), torch.full_like(value, torch.nan)
        keys = prompt_keys(draws.prompts)
        for prompt in draws.prompt_index.unique().tolist():
            if keys[prompt] not in self.steps:
                raise InputError(
                    f"the reward law has no draws of prompt {str(draws.prompts.texts[prompt])!r:.80}; make it with all the "
                    f"prompts that you train, plan or decode on"
                )
            steps = self.steps[keys[prompt]]
            rows = ((draws.prompt_index == prompt) & likelihood.kept).nonzero().flatten()
            whole = steps.total + self.own
            upto[rows] = (steps.upto(value[rows]) + self.own) / whole
            less[rows] = steps.less(value[rows]) / whole
        return upto.clamp(max=1.0), less, likelihood

    @property
    def identity(self) -> str:
        """Tells this law from another: the reward's, and how many draws it is known by."""
        beta_free = getattr(self.reward, "identity", type(self.reward).__name__)
        return f"{beta_free} by {sum(len(s.values) for s in self.steps.values())} draws of {len(self.steps)} prompts"


def reward_law(
    prior: Prior, reward: Evidence, prompts: Prompts | Sequence[Any], *, samples: int = 256, seed: int = 0
) -> RewardLaw:
    """The law of a reward under the prior, from `samples` fresh draws a prompt.

    Raises:
        InputError: if samples is not positive, or some prompt has no draw with a usable reward.
    """
    if samples < 1:
        raise InputError(f"samples is {samples}; draw at least 1 completion a prompt, better some hundreds")
    encoded = prior.encode(prompts)
    scored = Target(prior, reward).score(prior.draw(encoded, samples, generator(seed, "reward law")))
    missing = len(encoded) - len(scored.draws.prompt_index.unique())
    if missing:
        raise InputError(
            f"{missing} of {len(encoded)} prompts have no completion with a usable reward in {samples} samples; raise "
            f"samples, or mend the reward"
        )
    return RewardLaw.of(reward, scored)


def prompt_keys(prompts: Prompts) -> list[str]:
    """Each prompt with its columns, which rewards may read, as text."""
    columns = [dict(zip(prompts.columns, row, strict=True)) for row in zip(*prompts.columns.values(), strict=True)]
    rows = zip(prompts.texts, columns or [{}] * len(prompts), strict=True)
    return [json.dumps(row, sort_keys=True, default=str) for row in rows]


def _tie(reward: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Half-width of a tie; 0 where the reward is infinite."""
    return torch.where(reward.isfinite(), TIE * reward.abs().clamp(min=1.0), 0.0)
