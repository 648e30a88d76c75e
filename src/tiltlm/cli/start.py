"""`tiltlm start`: a small model from scratch, where no pretrained one can be installed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tiltlm.cli.bars import draw_bars
from tiltlm.cli.options import Json
from tiltlm.cli.output import require_writable, say, stderr, write_result


def start(
    name: Annotated[
        str, typer.Argument(help="translation, translation-es, captions or captions-stamps", show_default=False)
    ],
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
    json_file: Json = None,
) -> None:
    """Train a small model from scratch, in minutes; an interrupted training goes on, and a finished one is in the cache."""
    from tiltlm.lm.load import quieten
    from tiltlm.workflow.start import start_from

    require_writable(json_file)
    quieten()
    given = {"seconds": seconds, "steps": steps, "lr": lr, "width": width, "layers": layers}
    changes = {key: value for key, value in given.items() if value is not None}
    with draw_bars(stderr) as bars:
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
    say(found)
    write_result(json_file, {**asdict(found), "folder": str(found.folder)})
