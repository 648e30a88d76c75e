"""`Preferences`: evidence of which only comparisons are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tiltlm.errors import InputError
from tiltlm.evidence.algebra import Algebra
from tiltlm.records import Draws, Likelihood


@dataclass(frozen=True)
class Preferences(Algebra):
    """The reward behind a data set of preferences, P(x > x') = sigma(r(x) - r(x')), unknown as a number.

    `prior * Preferences(beta=0.1)` is the posterior that such data speak of. It can be trained towards by engines that learn from
    pairs, on `Given(preferences(prior, rows))`; it cannot be scored, so that nothing can be certified or decoded with it.

    Attributes:
        beta: temperature in the units in which the preferences are logits: the beta of DPO.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.beta, int | float) or not 0 < self.beta < math.inf:
            raise InputError(
                f"beta is {self.beta!r}; it is a temperature in reward units per nat and must be a positive number"
            )

    @property
    def identity(self) -> str:
        """Tells this evidence from another."""
        return "preferences"

    @property
    def log_bounds(self) -> None:
        """Nothing bounds a reward that is not known."""

    def at(self, beta: float) -> Preferences:
        """The same preferences at another temperature."""
        return replace(self, beta=beta)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        """Not known.

        Raises:
            InputError: always.
        """
        raise InputError(
            "preferences say which of two completions is better, and not how good one is; train with "
            "source=Given(preferences(prior, rows)), and to sample, plan or certify give a reward: "
            "prior * Reward(fn, beta=...), for instance a reward model's"
        )
