"""`tiltlm reward-model`: learn a reward from judgements, and see whether its probabilities are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

reward_models = typer.Typer(
    no_args_is_help=True, help="Learn a reward from comparisons, scores or labels, with its uncertainty."
)
console = Console()
stderr = Console(stderr=True)

Json = Annotated[Path | None, typer.Option("--json", help="also write the result to this file", show_default=False)]
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


class _Bars(Progress):
    """A bar for each thing that is done."""

    def bar(self, what: str, count: int) -> Callable[[int], None]:
        task = self.add_task(what, total=count)
        return lambda done: self.advance(task, done)


def _bars() -> _Bars:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    return _Bars(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


@reward_models.command(
    epilog="Examples: tiltlm reward-model train --data preferences.jsonl --out runs/reward · … --model all-minilm-l6-v2 --members 8 "
    "· … --lora-r 8 --steps 300 --resume"
)
def train(
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
    pooling: Annotated[str, typer.Option(help="auto, last or mean")] = "auto",
    dtype: Annotated[str, typer.Option(help="precision of the model")] = "auto",
    device: Annotated[str, typer.Option(help="where it runs")] = "auto",
    seed: Annotated[int, typer.Option(help="of adapters, batches and bootstraps")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what is in the folder")] = False,
    json_file: Json = None,
) -> None:
    """Learn a reward; the folder then serves as one: --reward runs/reward-model."""
    from tiltlm.lm.load import quieten
    from tiltlm.workflow.files import require_writable_file, write_json
    from tiltlm.workflow.reward_models import train_from_files

    if json_file is not None:
        require_writable_file(json_file)
    quieten()
    learning = {"members": members, "bootstrap": bootstrap, "precision": precision, "seed": seed, "resume": resume}
    trunk = {"lora_r": lora_r, "unfreeze": unfreeze, "max_tokens": max_tokens, "pooling": pooling}
    steps_of = {"steps": steps, "batch": batch, "lr": lr, "label_smoothing": label_smoothing}
    settings = {**learning, **trunk, **steps_of, "dtype": dtype, "device": device}
    with _bars() as bars:
        found = train_from_files(data, out, model, settings, bars.bar)
    heads = {
        name: {"kind": head.kind, "classes": head.classes, "precision": [part.precision for part in head.parts]}
        for name, head in found.heads.items()
    }
    for name, head in heads.items():
        words = ", ".join(f"{value:.3g}" for value in head["precision"])
        console.print(f"{name}: {head['kind']}, prior precision {words}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"reward model: {out}", highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, {"reward_model": str(out), "heads": heads})


@reward_models.command(
    epilog="Example: tiltlm reward-model check runs/reward --data held-out.jsonl --shifted other.jsonl --html calibration.html"
)
def check(
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
    from tiltlm.workflow.files import require_writable_file, write_json
    from tiltlm.workflow.reward_models import check_from_files

    for file in (html, json_file):
        if file is not None:
            require_writable_file(file)
    quieten()
    with _bars() as bars:
        found = check_from_files(folder, data, shifted or [], task, bars.bar)
    for bayesian, plain in found:
        console.print(str(bayesian), highlight=False, markup=False, soft_wrap=True)
        console.print(f"  by its mean alone {plain}", highlight=False, markup=False, soft_wrap=True)
    pairs = [(bayesian.as_dict(), plain.as_dict()) for bayesian, plain in found]
    if html is not None:
        from tiltlm.report.reliability import write_calibration

        console.print(f"picture: {write_calibration(pairs, html)}", highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, {"checks": [{"with_uncertainty": a, "mean_alone": b} for a, b in pairs]})
