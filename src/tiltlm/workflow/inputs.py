"""What a recipe points at: prompt files and reward functions."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from tiltlm.errors import InputError

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_prompts(source: str, column: str) -> Sequence[Any]:
    """Prompts from a file: the lines of a .txt, or the rows of a table with `column`.

    Raises:
        InputError: if the file is missing, empty, of an unknown kind, or has no such column.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"prompts {source!r}: there is no such file; give a .txt, .jsonl, .json, .csv or .parquet file"
        )
    if path.suffix == ".txt":
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"prompts {source!r} is not UTF-8 text ({error.reason}); convert it") from error
        if not any(line.strip() for line in lines):
            raise InputError(f"prompts {source!r} is empty; write one prompt a line")
        while lines and not lines[-1].strip():
            lines.pop()
        return lines
    if path.suffix not in LOADERS:
        raise InputError(
            f"prompts {source!r} is a {path.suffix or 'nameless'} file; use {', '.join(['.txt', *LOADERS])}"
        )
    rows = _table(path)
    if column not in rows.column_names:
        raise InputError(
            f"column is {column!r}, but {source} has the columns {', '.join(rows.column_names)}; name the one with the prompts"
        )
    if not len(rows):
        raise InputError(f"prompts {source!r} has no rows; give at least one prompt")
    return list(rows)


def read_completions(source: str) -> Sequence[Any]:
    """Rows of completions or preferences, with TRL's columns.

    Raises:
        InputError: if the file is missing, empty, of an unknown kind, or has neither kind of columns.
    """
    path = Path(source)
    if not path.is_file() or path.suffix not in LOADERS:
        raise InputError(f"data {source!r}: there is no such table; give a {', '.join(LOADERS)} file")
    rows = _table(path)
    columns = set(rows.column_names)
    if not (columns & {"completion", "messages"} or {"chosen", "rejected"} <= columns):
        raise InputError(
            f"data {source!r} has the columns {', '.join(rows.column_names)}; it needs prompt, chosen and rejected, or prompt and "
            f"completion, or messages"
        )
    return list(rows)


def _table(path: Path) -> Any:
    import datasets

    if not path.stat().st_size:
        raise InputError(f"prompts {str(path)!r} is empty; give at least one prompt")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is said below, once
    try:
        return datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # datasets wraps parser errors in many types
        reason = " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in reason:
            raise InputError(f"prompts {str(path)!r} has no rows; give at least one prompt") from error
        raise InputError(
            f"prompts {str(path)!r} cannot be read as {path.suffix[1:]} ({reason[:200]}); mend it"
        ) from error


def load_reward(source: str) -> tuple[Callable[..., Sequence[float]], str]:
    """A reward function named as file.py:function or package.module:function.

    Returns:
        The function, and a hash of the code behind it (for knowing whether saved draws are still its).

    Raises:
        InputError: if there is no such file, module or function, or its code fails on import.
    """
    place, colon, name = source.rpartition(":")
    if not colon:
        raise InputError(f"reward is {source!r}; write it as file.py:function")
    if place.endswith(".py"):
        module, code = _from_file(Path(place))
    else:
        try:
            module = importlib.import_module(place)
        except Exception as error:  # whatever the module does
            reason = " ".join(str(error).split())
            raise InputError(
                f"reward {source!r}: {place!r} raised {type(error).__name__} on import ({reason}); give file.py:function, "
                f"install the package, or mend it"
            ) from error
        code = Path(module.__file__).read_bytes() if module.__file__ else b""
    function = getattr(module, name, None)
    if not callable(function):
        found = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"reward {source!r}: {place} has no function {name!r}; it has {', '.join(found) or 'none'}")
    return cast("Callable[..., Sequence[float]]", function), hash_of(code)


def hash_of(code: bytes) -> str:
    """What code is known by."""
    return hashlib.sha256(code).hexdigest()[:16]


def _from_file(path: Path) -> tuple[Any, bytes]:
    if not path.is_file():
        raise InputError(f"reward: there is no file {str(path)!r}; give file.py:function")
    spec = importlib.util.spec_from_file_location(f"tiltlm_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that dataclasses and pickling inside the file work
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"reward file {str(path)!r} raised {type(error).__name__} on import ({reason}); mend it"
        ) from error
    return module, path.read_bytes()
