"""`tiltlm data`: the data sets there are, and one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from tiltlm.cli.bars import draw_bars
from tiltlm.cli.options import Json
from tiltlm.cli.output import console, require_writable, say, stderr, write_result


def data(
    name: Annotated[str | None, typer.Argument(help="the set to prepare; none lists them", show_default=False)] = None,
    show: Annotated[int, typer.Option(help="print so many rows", min=0)] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test, for --show")] = "train",
    out: Annotated[
        Path | None,
        typer.Option(help="folder to write train.jsonl, validation.jsonl and test.jsonl into", show_default=False),
    ] = None,
    json_file: Json = None,
) -> None:
    """List the data sets, or prepare one: train, validation and test without leakage, with a card."""
    from tiltlm.data.preparation import card, card_text, prepare
    from tiltlm.errors import InputError
    from tiltlm.workflow.data import export, listed, shown

    require_writable(json_file)
    if name is None:
        if show or out is not None:
            raise InputError("data set is missing; name one, tiltlm data lists them")
        rows = listed()
        console.print(_table(rows))
        write_result(json_file, {"sets": rows})
        return
    with draw_bars(stderr) as bars:
        folder = prepare(name, progress=bars.bar)
        found = card(name)
        rows = shown(name, split, show) if show else []
        files = export(name, out) if out is not None else []
    say(card_text(found))
    for row in rows:
        say(json.dumps(row, ensure_ascii=False, indent=1))
    for file in files:
        say(f"written: {file}")
    say(f"folder: {folder}")
    say(f"in a recipe: prompts: data:{name}/train[:64]")
    write_result(json_file, found)


def _table(rows: list[dict]) -> Table:
    table = Table(
        "set",
        "task",
        "rows",
        "licence",
        "installed",
        caption="tiltlm data NAME prepares one; what apt-get would install it fetches itself, without root",
    )
    for row in rows:
        there = "yes" if row["installed"] else f"no: {'; '.join(dict.fromkeys(row['install']))}"
        count = "not prepared" if row["rows"] is None else str(row["rows"])
        table.add_row(row["name"], row["task"], count, row["licence"], Text(there))
    return table
