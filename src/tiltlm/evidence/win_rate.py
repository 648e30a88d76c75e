"""Rewards that only use a reward's order: the win rate against the prior, and the one whose posterior is best-of-n."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.algebra import Algebra
from tiltlm.evidence.reward_law import RewardLaw
from tiltlm.records import Draws, Likelihood


@dataclass(frozen=True)
class WinRate(Algebra):
    """The probability of beating a draw of the prior, (F + F_-) / 2, ties counting half, as a reward in [0, 1].

    The posterior pi0 exp(win rate / beta) has the largest win rate at its KL, and is unchanged by any increasing
    transformation of the reward. Where rewards are continuous, c = 1 / beta gives the density c e^(cu) / (e^c - 1) of the rank
    u, the win rate ((c - 1) e^c + 1) / (c (e^c - 1)), and KL(p*||pi0) = ((c - 1) e^c + 1) / (e^c - 1) - log((e^c - 1) / c).
    IPO with pairs from the prior, labelled by the reward, has this optimum at beta = tau (Azar et al. 2024).
    """

    law: RewardLaw
    beta: float = 1.0

    def __post_init__(self) -> None:
        _require_temperature(self.beta)

    @property
    def identity(self) -> str:
        return f"win rate of {self.law.identity}"

    @property
    def log_bounds(self) -> tuple[float, float]:
        return 0.0, 1.0 / self.beta

    def at(self, beta: float) -> WinRate:
        """The same reward at another temperature."""
        return replace(self, beta=beta)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        """Win rate / beta of each completion."""
        upto, less, judged = self.law.judge(draws)
        reward = (upto + less) / 2
        return Likelihood(reward / self.beta, {**judged.rewards, "win_rate": reward}, judged.kept)


@dataclass(frozen=True)
class BestOfNReward(Algebra):
    """The reward whose posterior is the law of best-of-n (BOND, Sessa et al. 2024, Theorem 1 and eq. 8).

    r = log F + log(sum_{i=1..n} (F_- / F)^(i-1)) / (n - 1), F and F_- the prior's probabilities of a reward at most, and less
    than, the completion's. At its own temperature 1 / (n - 1), which is the default, the posterior is
    pi0 (F^n - F_-^n) / (F - F_-), best-of-n with ties broken by the order of draw, and log Z = 0. Fitting it by reverse KL is
    variational best-of-n (Amini et al. 2025); like that, it is unchanged by any increasing transformation of the reward.

    The law is known by M draws, and the posterior is best-of-n as far as M >> n: see `RewardLaw` for the bias.

    Attributes:
        law: F and F_-, from `reward_law`.
        n: draws of the best-of-n, at least 2.
        temperature: None for 1 / (n - 1).
    """

    law: RewardLaw
    n: int
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.n < 2:
            raise InputError(f"n is {self.n}; the best of fewer than 2 draws is the prior")
        _require_temperature(self.beta)

    @property
    def beta(self) -> float:
        return 1 / (self.n - 1) if self.temperature is None else self.temperature

    @property
    def identity(self) -> str:
        return f"best of {self.n} of {self.law.identity}"

    @property
    def log_bounds(self) -> tuple[float, float]:
        """F is at most 1, the sum at most n; the least F is that of a completion which is worse than every draw."""
        least = min(self.law.own / (steps.total + self.law.own) for steps in self.law.steps.values())
        low = math.log(least) if least > 0 else -math.inf
        return low / self.beta, math.log(self.n) / (self.n - 1) / self.beta

    def at(self, beta: float) -> BestOfNReward:
        """The same reward at another temperature; only 1 / (n - 1) is best-of-n."""
        return replace(self, temperature=beta)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        """r / beta of each completion; -inf for one that an exact law has worse than all completions."""
        upto, less, judged = self.law.judge(draws)
        reward = best_of_n_reward(upto, less, self.n)
        return Likelihood(reward / self.beta, {**judged.rewards, f"best_of_{self.n}": reward}, judged.kept)


def best_of_n_reward(upto: Float[Tensor, " B"], less: Float[Tensor, " B"], n: int) -> Float[Tensor, " B"]:
    """log F + log(sum_{i=1..n} (F_- / F)^(i-1)) / (n - 1); -inf where F = 0."""
    ratio = torch.where(upto == 0, 0.0, less / upto)
    return upto.log() + (ratio[:, None] ** torch.arange(n)).sum(-1).log() / (n - 1)


def _require_temperature(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise InputError(f"beta is {beta!r}; it is a temperature and must be a positive number")
