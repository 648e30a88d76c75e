"""The five applications and their variants, each a recipe: `tiltlm task NAME` runs it as it stands.

A copy of its file is the start of one's own. A variant's name begins with its application's: `qa`, `qa-chat`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from tiltlm.errors import InputError


def tasks() -> Mapping[str, Path]:
    """The recipes by name."""
    return {file.stem: file for file in sorted(Path(__file__).parent.glob("*.yaml"), key=lambda file: file.stem)}


def applications() -> tuple[str, ...]:
    """The names of the five, without variants."""
    return tuple(name for name in tasks() if "-" not in name)


def about(name: str) -> str:
    """The first lines of a recipe, which say what it is."""
    lines = tasks()[name].read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])


def task_recipe(name: str | Path) -> Path:
    """The file of an application, by name; any other file as it is.

    Raises:
        InputError: if there is neither.
    """
    known = tasks()
    if str(name) in known:
        return known[str(name)]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(known)}, or give a recipe's file"
    raise InputError(f"task is {str(name)!r}; {hint}")
