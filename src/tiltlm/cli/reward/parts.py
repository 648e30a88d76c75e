"""`tiltlm reward list`: the named parts that rewards are built from."""

from __future__ import annotations

import difflib
import inspect
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from tiltlm.cli.options import Json
from tiltlm.cli.output import console, require_writable, write_result
from tiltlm.errors import InputError


def list_parts(
    name: Annotated[str | None, typer.Argument(help="only this part, with its page", show_default=False)] = None,
    json_file: Json = None,
) -> None:
    """List the named parts of rewards with their bounds and settings."""
    from tiltlm.rewards.catalogue import described

    require_writable(json_file)
    found = table_of_parts() if name is None else page_of_part(name)
    console.print(found, highlight=False, soft_wrap=name is not None)
    write_result(json_file, {"parts": described()})


def table_of_parts() -> Table:
    """Every part: name, bounds, whether SMC may steer by it, settings."""
    from tiltlm.rewards.catalogue import described

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
    from tiltlm.rewards.catalogue import described, part_kinds

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
