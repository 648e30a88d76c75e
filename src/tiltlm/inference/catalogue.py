"""Every engine by name: found by looking into the folders, so that a new file is all that a new engine needs."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from tiltlm.errors import InputError
from tiltlm.inference import decoding, training
from tiltlm.names import name_of
from tiltlm.names import summary_of as summary_of_kind


def training_engines() -> dict[str, Any]:
    """Every training engine with its defaults, and every preset, by the name that recipes use."""
    return _engines(training, "loss")


def decoding_engines() -> dict[str, Any]:
    """Every decoding engine with its defaults, and every preset."""
    return _engines(decoding, "sample")


def make_engine(engines: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> Any:
    """An engine by name, with some of its settings changed.

    Args:
        options: settings by name; a behaviour is given by the name of a function in the engine's module.

    Raises:
        InputError: for an engine or a setting that is not there, or a value that it refuses.
    """
    if name not in engines:
        near = difflib.get_close_matches(name, engines, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(sorted(engines))}"
        raise InputError(f"engine is {name!r}; {hint}")
    engine = engines[name]
    known = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine) if field.init}
    for option in options:
        if option not in known:
            raise InputError(f"option {option!r} is none of {name}'s; it has {', '.join(known) or 'none'}")
    values = {option: _as_given(engine, name, option, known[option], value) for option, value in options.items()}
    return dataclasses.replace(engine, **values)


def make_trainer(name: str, group: int, max_new_tokens: int, options: Mapping[str, Any]) -> Any:
    """A training engine with what a run decides for it, the group and the longest completion, unless `options` do.

    Raises:
        InputError: as `make_engine`.
    """
    engines = training_engines()
    known = {field.name for field in dataclasses.fields(engines[name])} if name in engines else set()
    decided = {"group": group, "max_length": max_new_tokens}
    return make_engine(engines, name, {key: value for key, value in decided.items() if key in known} | dict(options))


def imitates(name: str) -> bool:
    """Whether a training engine by this name learns the law of its data, whatever the target."""
    return name in (engines := training_engines()) and engines[name].claim.fixed_point == "data"


def summary_of(engine: Any) -> str:
    """The first sentence of an engine's docstring."""
    return summary_of_kind(type(engine))


def _engines(package: ModuleType, method: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(entry.name)
        kinds = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        for kind in kinds:
            if dataclasses.is_dataclass(kind) and hasattr(kind, method) and hasattr(kind, "claim"):
                found[name_of(kind)] = kind()
        found |= getattr(module, "PRESETS", {})
    return dict(sorted(found.items()))


def _as_given(engine: Any, name: str, option: str, default: Any, value: Any) -> Any:
    if callable(default) or (default is None and isinstance(value, str)):
        return _behaviour(engine, name, option, value)
    if isinstance(default, bool | int | float) and not isinstance(value, bool | int | float):
        raise InputError(f"option {option} of {name} is {value!r}; it must be {_kind(default)}")
    return value


def _behaviour(engine: Any, name: str, option: str, value: Any) -> Callable[..., Any]:
    if callable(value):
        return value
    module = importlib.import_module(type(engine).__module__)
    functions = {key: v for key, v in vars(module).items() if _is_a_behaviour(v) and not key.startswith("_")}
    if str(value) not in functions:
        raise InputError(f"option {option} of {name} is {value!r}; it must name one of {', '.join(functions)}")
    return functions[str(value)]


def _is_a_behaviour(value: Any) -> bool:
    """Whether it is a function of ours, or what is called like one, wherever the engine's module has it from."""
    kind = value if inspect.isfunction(value) else type(value)
    return callable(value) and not isinstance(value, type) and kind.__module__.startswith("tiltlm.")


def _kind(default: Any) -> str:
    return "true or false" if isinstance(default, bool) else "a number"
