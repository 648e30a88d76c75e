"""Numbers with what one needs to know of them: estimates, their errors, and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from scipy.special import stdtrit

if TYPE_CHECKING:  # reports are written without torch
    from jaxtyping import Float
    from torch import Tensor

Z95 = 1.959964
"""Standard normal quantile of a 95% interval."""

Kind = Literal["point", "lower", "upper"]


@dataclass(frozen=True)
class Estimate:
    """A number with what one needs to know of it.

    Attributes:
        value: the estimate.
        stderr: its standard error; NaN where one sample cannot tell.
        n: the samples behind it.
        kind: whether its expectation is the quantity ("point") or bounds it ("lower", "upper").
        df: degrees of freedom of the standard error; inf where it is as good as known.
    """

    value: float
    stderr: float
    n: int
    kind: Kind = "point"
    df: float = math.inf

    @staticmethod
    def of(values: Float[Tensor, " N"], kind: Kind = "point", each: int = 1) -> Estimate:
        """The mean of independent values: of a single one without an error, of one that is -inf with none, as nothing can change it.

        Args:
            each: samples behind a value.
        """
        n = len(values)
        stderr = math.nan if n < 2 else float(values.std()) / math.sqrt(n) if values.isfinite().all() else 0.0
        return Estimate(float(values.mean()), stderr, n * each, kind, n - 1)

    @staticmethod
    def mean(estimates: Sequence[Estimate]) -> Estimate:
        """The mean of independent estimates of one kind, such as one a prompt."""
        count = len(estimates)
        stderr, df = error_of_sum([(e.stderr / count, e.df) for e in estimates])
        return Estimate(
            sum(e.value for e in estimates) / count, stderr, sum(e.n for e in estimates), estimates[0].kind, df
        )

    def plus(self, other: Estimate) -> Estimate:
        """The sum with an independent estimate; it is a bound if this one is."""
        stderr, df = error_of_sum([(self.stderr, self.df), (other.stderr, other.df)])
        return replace(self, value=self.value + other.value, stderr=stderr, df=df)

    def less(self, other: Estimate) -> Estimate:
        """The difference from an independent estimate; it is a bound if this one is."""
        return self.plus(other.off(-other.value))

    def off(self, value: float) -> Estimate:
        """The same error about another value."""
        return replace(self, value=value)

    @property
    def margin(self) -> float:
        """Half the width of its 95% interval, in Student's law: of two numbers a standard error says little."""
        return float(stdtrit(self.df, 0.975)) * self.stderr

    def __str__(self) -> str:
        sign = {"point": "", "lower": "≥ ", "upper": "≤ "}[self.kind]
        return f"{sign}{self.value:.3f} ± {self.stderr:.3f}"

    def as_dict(self) -> dict[str, float | int | str]:
        """Plain values for JSON."""
        return {"value": self.value, "stderr": self.stderr, "n": self.n, "kind": self.kind}


def error_of_sum(errors: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error of a sum of independent terms, and its degrees of freedom (Satterthwaite 1946; Welch 1947); NaN if one is.

    Args:
        errors: of each term.
    """
    variances = [(stderr**2, df) for stderr, df in errors]
    total = sum(variance for variance, _ in variances)
    if math.isnan(total):
        return math.nan, math.inf
    inverse = sum(variance**2 / df for variance, df in variances if variance)
    return math.sqrt(total), total**2 / inverse if inverse else math.inf


@dataclass(frozen=True)
class Interval:
    """A confidence interval; `high` is inf where nothing bounds the quantity from above.

    Attributes:
        value: the best single number inside, NaN where there is none.
        level: the confidence level.
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    @property
    def width(self) -> float:
        return self.high - self.low

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, float | None]:
        """Plain values for JSON, null where a number is missing."""
        pairs = {"value": self.value, "low": self.low, "high": self.high, "level": self.level}
        return {name: number if math.isfinite(number) else None for name, number in pairs.items()}
