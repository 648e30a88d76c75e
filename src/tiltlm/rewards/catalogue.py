"""Every named part: found by looking into this folder, so that a new class in a file is all that a new part needs."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from tiltlm import rewards
from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part
from tiltlm.names import name_of, summary_of

BY_SETTINGS = "by settings"
RUNNER = "program_runner"
"""A script, not a module to look into."""


@cache
def part_kinds() -> Mapping[str, type[Part]]:
    """Every part's class by the name that recipes use."""
    found: dict[str, type[Part]] = {}
    for entry in pkgutil.iter_modules(rewards.__path__):
        if entry.name in (RUNNER, "catalogue"):
            continue
        module = importlib.import_module(f"{rewards.__name__}.{entry.name}")
        for kind in vars(module).values():
            own = isinstance(kind, type) and kind.__module__ == module.__name__ and not kind.__name__.startswith("_")
            if own and issubclass(kind, Part) and not inspect.isabstract(kind):
                found[name_of(kind)] = kind
    return dict(sorted(found.items()))


def make_part(name: str, settings: Mapping[str, Any], lm: Any) -> Part:
    """A part by name, with its settings.

    Args:
        lm: the language model of parts that need one and name none.

    Raises:
        InputError: for a part or a setting that is not there, one that is missing, or a value that the part refuses.
    """
    kinds = part_kinds()
    if name not in kinds:
        near = difflib.get_close_matches(str(name), kinds, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"tiltlm reward list lists them: {', '.join(kinds)}"
        raise InputError(f"part is {name!r}; {hint}")
    kind = kinds[name]
    known = settings_of(kind)
    wrong = next((key for key in settings if key not in known), None)
    if wrong is not None:
        near = difflib.get_close_matches(str(wrong), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        raise InputError(f"setting {wrong!r} is none of part {name}'s; {hint}")
    given = {key: _as_given(name, key, known[key], value) for key, value in settings.items()}
    if "lm" in known:
        given = {"lm": lm, **given}
    missing = next((k for k, field in known.items() if field.default is dataclasses.MISSING and k not in given), None)
    if missing is not None:
        raise InputError(f"part {name} needs the setting {missing!r}; write '{missing}: …' beside 'part: {name}'")
    return kind(**given)


def settings_of(kind: type[Part]) -> dict[str, dataclasses.Field[Any]]:
    """The settings of a part by name."""
    return {field.name: field for field in dataclasses.fields(kind) if field.init}


def bounds_in_words(kind: type[Part]) -> str:
    """The bounds of a part's values, whatever its settings; or that its settings decide."""
    decided = kind.bounds is not Part.bounds
    return BY_SETTINGS if decided else in_words(kind.extent)


def in_words(bounds: Bounds | None) -> str:
    """Bounds as an interval."""
    if bounds is None:
        return "none"
    low, high = ("-∞" if end == -float("inf") else "∞" if end == float("inf") else f"{end:g}" for end in bounds)
    return f"{'(' if low == '-∞' else '['}{low}, {high}{')' if high == '∞' else ']'}"


def described() -> list[dict[str, Any]]:
    """Every part, as a row of a table: name, bounds, prefixes, settings with their defaults, and what it is."""
    return [
        {
            "name": name,
            "bounds": bounds_in_words(kind),
            "prefixes": kind.on_prefixes,
            "settings": {key: _default(field) for key, field in settings_of(kind).items() if key != "name"},
            "what": summary_of(kind),
        }
        for name, kind in part_kinds().items()
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    """A setting's default for JSON; "needed" where there is none."""
    if field.name == "lm":
        return "the recipe's model"
    if field.default is dataclasses.MISSING:
        return "needed"
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _as_given(part: str, setting: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """A value from YAML as the setting takes it: lists are tuples, and what has a number or text as default takes one."""
    if isinstance(value, list):
        return tuple(value)
    default = field.default
    for kinds, words in ((bool, "true or false"), ((int, float), "a number"), (str, "a text")):
        if isinstance(default, kinds):
            if isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool)):
                return value
            raise InputError(f"setting {setting} of part {part} is {value!r}; it must be {words}")
    return value
