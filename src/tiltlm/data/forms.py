"""Requests for texts of a given form, with the form as a regular expression: made of templates of ours, not collected."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tiltlm.data.spec import DataSet, Progress, Row, Tally

PLACES = (
    "in a small harbour",
    "on a night train",
    "at the edge of a forest",
    "in an empty theatre",
    "on a snowy mountain",
)


def request(prompt: str, pattern: str, form: Mapping[str, Any], group: str) -> Row:
    """A row: what is asked for, the regular expression of what has the form, and the form in a structure."""
    return {"prompt": prompt, "pattern": pattern, "constraint": json.dumps(form), "group": group}


def requests(
    what: str, about: str, make: Callable[[], list[Row]], columns: Mapping[str, str] = MappingProxyType({})
) -> DataSet:
    """A set of them.

    Args:
        what: a sentence on a row.
        about: what a `group` is, beside the place.
        columns: what the set's own columns hold.
    """

    def rows(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
        return make()

    return DataSet(
        task="text generation",
        what=f"{what} Made of templates, for want of a free collection.",
        licence="TiltLM's, Apache-2.0",
        sources=(),
        columns={
            "prompt": "the request",
            "pattern": "regular expression of completions that have the form",
            "constraint": "JSON: the form in a structure",
            "group": f"{about}, and place",
            **columns,
        },
        content=("prompt", "group"),
        split=f"by {about} and place: no such combination is in two splits",
        rows=rows,
        groups=lambda rows, progress: [row["group"] for row in rows],
    )
