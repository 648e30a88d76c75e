"""How `tiltlm rewards` shows the named parts."""

from __future__ import annotations

import difflib
import inspect

from rich.table import Table
from rich.text import Text

from tiltlm.errors import InputError
from tiltlm.rewards.catalogue import described, part_kinds


def table_of_parts() -> Table:
    """Every part: name, bounds, whether SMC may steer by it, settings."""
    table = Table(
        "part", "bounds", "on prefixes", "settings", caption="in a recipe: reward: [{part: NAME, weight: 1.0, …}]"
    )
    for row in described():
        settings = [key if value == "needed" else f"{key}={_short(value)}" for key, value in row["settings"].items()]
        table.add_row(row["name"], row["bounds"], "yes" if row["prefixes"] else "no", Text(", ".join(settings)))
    return table


def page_of_part(name: str) -> Text:
    """What a part says of itself.

    Raises:
        InputError: for a part that is not there.
    """
    kinds = part_kinds()
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(kinds)}"
        raise InputError(f"part is {name!r}; {hint}")
    (row,) = [row for row in described() if row["name"] == name]
    return Text(f"{name}, bounds {row['bounds']}\n\n{inspect.cleandoc(kinds[name].__doc__ or '')}")


def _short(value: object) -> str:
    text = str(value).splitlines()[0] if str(value) else "''"
    return text if len(text) <= 24 else f"{text[:21]}…"
