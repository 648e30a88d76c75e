"""`tiltlm start`: a small model from scratch, where no pretrained one can be installed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tiltlm.cli.bars import draw_bars


def start(
    name: Annotated[str, typer.Argument(help="translation, summary or captions", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="a data set; by default the start's own, which it names", show_default=False)
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="your own rows: prompt or image, and reference; .jsonl", show_default=False)
    ] = None,
    validation: Annotated[str | None, typer.Option(help="rows to stop by; with --train", show_default=False)] = None,
    seconds: Annotated[float | None, typer.Option(help="most seconds of training", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="most steps of training", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate of AdamW", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(help="of the hidden states", show_default=False)] = None,
    layers: Annotated[
        int | None, typer.Option(help="of the decoder, and of a trained encoder", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="of everything random", min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="half a minute, to see that everything runs")] = False,
    out: Annotated[
        Path | None, typer.Option(help="also put the model into this new folder", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="also write the result to this file", show_default=False)
    ] = None,
) -> None:
    """Train a small model from scratch, in minutes; an interrupted training goes on, and a finished one is in the cache."""
    from tiltlm.lm.load import quieten
    from tiltlm.workflow.files import require_writable_file, write_json
    from tiltlm.workflow.start import start_from

    if json_file is not None:
        require_writable_file(json_file)
    quieten()
    given = {"seconds": seconds, "steps": steps, "lr": lr, "width": width, "layers": layers}
    changes = {key: value for key, value in given.items() if value is not None}
    with draw_bars(Console(stderr=True)) as bars:
        found = start_from(
            name,
            data=data,
            train=train,
            validation=validation,
            quick=quick,
            out=out,
            seed=seed,
            progress=bars.bar,
            **changes,
        )
    Console().print(str(found), highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, {**asdict(found), "folder": str(found.folder)})
