"""What `tiltlm start` does: rows by name or from files, and a start trained on them; and a start as a recipe's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiltlm.errors import InputError
from tiltlm.start import Started, train_start
from tiltlm.start.catalogue import find_start
from tiltlm.workflow.inputs import read_rows

PREFIX = "start:"
"""Before a start's name, where a recipe names its model."""


def model_of(source: str, progress: Any = None) -> str:
    """What to load: the folder of `start:NAME` or `start:NAME/quick`, trained on its data unless the cache has it; else the source.

    Raises:
        InputError: for a start that is not there.
    """
    if not source.startswith(PREFIX):
        return source
    name, _, size = source.removeprefix(PREFIX).partition("/")
    if size not in ("", "quick"):
        raise InputError(f"model is {source!r}; after the start's name there may be /quick and nothing else")
    return str(start_from(name, quick=bool(size), progress=progress).folder)


def start_from(
    name: str,
    *,
    data: str | None = None,
    train: str | None = None,
    validation: str | None = None,
    quick: bool = False,
    out: Path | None = None,
    progress: Any = None,
    **changes: Any,
) -> Started:
    """Train a start on a prepared data set, or on rows in files.

    Raises:
        InputError: for a start, data or settings that cannot be used.
    """
    start = find_start(name)
    if (train is None) != (validation is None):
        given, missing = ("train", "validation") if validation is None else ("validation", "train")
        raise InputError(f"{given} is given without {missing}; a start learns from the one and stops by the other")
    if train is not None and validation is not None:
        if data is not None:
            raise InputError(f"data is {data!r}, and train and validation are given too; leave one of them out")
        splits: Any = {"train": read_rows(train), "validation": read_rows(validation)}
    else:
        from tiltlm.data import load

        splits = load(data or start.data, progress=progress)
    # a few columns as plain lists: a row of a data set on disk is slow to reach
    rows = {split: _plain(splits[split]) for split in ("train", "validation")}
    return train_start(name, rows["train"], rows["validation"], quick=quick, out=out, progress=progress, **changes)


def _plain(rows: Any) -> list[dict[str, Any]]:
    wanted = ("prompt", "image", "reference")
    return [{column: row[column] for column in wanted if column in row} for row in rows]
