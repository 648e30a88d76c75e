"""The algebra of reward functions: sums, products, multiples, clipping and offsets, in the reward's own units.

`Reward(0.3 * a + b, beta=0.1)` is evidence with two parts at one temperature; `Reward(a, beta=0.1) + Reward(b, beta=0.5)` has a
temperature for each (`tiltlm.evidence.algebra`). The first is the second with weights w = beta / beta_part. Either way every
part is called by itself, judged by its own bounds, and logged under its own name.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.errors import InputError, TiltWarning
from tiltlm.evidence.function import OnError, TextFunction, label_of, number_fault, values_of
from tiltlm.records import Draws

Bounds = tuple[float, float]
EVERYTHING: Bounds = (-math.inf, math.inf)

Values = Mapping[int, Float[Tensor, " B"]]
"""The value of every part of a formula, by the part's `id`."""


class _OwnSignature:
    """`inspect.signature(part)` names the columns that this part reads; of the class it is the constructor's."""

    def __get__(self, part: Any, kind: type) -> inspect.Signature:
        if part is None:
            raise AttributeError("__signature__")
        return part.signature()


class Formula(ABC):
    """A reward function that knows its parts. `a + b`, `a - b`, `2 * a`, `-a`, `a * b`, `1 - a`, `.clip(…)`, `.offset(…)`.

    It is called as any reward function, `f(completions=…, prompts=…, **columns)`, and returns a list of floats. Other functions
    may stand beside it: `0.5 * Sentiment() + my_function`.
    """

    __signature__ = _OwnSignature()

    @property
    @abstractmethod
    def label(self) -> str:
        """How the reward is called in logs."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Tells this reward from another of the same name."""

    @property
    @abstractmethod
    def bounds(self) -> Bounds | None:
        """Smallest and largest value, infinite where only one end is known; None where neither is."""

    @abstractmethod
    def parts(self) -> tuple[TextFunction, ...]:
        """The functions in it that are called, each once."""

    @abstractmethod
    def combine(self, values: Values) -> Float[Tensor, " B"]:
        """The reward from the values of its parts."""

    def signature(self) -> inspect.Signature:
        """What the parts ask for, together."""
        return _joint_signature([inspect.signature(part) for part in self.parts()])

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        given = {"completions": completions, **columns}
        values = {id(part): _called(part, given) for part in self.parts()}
        return self.combine(values).tolist()

    def clip(self, low: float = -math.inf, high: float = math.inf) -> Clipped:
        """Values outside [low, high] become its ends, which changes p*: see `Clipped`."""
        return Clipped(self, low, high)

    def offset(self, by: str | TextFunction) -> Offset:
        """Add a number that depends on the prompt alone, which changes no p*: see `Offset`."""
        return Offset(self, by)

    def __add__(self, other: Any) -> Linear:
        return Linear.of((1.0, self), (1.0, other))

    def __radd__(self, other: Any) -> Linear:
        return Linear.of((1.0, other), (1.0, self))

    def __sub__(self, other: Any) -> Linear:
        return Linear.of((1.0, self), (-1.0, other))

    def __rsub__(self, other: Any) -> Linear:
        return Linear.of((1.0, other), (-1.0, self))

    def __neg__(self) -> Linear:
        return Linear.of((-1.0, self))

    def __mul__(self, other: Any) -> Linear | Product:
        return Linear.of((float(other), self)) if _is_number(other) else Product((self, as_formula(other)))

    def __rmul__(self, other: Any) -> Linear | Product:
        return Linear.of((float(other), self)) if _is_number(other) else Product((as_formula(other), self))


@dataclass(frozen=True)
class Linear(Formula):
    """A weighted sum of rewards. Bounds follow by interval arithmetic: they hold, and may not be the narrowest.

    Attributes:
        terms: each weight with its reward.
        constant: added to all; it changes no p*.
    """

    terms: tuple[tuple[float, Formula], ...]
    constant: float = 0.0

    @classmethod
    def of(cls, *terms: tuple[float, Any]) -> Linear:
        """From weights and rewards, functions or numbers; sums inside are opened.

        Raises:
            InputError: for a weight that is not finite, or something that is no reward.
        """
        found: list[tuple[float, Formula]] = []
        constant = 0.0
        for weight, term in terms:
            if not math.isfinite(weight):
                raise InputError(f"a weight is {weight}; it must be a finite number")
            if _is_number(term):
                constant += weight * term
            elif isinstance(term, Linear):
                found += [(weight * inner, formula) for inner, formula in term.terms]
                constant += weight * term.constant
            else:
                found.append((weight, as_formula(term)))
        return cls(tuple(found), constant)

    @property
    def label(self) -> str:
        return self._written([term.label for _, term in self.terms])

    @property
    def identity(self) -> str:
        return self._written([term.identity for _, term in self.terms])

    def _written(self, names: Sequence[str]) -> str:
        text = ""
        for (weight, term), name in zip(self.terms, names, strict=True):
            sign = ("-" if weight < 0 else "") if not text else (" - " if weight < 0 else " + ")
            factor = "" if abs(weight) == 1 else f"{abs(weight):g}·"
            text += f"{sign}{factor}{f'({name})' if isinstance(term, Product) and factor else name}"
        return text + (f" {'+' if self.constant > 0 else '-'} {abs(self.constant):g}" if self.constant else "")

    @property
    def bounds(self) -> Bounds | None:
        low = high = self.constant
        for weight, term in self.terms:
            ends = [_times(weight, end) for end in term.bounds or EVERYTHING]
            low, high = low + min(ends), high + max(ends)
        return _known((low, high))

    def parts(self) -> tuple[TextFunction, ...]:
        return _each_once(part for _, term in self.terms for part in term.parts())

    def combine(self, values: Values) -> Float[Tensor, " B"]:
        terms = [weight * term.combine(values) for weight, term in self.terms]
        return functools.reduce(operator.add, terms) + self.constant


@dataclass(frozen=True)
class Product(Formula):
    """Rewards multiplied: `correct * brief` rewards brevity only where the answer is correct."""

    factors: tuple[Formula, ...]

    @property
    def label(self) -> str:
        return "·".join(_bracketed(factor.label, factor) for factor in self.factors)

    @property
    def identity(self) -> str:
        return "·".join(_bracketed(factor.identity, factor) for factor in self.factors)

    @property
    def bounds(self) -> Bounds | None:
        low, high = 1.0, 1.0
        for factor in self.factors:
            ends = [_times(a, b) for a in (low, high) for b in factor.bounds or EVERYTHING]
            low, high = min(ends), max(ends)
        return _known((low, high))

    def parts(self) -> tuple[TextFunction, ...]:
        return _each_once(part for factor in self.factors for part in factor.parts())

    def combine(self, values: Values) -> Float[Tensor, " B"]:
        return functools.reduce(operator.mul, [factor.combine(values) for factor in self.factors])


@dataclass(frozen=True)
class Clipped(Formula):
    """A reward with what lies outside [low, high] moved to its ends.

    It is another reward, and so another p*: completions beyond an end are told apart no longer, and the posterior has no more
    reason to prefer the better of them. It warns, unless the reward's own bounds lie within. A lower beta, or a smaller weight,
    tames a reward without that.
    """

    inner: Formula
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise InputError(f"clip is ({self.low}, {self.high}); give the smaller value first")
        least, most = self.inner.bounds or EVERYTHING
        if least < self.low or most > self.high:
            warnings.warn(
                f"clip({self.low:g}, {self.high:g}) changes p*: completions of {self.inner.label!r} beyond an end all count the "
                f"same; to weaken a reward without that, scale it or raise beta",
                TiltWarning,
                stacklevel=4,
            )

    @property
    def label(self) -> str:
        return f"clip({self.inner.label})"

    @property
    def identity(self) -> str:
        return f"clip({self.inner.identity}, {self.low}, {self.high})"

    @property
    def bounds(self) -> Bounds | None:
        ends = [min(max(end, self.low), self.high) for end in self.inner.bounds or EVERYTHING]
        return _known((ends[0], ends[1]))

    def parts(self) -> tuple[TextFunction, ...]:
        return self.inner.parts()

    def combine(self, values: Values) -> Float[Tensor, " B"]:
        return self.inner.combine(values).clamp(self.low, self.high)


@dataclass(frozen=True)
class Offset(Formula):
    """A reward plus b(c), a number for each prompt. p* is the same for every b, because Z(c) takes it up: log Z grows by b / beta.

    It makes rewards of different prompts comparable, in tables and to engines that share something across prompts (a batch's
    baseline, a value function). The bounds are unknown with it, as b is.

    Attributes:
        by: a column with the number, or a function of prompts and columns; one that asks for completions is refused.
    """

    inner: Formula
    by: str | TextFunction

    def __post_init__(self) -> None:
        asked = () if isinstance(self.by, str) else inspect.signature(self.by).parameters
        wrong = [name for name in asked if name in {"completions", "completion_ids"}]
        if wrong:
            raise InputError(
                f"offset {label_of(self.by)!r} asks for {wrong[0]}; an offset depends on the prompt alone: add the function to "  # pyright: ignore[reportArgumentType]
                f"the reward instead, reward + function, which changes p*"
            )

    @functools.cached_property
    def _part(self) -> TextFunction:
        from tiltlm.evidence.parts import Column

        return Column(self.by) if isinstance(self.by, str) else self.by

    @property
    def label(self) -> str:
        return f"{self.inner.label} + {label_of(self._part)}"

    @property
    def identity(self) -> str:
        return f"{self.inner.identity} + {label_of(self._part)}"

    @property
    def bounds(self) -> Bounds | None:
        return None

    def parts(self) -> tuple[TextFunction, ...]:
        return (*self.inner.parts(), self._part)

    def combine(self, values: Values) -> Float[Tensor, " B"]:
        return self.inner.combine(values) + values[id(self._part)]


def as_formula(reward: Any) -> Formula:
    """A formula, or a function as a part of one.

    Raises:
        InputError: for anything else; evidence has an algebra of its own.
    """
    if isinstance(reward, Formula):
        return reward
    if hasattr(reward, "log_likelihood"):
        raise InputError(
            f"a reward function and evidence do not add: give the function its temperature first, Reward(function, beta=…) + "
            f"{getattr(reward, 'label', 'evidence')}"
        )
    if not callable(reward):
        raise InputError(f"{reward!r:.60} is no reward; give a function, a named part or a number")
    from tiltlm.evidence.parts import Function

    return Function(cast("TextFunction", reward))


def bounds_of(fn: TextFunction) -> Bounds | None:
    """The bounds that a function declares in an attribute `bounds`; None if it does not."""
    bounds = getattr(fn, "bounds", None)
    if isinstance(bounds, tuple) and len(bounds) == 2 and all(_is_number(end) for end in bounds):
        return bounds
    return None


def formula_values(
    formula: Formula, draws: Draws, label: str, bounds: Bounds | None, on_error: OnError
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"], dict[str, Float[Tensor, " B"]]]:
    """The values of a formula on draws, each part called, checked and named by itself.

    Returns:
        The reward, which completions were kept, and the value of every part by name; the whole under `label` comes first.
    """
    values: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {label: torch.empty(0)}
    kept = torch.ones(len(draws), dtype=torch.bool)
    for part in formula.parts():
        name = label_of(part)
        value, judged = values_of(part, draws, "reward", name, number_fault(bounds_of(part)), on_error)
        values[id(part)], kept = value, kept & judged
        while name in named:
            name += "'"
        named[name] = value
    total = formula.combine(values)
    total, fit = values_of(lambda completions: total.tolist(), draws, "reward", label, number_fault(bounds), on_error)
    return total, kept & fit, {**named, label: total}


def _called(part: Callable[..., Any], given: Mapping[str, Any]) -> Float[Tensor, " B"]:
    parameters = inspect.signature(part).parameters.values()
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in given]
    if missing:
        raise InputError(f"reward {label_of(part)!r} reads {missing[0]!r}; give it, one value a completion")
    asked = given if everything else {p.name: given[p.name] for p in named if p.name in given}
    return torch.as_tensor(list(part(**asked)), dtype=torch.float64)


def _joint_signature(signatures: Sequence[inspect.Signature]) -> inspect.Signature:
    """The parameters of several functions that are called by name; one is needed if any of them needs it."""
    joint: dict[str, inspect.Parameter] = {}
    for parameter in (p for signature in signatures for p in signature.parameters.values()):
        kind = parameter.kind if parameter.kind is parameter.VAR_KEYWORD else parameter.KEYWORD_ONLY
        if parameter.name not in joint or joint[parameter.name].default is not parameter.empty:
            joint[parameter.name] = inspect.Parameter(parameter.name, kind, default=parameter.default)
    return inspect.Signature(sorted(joint.values(), key=lambda p: p.kind))


def _each_once(parts: Iterable[TextFunction]) -> tuple[TextFunction, ...]:
    return tuple({id(part): part for part in parts}.values())


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _known(bounds: Bounds) -> Bounds | None:
    """Bounds that say something and that a reward can have."""
    return bounds if bounds != EVERYTHING and bounds[0] < bounds[1] else None


def _bracketed(text: str, formula: Formula) -> str:
    return f"({text})" if isinstance(formula, (Linear, Offset)) else text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
