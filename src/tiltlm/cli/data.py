"""`tiltlm data`: the data sets there are, and one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tiltlm.cli.bars import draw_bars


def data(
    name: Annotated[str | None, typer.Argument(help="the set to prepare; none lists them", show_default=False)] = None,
    show: Annotated[int, typer.Option(help="print so many rows", min=0)] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test, for --show")] = "train",
    out: Annotated[
        Path | None,
        typer.Option(help="folder to write train.jsonl, validation.jsonl and test.jsonl into", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="also write the list or the card to this file", show_default=False)
    ] = None,
) -> None:
    """List the data sets, or prepare one: train, validation and test without leakage, with a card."""
    from tiltlm.data.preparation import card, card_text, prepare
    from tiltlm.errors import InputError
    from tiltlm.workflow.data import export, listed, shown
    from tiltlm.workflow.files import require_writable_file, write_json

    if json_file is not None:
        require_writable_file(json_file)
    console = Console()
    if name is None:
        if show or out is not None:
            raise InputError("data set is missing; name one, tiltlm data lists them")
        rows = listed()
        console.print(_table(rows))
        if json_file is not None:
            write_json(json_file, {"sets": rows})
        return
    with draw_bars(Console(stderr=True)) as bars:
        folder = prepare(name, progress=bars.bar)
        found = card(name)
        rows = shown(name, split, show) if show else []
        files = export(name, out) if out is not None else []
    console.print(Text(card_text(found)), soft_wrap=True)
    for row in rows:
        console.print(Text(json.dumps(row, ensure_ascii=False, indent=1)), soft_wrap=True)
    for file in files:
        console.print(Text(f"written: {file}"), soft_wrap=True)
    console.print(Text(f"folder: {folder}"), soft_wrap=True)
    console.print(Text(f"in a recipe: prompts: data:{name}/train[:64]"), soft_wrap=True)
    if json_file is not None:
        write_json(json_file, found)


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
