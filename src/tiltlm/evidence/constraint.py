"""`Constraint`: what a text must satisfy, as evidence that is 0 inside and -inf outside."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tiltlm.errors import InputError
from tiltlm.evidence.algebra import Algebra
from tiltlm.evidence.function import OnError, TextFunction, label_of, truth_fault, values_of
from tiltlm.records import Draws, Likelihood


@dataclass(frozen=True)
class Constraint(Algebra):
    """A condition on texts. `prior * Constraint(fn)` is the prior conditioned on it, pi0(x|c) b(x, c) / P(b|c).

    A pointwise constraint in the sense of Khalifa et al. (2021). Decoding engines and `plan` take it as it is. Engines
    whose loss is finite on impossible completions (filtered fine-tuning, forward KL) train on it; the policy-gradient ones
    need finite evidence, so `fit` asks for a `penalty`. With one, a completion outside loses `penalty`: it is then a reward,
    0 or -penalty, at temperature `beta`, and the posterior keeps exp(-penalty / beta) of the prior's odds of a violation.

    Attributes:
        fn: called as `Reward` calls its function; returns true or false (or 1 or 0) for each completion.
        penalty: what a violation costs, in nats while beta is 1; None makes it impossible.
        name: how the constraint is called in logs, where its value is 1 inside and 0 outside; the function's name by default.
        on_error: as `Reward`'s, for completions that the function cannot judge.
        beta: the temperature of the penalty. A hard constraint is the same at every one.
    """

    fn: TextFunction
    penalty: float | None = None
    name: str = ""
    on_error: OnError = "fail"
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.penalty is not None and not 0 < self.penalty < math.inf:
            raise InputError(
                f"penalty is {self.penalty}; give a positive number of nats, or None for a hard constraint"
            )
        if not 0 < self.beta < math.inf:
            raise InputError(f"beta is {self.beta!r}; it is a temperature and must be a positive number")

    @property
    def label(self) -> str:
        return self.name or label_of(self.fn)

    @property
    def identity(self) -> str:
        """Tells this evidence from another."""
        return f"constraint {self.label} {self.penalty} {self.on_error}"

    @property
    def tempered(self) -> bool:
        return self.penalty is not None

    @property
    def log_bounds(self) -> tuple[float, float]:
        return self._outside, 0.0

    @property
    def _outside(self) -> float:
        return -math.inf if self.penalty is None else -self.penalty / self.beta

    def at(self, beta: float) -> Constraint:
        """The same constraint at another temperature, which only a penalty feels."""
        return replace(self, beta=beta)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        """0 inside and -inf (or -penalty / beta) outside."""
        holds, kept = values_of(self.fn, draws, "constraint", self.label, truth_fault, self.on_error)
        log = torch.full_like(holds, torch.nan)
        log[holds == 1], log[holds == 0] = 0.0, self._outside
        return Likelihood(log, {self.label: holds}, kept)
