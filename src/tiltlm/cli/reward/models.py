"""`tiltlm reward fit` and `report`: learn a reward from judgements, and see whether its probabilities are right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltlm.cli.bars import draw_bars
from tiltlm.cli.options import Json, Seed
from tiltlm.cli.output import require_writable, say, stderr, write_result

Data = Annotated[
    list[str],
    typer.Option(
        help="rows with chosen and rejected, or completion with score or label; several files are heads that share a trunk"
    ),
]
Model = Annotated[str, typer.Option(help="a causal LM or an encoder: hub id, folder, or embedded name")]
Unfreeze = Annotated[str | None, typer.Option(help="train the top layers: how many, or all", show_default=False)]
Bootstrap = Annotated[
    bool | None,
    typer.Option(help="resample each member's rows; by default if only heads are learned", show_default=False),
]
Precision = Annotated[
    float | None, typer.Option(help="of the heads' prior; by default the evidence chooses it", show_default=False)
]


def fit(
    data: Data,
    out: Annotated[Path, typer.Option(help="folder of the reward model")] = Path("runs/reward-model"),
    model: Model = "all-minilm-l6-v2",
    lora_r: Annotated[int, typer.Option(help="rank of an adapter to train; 0 learns heads only", min=0)] = 0,
    unfreeze: Unfreeze = None,
    members: Annotated[int, typer.Option(help="of an ensemble; 1 has a Laplace posterior alone", min=1)] = 1,
    bootstrap: Bootstrap = None,
    precision: Precision = None,
    label_smoothing: Annotated[float, typer.Option(help="share of labels that are wrong")] = 0.0,
    steps: Annotated[int, typer.Option(help="of training the trunk", min=1)] = 200,
    batch: Annotated[int, typer.Option(help="rows in a step", min=1)] = 16,
    lr: Annotated[float, typer.Option(help="learning rate of the trunk")] = 1e-4,
    max_tokens: Annotated[int, typer.Option(help="of a text; of a longer one the end is read", min=8)] = 512,
    pooling: Annotated[str, typer.Option(help="auto, mean, first or last")] = "auto",
    dtype: Annotated[str, typer.Option(help="precision of the model")] = "auto",
    device: Annotated[str, typer.Option(help="where it runs")] = "auto",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what is in the folder")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="in place of the model that is in the folder")] = False,
    json_file: Json = None,
) -> None:
    """Learn a reward; the folder then serves as one: --reward runs/reward-model."""
    from tiltlm.lm.load import quieten
    from tiltlm.workflow.reward_models import train_from_files

    require_writable(json_file)
    quieten()
    learning = {"members": members, "bootstrap": bootstrap, "precision": precision, "seed": seed, "resume": resume}
    trunk = {"lora_r": lora_r, "unfreeze": unfreeze, "max_tokens": max_tokens, "pooling": pooling}
    steps_of = {"steps": steps, "batch": batch, "lr": lr, "label_smoothing": label_smoothing}
    settings = {**learning, **trunk, **steps_of, "dtype": dtype, "device": device}
    with draw_bars(stderr) as bars:
        found = train_from_files(data, out, model, settings, bars.bar, replace=replace)
    heads = {
        name: {"kind": head.kind, "classes": head.classes, "precision": [part.precision for part in head.parts]}
        for name, head in found.heads.items()
    }
    for name, head in heads.items():
        words = ", ".join(f"{value:.3g}" for value in head["precision"])
        say(f"{name}: {head['kind']}, prior precision {words}")
    say(f"reward model: {out}")
    write_result(json_file, {"reward_model": str(out), "heads": heads})


def report(
    folder: Annotated[Path, typer.Argument(help="folder of a reward model")],
    data: Annotated[str, typer.Option(help="rows that it has not seen, of the kind that it learned from")],
    shifted: Annotated[
        list[str] | None, typer.Option(help="rows from elsewhere: out of distribution", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="whose head; the first by default", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(help="write the reliability diagrams here", show_default=False)] = None,
    json_file: Json = None,
) -> None:
    """Say how good a reward model's probabilities are: NLL, accuracy, calibration error, reliability."""
    from tiltlm.lm.load import quieten
    from tiltlm.workflow.reward_models import check_from_files

    require_writable(html, json_file)
    quieten()
    with draw_bars(stderr) as bars:
        found = check_from_files(folder, data, shifted or [], task, bars.bar)
    for bayesian, plain in found:
        say(str(bayesian))
        say(f"  by its mean alone {plain}")
    pairs = [(bayesian.as_dict(), plain.as_dict()) for bayesian, plain in found]
    if html is not None:
        from tiltlm.report.reliability import write_calibration

        say(f"picture: {write_calibration(pairs, html)}")
    write_result(json_file, {"checks": [{"with_uncertainty": a, "mean_alone": b} for a, b in pairs]})
