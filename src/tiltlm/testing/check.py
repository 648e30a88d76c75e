"""One proof or refutation of a claim."""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 1e-10


class ClaimRefuted(AssertionError):
    """An engine does not do what its claim says."""


@dataclass(frozen=True)
class Check:
    """One proof or refutation.

    Attributes:
        name: what was compared.
        error: how far the engine is from its claim.
        tolerance: the most that counts as none.
    """

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{'ok ' if self.passed else 'NOT'} {self.name}: {self.error:.2e} (at most {self.tolerance:.0e})"
