"""What readers return, and the one way in which they look at settings."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tiltlm.errors import InputError
from tiltlm.explanation.objective import Claimed, Objective, PairLoss
from tiltlm.explanation.rules.finding import Finding

Kind = Literal["number", "count", "flag", "text", "pair", "numbers"]
"""What a setting holds; all but text may be None where the default is."""
SIMILAR = 0.84
"""How alike a key that nobody knows must be to a known one to count as misspelt."""


@dataclass(frozen=True)
class Option:
    """A setting that a library has: what it holds, its default, and the values it may take where they are few."""

    kind: Kind
    default: Any
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """A configuration, read.

    Attributes:
        objective: what it does.
        beta: the target's, as it is configured; None where a plan will choose it.
        source: the library and the part of it, for the headline.
        origin: for each field of the objective, the settings it came from, as "key = value".
        ignored: keys that are not about the objective.
        suggestions: keys that look misspelt, with what was probably meant.
        findings: what else there is to say of the configuration.
    """

    objective: Objective | PairLoss | Claimed
    beta: float | None
    source: str
    origin: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    suggestions: tuple[tuple[str, str], ...] = ()
    findings: tuple[Finding, ...] = ()

    def setting(self, field: str) -> str:
        """The settings behind a field, as the person wrote them."""
        return ", ".join(self.origin.get(field, ()))


class Settings:
    """Settings by key: what was given, else the library's default. Remembers nothing but that.

    Args:
        given: key -> value as it was written; values may still be text.
        options: the keys that matter.
        source: how errors call the file.
    """

    def __init__(self, given: Mapping[str, Any], options: Mapping[str, Option], source: str) -> None:
        self.given, self.options, self.source = given, options, source

    def __getitem__(self, key: str) -> Any:
        """The value, of the option's kind.

        Raises:
            InputError: if what was given is of another kind.
        """
        option = self.options[key]
        if key not in self.given:
            return option.default
        return _parse(key, self.given[key], option)

    def shown(self, *keys: str) -> tuple[str, ...]:
        """Each key with its value, and whether it is the default."""
        return tuple(f"{key} = {_plain(self[key])}{'' if key in self.given else ' (default)'}" for key in keys)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keys that were given and do not matter."""
        return tuple(key for key in self.given if key not in self.options)

    def suggestions(self, familiar: Sequence[str] = ()) -> tuple[tuple[str, str], ...]:
        """Ignored keys that look like a misspelling of one that matters.

        Args:
            familiar: keys that the library has although they do not matter here.
        """
        found = []
        for key in self.ignored:
            close = difflib.get_close_matches(key, self.options, 1, SIMILAR)
            if close and key not in familiar and close[0] not in self.given:
                found.append((key, close[0]))
        return tuple(found)


_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_WANTED = {
    "number": "a number",
    "count": "a whole number",
    "flag": "true or false",
    "text": "text",
    "pair": "two numbers",
    "numbers": "a number, or several",
}


def _parse(key: str, value: Any, option: Option) -> Any:
    if value is None or (
        isinstance(value, str) and value.lower() in {"null", "none", "~"} and "none" not in option.choices
    ):
        if option.default is None or option.kind == "text":
            return option.default if option.choices else None
        raise InputError(
            f"{key} is empty; give {_WANTED[option.kind]}, or leave the key out for its default {option.default!r}"
        )
    parsed = _KINDS[option.kind](value)
    if parsed is None:
        raise InputError(f"{key} is {value!r}; it must be {_WANTED[option.kind]}, for example {_example(option)}")
    if option.choices and parsed not in option.choices:
        raise InputError(f"{key} is {value!r}; choose {', '.join(option.choices)}")
    return parsed


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _flag(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    return True if text in _TRUE else False if text in _FALSE else None


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else None


def _numbers(value: Any) -> tuple[float, ...] | None:
    """Several numbers, or one alone."""
    parts = value.strip("[]() ").replace(",", " ").split() if isinstance(value, str) else value
    if isinstance(parts, int | float):
        parts = [parts]
    if not isinstance(parts, Sequence) or not parts:
        return None
    numbers = [_number(part) for part in parts]
    return None if None in numbers else tuple(number for number in numbers if number is not None)


def _pair(value: Any) -> tuple[float, float] | None:
    numbers = _numbers(value)
    return (numbers[0], numbers[1]) if numbers is not None and len(numbers) == 2 else None


_KINDS: Mapping[str, Any] = {
    "number": _number,
    "count": _count,
    "flag": _flag,
    "text": _text,
    "pair": _pair,
    "numbers": _numbers,
}


def _example(option: Option) -> str:
    if option.choices:
        return option.choices[0]
    if option.default is not None:
        return _plain(option.default)
    return {"number": "0.1", "count": "8", "flag": "true", "pair": "-1 1"}.get(option.kind, "0.5")


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple | list):
        return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
