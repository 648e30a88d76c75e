"""`tiltlm task`: the applications, from their data to a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tiltlm.cli.bars import draw_bars
from tiltlm.cli.options import Json, recipe_command
from tiltlm.cli.output import console, require_writable, say, stderr, write_result
from tiltlm.errors import InputError
from tiltlm.tasks import about, applications, task_recipe, tasks
from tiltlm.workflow.recipe import Recipe
from tiltlm.workflow.recipe_files import quickened

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tiltlm.workflow.task import TaskRun

SHORT = ("prior", "policy")
"""What is drawn and judged without --table."""
SEEDS = 3


def _named(file: Path | None) -> Path:
    """The recipe of a task's name; without one, the list of all and no more."""
    if file is None:
        table = Table(
            "task",
            "what",
            title="five applications, and their variants",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        for name in tasks():
            table.add_row(name if name in applications() else f"  {name}", about(name).partition(". ")[0].rstrip("."))
        console.print(table)
        say("see that one runs:      tiltlm task NAME --quick", style="dim")
        say("train and judge it:     tiltlm task NAME", style="dim")
        say("every method, 3 seeds:  tiltlm task NAME --table", style="dim")
        say("its settings, to copy:  tiltlm task NAME --show", style="dim")
        raise typer.Exit
    return task_recipe(file)


@recipe_command(
    "Prior",
    "Evidence",
    "Application",
    "Training",
    "Samples",
    "Run",
    find=_named,
    argument="an application's name, or a YAML file of one's own; none lists them",
)
def task(
    recipe: Recipe,
    table: Annotated[bool, typer.Option("--table", help="all methods, with several seeds")] = False,
    methods: Annotated[
        str | None,
        typer.Option(
            help="by commas: prior, prior/greedy, sft, best-of-n, smc, policy, policy/greedy, dpo, policy/smc; and sft/policy, mrt, "
            "prior/mbr, copy, lead-N, vote-T"
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="the method that others are compared with; the first by default")
    ] = None,
    betas: Annotated[
        str | None, typer.Option(help="train at each of these betas instead, 0.05,0.2,1: which one is right?")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="seeds of each method; 1, with --table 3")] = None,
    draws: Annotated[int, typer.Option(min=2, help="completions of each test prompt")] = 8,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="half a minute, to see that everything runs; in a folder of its own, OUT-quick"),
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="print the recipe and stop")] = False,
    json_file: Json = None,
) -> None:
    """Run an application: train on its data, and judge prior and policy on the untouched test set."""
    from tiltlm.lm.load import quieten
    from tiltlm.report.canvas import write_figure
    from tiltlm.workflow.task import TaskRun

    chosen = quickened(recipe) if quick else recipe
    if show:
        say(chosen.model_dump_json(indent=2, exclude_defaults=True))
        return
    require_writable(json_file)
    quieten()
    with draw_bars(stderr) as bars:
        running = TaskRun(chosen, draws, bars.bar, stderr)
        try:
            if betas is not None:
                shown = _swept(running, _numbers(betas), seeds or 1)
            else:
                names = _names(methods, table, chosen.baselines)
                shown = _compared(running, names, seeds or (SEEDS if table else 1), baseline)
        finally:
            running.close()
    for part in shown.parts:
        console.print(part)
    for name, figure in shown.figures.items():
        say(f"picture: {write_figure(figure, chosen.folder / f'{name}.html')}")
    write_result(chosen.folder / f"{shown.name}.json", shown.values)
    write_result(json_file, shown.values)


@dataclass(frozen=True)
class _Shown:
    """A result: what is printed, its pictures by name, its numbers, and what their file is called."""

    name: str
    parts: tuple[Any, ...]
    figures: Mapping[str, go.Figure]
    values: Mapping[str, Any]


def _compared(running: TaskRun, methods: list[str], seeds: int, baseline: str | None) -> _Shown:
    from tiltlm.report.selective import risk_coverage_figure
    from tiltlm.report.tasks import task_figure
    from tiltlm.workflow.task import certificates, risk_curves, task_table

    found, outcomes = task_table(running, methods, seeds, baseline)
    table = found.as_dict()
    values = {**table, "beta": running.beta, "outcomes": [outcome.facts() for outcome in outcomes]}
    figures, curves = {"task": task_figure(table)}, [curve.as_dict() for curve in risk_curves(running, outcomes)]
    if curves:
        values["risk_coverage"] = curves
        figures["risk-coverage"] = risk_coverage_figure(curves)
    return _Shown("task", (found, certificates(outcomes, running.beta)), figures, values)


def _swept(running: TaskRun, betas: list[float], seeds: int) -> _Shown:
    from tiltlm.report.betas import betas_figure
    from tiltlm.workflow.betas import sweep

    found = sweep(running, betas, seeds)
    values = found.as_dict()
    return _Shown("betas", (found,), {"betas": betas_figure(values)}, values)


def _names(methods: str | None, table: bool, baselines: list[str]) -> list[str]:
    from tiltlm.workflow.methods import METHODS

    if methods is not None:
        return [name.strip() for name in methods.split(",")]
    return [*METHODS, *baselines] if table else list(SHORT)


def _numbers(betas: str) -> list[float]:
    try:
        return [float(beta) for beta in betas.split(",")]
    except ValueError:
        raise InputError(
            f"betas is {betas!r}; write numbers with commas between them, for example 0.05,0.2,1"
        ) from None
