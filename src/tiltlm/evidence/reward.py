"""`Reward`: any function of prompts and completions as evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tiltlm.errors import InputError
from tiltlm.evidence.algebra import Algebra
from tiltlm.evidence.composition import Formula, bounds_of, formula_values
from tiltlm.evidence.function import OnError, TextFunction, label_of, number_fault, values_of
from tiltlm.evidence.parts import Part
from tiltlm.records import Draws, Likelihood


@dataclass(frozen=True)
class Reward(Algebra):
    """A reward function at a temperature: the evidence r / beta.

    The function is called as TRL calls it, `fn(prompts=…, completions=…, completion_ids=…, **columns)`, and returns
    one number a completion. It gets those of the arguments that it names (all of them if it takes `**kwargs`). For
    conversational prompts both prompts and completions come as lists of messages.

    Attributes:
        fn: the function; also a named part of `tiltlm.rewards`, or a formula of several, each of which is then logged.
        beta: temperature in reward units per nat; halving it doubles the evidence.
        bounds: smallest and largest reward the function can return. They make rejection exact and give the
            certificate its upper side; a value outside them is an error, because then they were not bounds. A function's own
            `bounds` by default; one end may be infinite.
        name: how the reward is called in logs; the function's own `label`, or its name, by default.
        on_error: what to do with a completion for which the function raises, or whose reward is missing, no finite number
            or out of bounds: "fail" stops with the completion's text, "drop" leaves the completion out and counts it. The
            target is then conditioned on having a reward. (What does not return one value a completion always fails.)
    """

    fn: TextFunction
    beta: float = 1.0
    bounds: tuple[float, float] | None = None
    name: str = ""
    on_error: OnError = "fail"

    def __post_init__(self) -> None:
        if not isinstance(self.beta, int | float) or not 0 < self.beta < math.inf:
            raise InputError(
                f"beta is {self.beta!r}; it is a temperature in reward units per nat and must be a positive number"
            )
        if self.bounds is None:
            object.__setattr__(self, "bounds", bounds_of(self.fn))
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise InputError(f"bounds are {self.bounds}; give them as (smallest, largest), or None if unknown")

    @property
    def label(self) -> str:
        return self.name or label_of(self.fn)

    @property
    def identity(self) -> str:
        """Tells this evidence from another; not by its code, which may be mended between a crash and --resume."""
        settings = f" {self.fn.identity}" if isinstance(self.fn, Formula) else ""
        return f"{self.label} {self.bounds} {self.on_error}{settings}"

    def at(self, beta: float) -> Reward:
        """The same reward at another temperature."""
        return replace(self, beta=beta)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        """r / beta of each completion, checked; see `on_error`."""
        if isinstance(self.fn, Formula) and not isinstance(self.fn, Part):
            reward, kept, named = formula_values(self.fn, draws, self.label, self.bounds, self.on_error)
            return Likelihood(reward / self.beta, named, kept)
        fault = number_fault(self.bounds)
        reward, kept = values_of(self.fn, draws, "reward", self.label, fault, self.on_error)
        return Likelihood(reward / self.beta, {self.label: reward}, kept)

    @property
    def log_bounds(self) -> tuple[float, float] | None:
        """The bounds of r / beta, None where the reward's bounds are unknown."""
        return None if self.bounds is None else (self.bounds[0] / self.beta, self.bounds[1] / self.beta)
