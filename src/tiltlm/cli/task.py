"""`tiltlm task`: the applications, from their data to a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tiltlm.cli.bars import draw_bars
from tiltlm.cli.options import Json, recipe_command
from tiltlm.cli.output import console, require_writable, say, stderr, write_result
from tiltlm.tasks import about, task_recipe, tasks
from tiltlm.workflow.recipe import Recipe, quickened

SHORT = "prior,policy"
"""What is drawn and judged without --table."""
SEEDS = 3


def _named(file: Path | None) -> Path:
    """The recipe of a task's name; without one, the list of all and no more."""
    if file is None:
        table = Table("task", "what", title="applications", title_justify="left", box=None, pad_edge=False)
        for name in tasks():
            table.add_row(name, about(name))
        console.print(table)
        say("run one: tiltlm task NAME; see its settings: tiltlm task NAME --show", style="dim")
        raise typer.Exit
    return task_recipe(file)


@recipe_command("Prior", "Evidence", "Application", "Training", "Samples", "Run", find=_named)
def task(
    recipe: Recipe,
    table: Annotated[bool, typer.Option("--table", help="all methods, with several seeds")] = False,
    methods: Annotated[
        str | None, typer.Option(help="methods, by commas: prior, sft, best-of-n, smc, policy, dpo, policy/smc")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="seeds of each method; 1, with --table 3")] = None,
    draws: Annotated[int, typer.Option(min=2, help="completions of each test prompt")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="half a minute, to see that everything runs")] = False,
    show: Annotated[bool, typer.Option("--show", help="print the recipe and stop")] = False,
    json_file: Json = None,
) -> None:
    """Run an application: train on its data, and judge prior and policy on the untouched test set."""
    from tiltlm.lm.load import quieten
    from tiltlm.report.tasks import write_task_figure
    from tiltlm.workflow.task import METHODS, TaskRun, certificates, task_table

    chosen = quickened(recipe) if quick else recipe
    if show:
        say(chosen.model_dump_json(indent=2, exclude_defaults=True))
        return
    require_writable(json_file)
    quieten()
    names = [name.strip() for name in (methods or (",".join(METHODS) if table else SHORT)).split(",")]
    with draw_bars(stderr) as bars:
        running = TaskRun(chosen, draws, bars.bar, stderr)
        found, outcomes = task_table(running, names, seeds or (SEEDS if table else 1))
        running.close()
    console.print(found)
    console.print(certificates(outcomes, running.beta))
    picture = write_task_figure(found.as_dict(), chosen.folder / "task.html")
    say(f"picture: {picture}")
    values = {**found.as_dict(), "beta": running.beta, "outcomes": [outcome.facts() for outcome in outcomes]}
    write_result(chosen.folder / "task.json", values)
    write_result(json_file, values)
