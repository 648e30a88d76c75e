"""Sums and multiples of evidence: log-likelihoods add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tiltlm.errors import InputError
from tiltlm.records import Draws, Likelihood


class Algebra:
    """Operators for evidence. `a + b`, `a - b`, `2 * a`, `-a`; `prior * a` is a target, and so is `prior * a * b`.

    Attributes:
        tempered: whether the temperature changes this evidence. A hard constraint's 0 or -inf is the same at any.
    """

    @property
    def tempered(self) -> bool:
        return True

    def __add__(self, other: Any) -> Sum:
        return Sum((self, other))

    def __sub__(self, other: Any) -> Sum:
        return Sum((self, Scaled(-1.0, other)))

    def __neg__(self) -> Scaled:
        return Scaled(-1.0, self)

    def __mul__(self, factor: float) -> Scaled:
        if not isinstance(factor, int | float):
            return NotImplemented
        return Scaled(float(factor), self)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Scaled(Algebra):
    """Evidence with its log-likelihood, and so its reward, multiplied by `factor`."""

    factor: float
    inner: Any

    @property
    def beta(self) -> float:
        return self.inner.beta

    @property
    def log_bounds(self) -> tuple[float, float] | None:
        if self.inner.log_bounds is None:
            return None
        ends = [self.factor * end if self.factor else 0.0 for end in self.inner.log_bounds]
        return min(ends), max(ends)

    @property
    def tempered(self) -> bool:
        return tempered(self.inner)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        """The inner log-likelihood times the factor.

        Raises:
            InputError: if the inner one is -inf and the factor is not positive: what is impossible cannot be made likely.
        """
        inner = self.inner.log_likelihood(draws)
        if self.factor <= 0 and (inner.log == -torch.inf).any():
            raise InputError(
                f"evidence {self.inner.identity!r} is -inf for some completion and cannot be multiplied by {self.factor:g}; "
                f"subtract no hard constraint: give the opposite one, or Constraint(fn, penalty=...)"
            )
        return Likelihood(self.factor * inner.log, inner.rewards, inner.kept)

    @property
    def identity(self) -> str:
        """Tells this evidence from another."""
        return f"{self.factor} * ({self.inner.identity})"

    def at(self, beta: float) -> Scaled:
        return Scaled(self.factor, self.inner.at(beta))


@dataclass(frozen=True)
class Sum(Algebra):
    """Evidence from several sources: likelihoods multiply, so their logarithms add.

    Each term keeps its own temperature: `prior * Reward(a, beta=0.1) * Reward(b, beta=0.5)` is the prior times
    exp(a / 0.1 + b / 0.5), a product of experts. Where all tempered terms share a temperature, it is the sum's, and
    `at(beta)` moves them all. Where they differ the sum is a reward in nats at temperature 1, and `at(beta)` divides the whole
    of it: exp((a / 0.1 + b / 0.5) / beta). Hard constraints have no part in either. Parts are logged by their names, in their
    own units; a name that is there already gets a prime.

    Attributes:
        temperature: divides the sum of terms whose own temperatures differ; their reward is then in nats.
    """

    terms: tuple[Any, ...]
    temperature: float = 1.0

    @property
    def beta(self) -> float:
        """The common temperature of the terms; where they differ, the sum's own."""
        return self._common or self.temperature

    @property
    def tempered(self) -> bool:
        return any(tempered(term) for term in self.terms)

    @property
    def _common(self) -> float | None:
        betas = {term.beta for term in self.terms if tempered(term) or not self.tempered}
        return betas.pop() if len(betas) == 1 else None

    @property
    def _divisor(self) -> float:
        return 1.0 if self._common else self.temperature

    @property
    def log_bounds(self) -> tuple[float, float] | None:
        ends = [term.log_bounds for term in self.terms]
        if any(end is None for end in ends):
            return None
        return sum(low for low, _ in ends) / self._divisor, sum(high for _, high in ends) / self._divisor

    def log_likelihood(self, draws: Draws) -> Likelihood:
        first, *rest = [term.log_likelihood(draws) for term in self.terms]
        log, rewards, kept = first.log, dict(first.rewards), first.kept
        for part in rest:
            log, kept = log + part.log, kept & part.kept
            for name, value in part.rewards.items():
                unique = name
                while unique in rewards:
                    unique += "'"
                rewards[unique] = value
        return Likelihood(log / self._divisor, rewards, kept)

    @property
    def identity(self) -> str:
        """Tells this evidence from another."""
        return " + ".join(f"({term.identity} / {term.beta})" for term in self.terms)

    def at(self, beta: float) -> Sum:
        """The same rewards at another temperature: of every term where they share one, else of the sum."""
        if self._common:
            return Sum(tuple(term.at(beta) for term in self.terms))
        return Sum(self.terms, beta)


def tempered(evidence: Any) -> bool:
    """Whether the temperature changes this evidence, which may be anybody's; see `Algebra`."""
    return getattr(evidence, "tempered", True)
