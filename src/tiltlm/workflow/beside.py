"""Paths in a recipe's file: relative to the file if they exist there, else to the working folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiltlm.data.reading import address

PARTS = ("reward", "gold")
"""Keys that are a function, or a list of parts."""


def beside(file: Path, name: str, value: Any) -> Any:
    """The value of a recipe's key, with the paths in it as the working folder has them."""
    if name in PARTS and isinstance(value, list | dict):
        return [_parts_beside(file, part) for part in (value if isinstance(value, list) else [value])]
    if name == "moments" and isinstance(value, list):
        return [_moment_beside(file, moment) for moment in value]
    if name in {"prompts", "test", "reward", "gold", "start", "prior_adapter", "model", "data"} and isinstance(
        value, str
    ):
        if name in ("prompts", "test"):
            return _source_beside(file, value)
        path, colon, rest = value.partition(":")
        near = file.parent / path
        if near.exists() and not Path(path).is_absolute():
            return f"{near}{colon}{rest}"
    return value


def _source_beside(file: Path, source: str) -> str:
    """Prompts beside the recipe; sets, hub ids and what is not there stay as they are."""
    at = address(source)
    near = file.parent / at.place
    return f"{near}{source.removeprefix(at.place)}" if at.kind != "data" and near.is_file() else source


def _parts_beside(file: Path, part: Any) -> Any:
    """An item of a reward's list, the file of its function or schema found beside the recipe."""
    if not isinstance(part, dict):
        return part
    near = {key: beside(file, "reward", part[key]) for key in ("function", "schema") if key in part}
    return {str(key): value for key, value in (part | near).items()}


def _moment_beside(file: Path, moment: Any) -> Any:
    return _parts_beside(file, moment) if isinstance(moment, dict) else beside(file, "reward", moment)
