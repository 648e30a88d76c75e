"""Rewards that look at the text alone: its length, form and repetition."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part
from tiltlm.rewards.optional import require

Unit = Literal["words", "characters", "tokens"]
UNITS = ("words", "characters", "tokens")


@dataclass(frozen=True)
class Length(Part):
    """How long the completion is, or with `least` and `most`, minus how far its length is outside of them.

    The bare length is a feature, for moment constraints and diagrams; as a reward on its own it has no upper bound.

    Attributes:
        unit: words (separated by white space), characters, or the model's tokens, its end token included.
        least, most: the lengths that are all the same to you, both included; None for no limit on that side.
    """

    unit: Unit = "words"
    least: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        _require_one_of("unit", self.unit, UNITS)
        if min(self.least or 0, self.most or 0) < 0 or (self.least or 0) > (
            math.inf if self.most is None else self.most
        ):
            raise InputError(f"length is from {self.least} to {self.most}; give 0 <= least <= most")

    @property
    def bounds(self) -> Bounds | None:
        if self.least is None and self.most is None:
            return 0.0, math.inf
        return (-float(self.least or 0) if self.most is None else -math.inf), 0.0

    @property
    def reads(self) -> tuple[str, ...]:
        return ("completion_ids",) if self.unit == "tokens" else ()

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        lengths = [len(item) for item in self._units(texts, columns)]
        if self.least is None and self.most is None:
            return [float(n) for n in lengths]
        most = math.inf if self.most is None else self.most
        return [-float(max((self.least or 0) - n, n - most, 0)) for n in lengths]

    def _units(self, texts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
        if self.unit == "tokens":
            return columns["completion_ids"]
        return texts if self.unit == "characters" else [text.split() for text in texts]


@dataclass(frozen=True)
class Pattern(Part):
    """1 where a regular expression is found in the completion, else 0.

    Attributes:
        pattern: in the syntax of Python's re; (?i) at its start ignores case.
        whole: it must describe the whole completion, white space at its ends aside.
        column: instead of a pattern, the column with one for each prompt: a form that the prompt asks for.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    pattern: str | None = None
    whole: bool = False
    column: str | None = None

    def __post_init__(self) -> None:
        if (self.pattern is None) == (self.column is None):
            raise InputError(
                f"pattern is {self.pattern!r} and column is {self.column!r}; give one of them: the form that completions should have"
            )
        if self.pattern is not None:
            _compiled(self.pattern)

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        wanted = [self.pattern] * len(texts) if self.column is None else columns[self.column]
        return [float(self._holds(_compiled(str(form)), text)) for form, text in zip(wanted, texts, strict=True)]

    def _holds(self, form: re.Pattern[str], text: str) -> bool:
        return (form.fullmatch(text.strip()) if self.whole else form.search(text)) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"pattern is {pattern!r}, which is no regular expression ({error}); mend it") from error


@dataclass(frozen=True)
class JSONSchema(Part):
    """1 where the completion is JSON that satisfies a schema, else 0. A fence of three backticks around it is allowed.

    Attributes:
        schema: a JSON schema as a mapping, or the path of a file with one; {} takes any JSON.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    schema: Mapping[str, Any] | str

    @property
    def identity(self) -> str:
        return f"{self.label}({json.dumps(self._loaded, sort_keys=True)})"

    @cached_property
    def _loaded(self) -> Any:
        if not isinstance(self.schema, str):
            return dict(self.schema)
        try:
            return json.loads(Path(self.schema).read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"schema {self.schema!r} cannot be read as JSON ({error}); give a file or a mapping"
            ) from error

    @cached_property
    def _validator(self) -> Any:
        jsonschema = require("jsonschema", "jsonschema", self.label)
        kind = jsonschema.validators.validator_for(self._loaded)
        try:
            kind.check_schema(self._loaded)
        except jsonschema.SchemaError as error:
            raise InputError(f"schema of {self.label!r} is not a JSON schema ({error.message}); mend it") from error
        return kind(self._loaded)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [float(self._holds(text)) for text in texts]

    def _holds(self, text: str) -> bool:
        fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)```\s*", text, re.DOTALL)
        try:
            value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        return self._validator.is_valid(value)


@dataclass(frozen=True)
class Repetition(Part):
    """The share of n-grams of words that are repeats of an earlier one, 1 - distinct-n (Li et al. 2016). Weigh it negatively.

    0 for a text with no n-gram. Case does not count.

    Attributes:
        n: words in an n-gram.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    on_prefixes: ClassVar[bool] = True
    n: int = 3

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"n is {self.n}; it is the number of words in an n-gram, at least 1")

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [self._repeated(text.lower().split()) for text in texts]

    def _repeated(self, words: list[str]) -> float:
        grams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}; choose {', '.join(known)}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
