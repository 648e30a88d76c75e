"""Data: sets that install by package name, prepared once with a card, and users' own tables.

`load("quiz")` prepares a set and gives its splits; `read("mine.csv", columns={"prompt": "question"})` reads one's own; `leaks` counts
what is in more than one split.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltlm.data.catalogue import all_sets
    from tiltlm.data.preparation import card, fingerprint, load, prepare
    from tiltlm.data.reading import read
    from tiltlm.data.scenes import parse_caption
    from tiltlm.data.split import Leaks, leaks

_HOME = {
    "Leaks": "split",
    "all_sets": "catalogue",
    "card": "preparation",
    "fingerprint": "preparation",
    "leaks": "split",
    "load": "preparation",
    "parse_caption": "scenes",
    "prepare": "preparation",
    "read": "reading",
}

__all__ = ["Leaks", "all_sets", "card", "fingerprint", "leaks", "load", "parse_caption", "prepare", "read"]


def __getattr__(name: str) -> Any:
    """Import on first use: a split needs neither datasets nor pillow."""
    if name not in _HOME:
        raise AttributeError(f"module 'tiltlm.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tiltlm.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
