"""The sets there are: found by looking into the folder `sets`, so that a new file is all that a new set needs."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from tiltlm.data import sets
from tiltlm.data.spec import DataSet
from tiltlm.errors import InputError


@cache
def all_sets() -> Mapping[str, DataSet]:
    """Every set by its name, which is its file's with hyphens."""
    found = {}
    for entry in pkgutil.iter_modules(sets.__path__):
        module = importlib.import_module(f"{sets.__name__}.{entry.name}")
        found[entry.name.replace("_", "-")] = module.SET
    return dict(sorted(found.items()))


def find_set(name: str) -> DataSet:
    """A set by name.

    Raises:
        InputError: if there is none, with the nearest name.
    """
    known = all_sets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(known)}"
        raise InputError(f"data set is {name!r}; {hint}")
    return known[name]
