"""What a recipe points at: prompt files and reward functions."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tiltlm.data.preparation import prepare
from tiltlm.data.reading import IMAGE, LOADERS, address, read, read_lines, table
from tiltlm.data.spec import Progress
from tiltlm.errors import InputError
from tiltlm.evidence.composition import Formula, Linear
from tiltlm.evidence.function import TextFunction
from tiltlm.evidence.parts import Function
from tiltlm.rewards.catalogue import make_part

if TYPE_CHECKING:
    from tiltlm.lm.load import LanguageModel

Load = Callable[[str, str], tuple[TextFunction, str]]
"""(source, recipe's key) -> the function, and a hash of its code."""


def read_prompts(
    source: str,
    column: str,
    columns: Mapping[str, str] | None = None,
    what: str = "prompts",
    progress: Progress | None = None,
) -> Sequence[Any]:
    """Prompts by their source: the lines of a .txt, or the rows of a table with `column`; see `tiltlm.data.reading`.

    Args:
        columns: our name of a column → the source's.
        what: the setting that names the source, for messages.
        progress: (what, how many) -> a bar, where a data set has to be prepared first.

    Raises:
        InputError: if the source is missing, empty, of an unknown kind, or has no such column.
    """
    at = address(source)
    if at.kind == "file" and at.place.endswith(".txt") and not columns:
        lines = read_lines(Path(at.place))[at.rows]
        if not lines:
            raise InputError(f"{what} {source!r} has no rows; give at least one")
        return lines
    if at.kind == "data":
        prepare(at.place, progress=progress)
    rows = read(source, columns, need=(), what=what)
    if column not in rows.column_names and IMAGE not in rows.column_names:
        raise InputError(
            f"column is {column!r}, but {source} has the columns {', '.join(rows.column_names)}; name the one with the prompts"
        )
    return list(rows)


def read_completions(source: str, columns: Mapping[str, str] | None = None) -> Sequence[Any]:
    """Rows of completions or preferences, with TRL's columns; sources and `columns` as for `read_prompts`.

    Raises:
        InputError: if the source is missing, empty, of an unknown kind, or has neither kind of columns.
    """
    rows = read(source, columns, need=(), what="data")
    names = set(rows.column_names)
    if not (names & {"completion", "messages"} or {"chosen", "rejected"} <= names):
        raise InputError(
            f"data {source!r} has the columns {', '.join(rows.column_names)}; it needs prompt, chosen and rejected, or prompt and "
            f"completion, or messages"
        )
    return list(rows)


def read_rows(source: str) -> Sequence[Any]:
    """All rows of a table.

    Raises:
        InputError: if the file is missing, empty or of an unknown kind.
    """
    path = Path(source)
    if not path.is_file() or path.suffix not in LOADERS:
        raise InputError(f"data {source!r}: there is no such table; give a {', '.join(LOADERS)} file")
    return list(table(path, "data"))


def reward_of(
    source: str | Sequence[Mapping[str, Any]], lm: LanguageModel | str, load: Load | None = None, what: str = "reward"
) -> tuple[TextFunction, str]:
    """A recipe's reward, held-out reward or moment: a function's name, or a list of parts with their weights.

    An item of the list is a named part with its settings, `{part: fluency, weight: 0.3}`, or a function, `{function: file.py:f,
    weight: 1.0, bounds: [0, 1]}`. Either may have a `name`, an `offset` (a column) and a `clip` (two numbers).

    Args:
        lm: the language model of parts that need one and name none; its name will do to check the rest.
        load: gets functions by their source; `load_function` by default.
        what: the recipe's key, for messages.

    Returns:
        The function or formula, and a hash of what it is made of.

    Raises:
        InputError: for a part, function or setting that is not there or is refused, naming it.
    """
    load = load or load_function
    if isinstance(source, str):
        return load(source, what)
    if not source:
        raise InputError(f"{what} is an empty list; give at least one part")
    found = [_term(item, lm, load, (what, number)) for number, item in enumerate(source, 1)]
    settings = [{key: value for key, value in item.items() if key != "function"} for item in source]
    names = [reward_name(str(item.get("function", ""))) for item in source]  # wherever their files are
    code = json.dumps([settings, names], sort_keys=True, default=str) + "".join(code for *_, code in found)
    (weight, term, _), *rest = found
    single = not rest and weight == 1
    whole = term if single else Linear.of(*((weight, term) for weight, term, _ in found))
    return whole, hashlib.sha256(code.encode()).hexdigest()[:16]


def reward_name(source: str | Sequence[Mapping[str, Any]]) -> str:
    """How a recipe's reward is called: as its function is, or as its parts say ("")."""
    return source.rpartition(":")[2] if isinstance(source, str) else ""


Place = tuple[str, int]
"""A recipe's key, and the number of an item in its list: for messages."""


def _term(item: Mapping[str, Any], lm: LanguageModel | str, load: Load, at: Place) -> tuple[float, Formula, str]:
    """The weight, the part and the code of an item of a list of parts."""
    what, number = at
    settings = dict(item)
    weight, clip, offset = settings.pop("weight", 1.0), settings.pop("clip", None), settings.pop("offset", None)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
        raise InputError(f"weight of part {number} of {what} is {weight!r}; it must be a finite number")
    code = ""
    if "function" in settings:
        term, code = _function_part(settings, load, at)
    elif "part" in settings:
        try:
            term = make_part(settings.pop("part"), settings, lm)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
    else:
        raise InputError(f"part {number} of {what} is {dict(item)!r:.80}; give 'part: NAME' or 'function: file.py:f'")
    if offset is not None:
        term = term.offset(str(offset))
    if clip is not None:
        term = term.clip(*_ends("clip", clip, at))
    return float(weight), term, code


def _function_part(settings: dict[str, Any], load: Load, at: Place) -> tuple[Formula, str]:
    what, number = at
    source, name, bounds = settings.pop("function"), settings.pop("name", ""), settings.pop("bounds", None)
    if settings:
        raise InputError(
            f"part {number} of {what} is a function and has the key {next(iter(settings))!r}; it may have weight, name, bounds, "
            f"clip, offset"
        )
    function, code = load(str(source), what)
    known = None if bounds is None else _ends("bounds", bounds, at)
    return Function(function, known, name=str(name) or str(source).rpartition(":")[2]), code


def _ends(key: str, value: Any, at: Place) -> tuple[float, float]:
    numbers = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(end, int | float) for end in value)
    if not numbers or not value[0] < value[1]:
        raise InputError(f"{key} of part {at[1]} of {at[0]} is {value!r}; give [smallest, largest]")
    return float(value[0]), float(value[1])


def load_function(source: str, what: str) -> tuple[TextFunction, str]:
    """A function of texts, for a reward, a held-out reward or a moment: file.py:function, package.module:function, or a learned reward's
    folder.

    Args:
        what: the recipe's key, for messages.

    Returns:
        The function, and a hash of the code behind it (for knowing whether saved draws are still its).

    Raises:
        InputError: if there is no such file, module or function, or its code fails on import.
    """
    if (Path(source) / "reward_model.json").is_file():
        return _learned(Path(source))
    place, colon, name = source.rpartition(":")
    if not colon:
        raise InputError(f"{what} is {source!r}; write it as file.py:function, or give the folder of a reward model")
    if place.endswith(".py"):
        module, code = _from_file(Path(place), what)
    else:
        try:
            module = importlib.import_module(place)
        except (Exception, SystemExit) as error:  # whatever the module does
            reason = " ".join(str(error).split())
            raise InputError(
                f"{what} {source!r}: {place!r} raised {type(error).__name__} on import ({reason}); give file.py:function, "
                f"install the package, or mend it"
            ) from error
        code = Path(module.__file__).read_bytes() if module.__file__ else b""
    function = getattr(module, name, None)
    if not callable(function):
        found = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"{what} {source!r}: {place} has no function {name!r}; it has {', '.join(found) or 'none'}")
    return cast("TextFunction", function), hash_of(code)


def hash_of(code: bytes) -> str:
    """What code is known by."""
    return hashlib.sha256(code).hexdigest()[:16]


def _learned(folder: Path) -> tuple[TextFunction, str]:
    from tiltlm.reward_models.model import RewardModel, files_of

    return RewardModel.load(folder), hash_of(b"".join(file.read_bytes() for file in files_of(folder)))


def _from_file(path: Path, what: str) -> tuple[Any, bytes]:
    if not path.is_file():
        raise InputError(f"{what}: there is no file {str(path)!r}; give file.py:function")
    spec = importlib.util.spec_from_file_location(f"tiltlm_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that dataclasses and pickling inside the file work
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{what} file {str(path)!r} raised {type(error).__name__} on import ({reason}); mend it"
        ) from error
    return module, path.read_bytes()
