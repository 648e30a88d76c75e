"""A recipe's model, where it is a supervised start: `start:NAME`, or `start:NAME/quick`, trained on its data unless the cache has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiltlm.errors import InputError

PREFIX = "start:"
NewBar = Callable[[str, int], Callable[[int], None]]


def model_of(source: str, progress: NewBar | None = None) -> str:
    """What to load: the start's folder, or the source as it is where it names no start.

    Raises:
        InputError: for a start that is not there.
    """
    if not source.startswith(PREFIX):
        return source
    from tiltlm.data import load
    from tiltlm.start import train_start
    from tiltlm.start.tasks import find_task

    name, _, size = source.removeprefix(PREFIX).partition("/")
    if size not in ("", "quick"):
        raise InputError(f"model is {source!r}; after the start's name there may be /quick and nothing else")
    data: Any = load(find_task(name).data)
    return str(train_start(name, data["train"], data["validation"], quick=bool(size), progress=progress).folder)
