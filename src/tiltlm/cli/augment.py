"""`tiltlm augment`: more rows from few, with the labels they have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltlm.cli.bars import draw_bars
from tiltlm.cli.options import Seed
from tiltlm.cli.output import require_writable, say, stderr


def augment(
    source: Annotated[
        Path, typer.Argument(help="preferences or demonstrations, with TRL's columns", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help=".jsonl to write: the rows, then the new ones", show_default=False)],
    names: Annotated[
        str,
        typer.Option(
            "--with",
            help="delete, swap, replace, cross-prompt, length, format, label-swap, back-translation; commas between",
            show_default=False,
        ),
    ],
    n: Annotated[int, typer.Option("--n", help="new versions of a row by each of them", min=1)] = 1,
    seed: Seed = 0,
    rate: Annotated[float, typer.Option(help="share of the words that are edited")] = 0.1,
    protect: Annotated[
        str | None, typer.Option(help="words that edits leave alone, beside negations and numbers", show_default=False)
    ] = None,
    there: Annotated[
        str | None, typer.Option(help="translation model into another language", show_default=False)
    ] = None,
    back: Annotated[str | None, typer.Option(help="translation model back from it", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="sample translations; beam search by default", show_default=False)
    ] = None,
) -> None:
    """Make more rows of preferences or demonstrations, without changing what they say."""
    from tiltlm.augmentation import BackTranslation
    from tiltlm.augmentation.augment import AUGMENTATIONS
    from tiltlm.workflow.augment import augment_file

    require_writable(out)
    with draw_bars(stderr) as bars:
        counts = augment_file(
            source,
            out,
            names,
            n=n,
            seed=seed,
            rate=rate,
            protect=protect,
            there=there,
            back=back,
            temperature=temperature,
            progress=bars.bar,
        )
    for name, count in counts.items():
        kind = BackTranslation if name == BackTranslation.name else AUGMENTATIONS[name]
        say(f"{name}: {count} new rows; keeps {getattr(kind, 'preserves', '')}")
    say(f"written: {out}")
