"""`tiltlm`: plan, sample, train, certify, report."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from tiltlm.cli.augment import augment
from tiltlm.cli.bars import DrawBars, draw_bars
from tiltlm.cli.data import data
from tiltlm.cli.options import Json, pairs, recipe_command
from tiltlm.cli.output import console, require_writable, say, speak_only, stderr, write_result
from tiltlm.cli.reward import reward
from tiltlm.cli.start import start
from tiltlm.cli.task import task
from tiltlm.errors import InputError, TiltWarning
from tiltlm.workflow.recipe import Recipe
from tiltlm.world import join

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Steering and fine-tuning language models as Bayesian inference.\n\nA target is a prior (your model), a reward "
    "and a temperature beta. [bold]plan[/bold] predicts what training can reach at every beta, [bold]train[/bold] trains, "
    "[bold]certify[/bold] says how far the policy is from the posterior, [bold]report[/bold] shows it, and "
    "[bold]sample[/bold] draws from the posterior without training.",
    epilog="Example: tiltlm plan recipes/film.yaml --kl-budget 0.75",
)
USAGE_ERROR: Any = typer.BadParameter.__base__
"""What Typer raises for flags it does not understand; its name is private."""
INTERRUPTED = 130
SAFE = {
    "train": "what the last checkpoint holds is safe: go on with --resume",
    "reward fit": "what the last checkpoint holds is safe: go on with --resume",
    "start": "what the last checkpoint holds is safe: the same command goes on",
    "task": "what is finished is kept: the same command goes on",
}
"""What Ctrl-C leaves of a command that goes on."""
DEFAULT_CONTEST = "prior,best-of-n,importance,rloo,var-grad+replay,sft,rloo/importance"
"""One of each family, and a trained policy corrected by its weights."""

at_end = ExitStack()
"""What is to be closed when the command ends, however it ends."""

app.add_typer(reward, name="reward")
app.command(epilog="Examples: tiltlm task · tiltlm task translation --quick · tiltlm task translation --table")(task)
app.command(epilog="Example: tiltlm augment pairs.jsonl more.jsonl --with swap,delete,length --n 2")(augment)
app.command(epilog="Examples: tiltlm data · tiltlm data quiz --show 3 · tiltlm data emoji-scenes --out scenes")(data)
app.command(epilog="Examples: tiltlm start translation · tiltlm start captions --seconds 60 --out runs/captioner")(
    start
)


@app.command(epilog="Examples: tiltlm plan recipes/film.yaml · tiltlm plan recipes/film.yaml --beta 0.1 --samples 256")
@recipe_command("Prior", "Evidence", "Running the reward", "Samples", "Run")
def plan(recipe: Recipe, json_file: Json = None) -> None:
    """Predict reward and KL at every beta, from prior samples alone."""
    require_writable(json_file)
    with _draw_bars() as bars:
        run = _run(recipe, bars)
        found = run.plan()
    say(str(found))
    if recipe.moments:
        from tiltlm.workflow.moments import moments_text

        say(moments_text(recipe.folder))
    write_result(json_file, {**found.as_dict(), "about": run.about})


@app.command(epilog="Examples: tiltlm train recipes/film.yaml · tiltlm train recipes/film.yaml --resume")
@recipe_command("Prior", "Evidence", "Running the reward", "Training", "Samples", "Run")
def train(
    recipe: Recipe,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest whole checkpoint")] = False,
    json_file: Json = None,
) -> None:
    """Train a policy towards the posterior; writes a PEFT adapter that peft and transformers load."""
    require_writable(json_file)
    with _draw_bars() as bars:
        run = _run(recipe, bars)
        beta = run.prepare(resume=resume)
    aim = f"beta {beta:.3g}" if recipe.has_temperature or recipe.moments else "no beta, which has no part in this"
    many = "given completions" if recipe.data else f"{recipe.group} completions"
    stderr.print(f"{aim}, {recipe.steps} steps of {recipe.batch} prompts × {many}")
    run.train(resume=resume)
    if not join().main:
        return
    console.print(f"policy: {recipe.folder / 'policy'}", highlight=False, soft_wrap=True)
    _print_hacking(recipe.folder, certified=False)
    steps = (recipe.folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(steps[-1]) if steps else None
    write_result(json_file, {"beta": beta, "policy": str(recipe.folder / "policy"), "last_step": last})


@app.command(epilog="Examples: tiltlm certify recipes/film.yaml · tiltlm certify recipes/film.yaml --policy prior")
@recipe_command("Prior", "Evidence", "Running the reward", "Samples", "Run")
def certify(
    recipe: Recipe,
    policy: Annotated[
        str | None,
        typer.Option(
            help='folder of an adapter or model, or "prior"; the run\'s policy by default', show_default=False
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Say how far a policy is from the posterior: KL(q||p*) as an interval."""
    require_writable(json_file)
    with _draw_bars() as bars:
        run = _run(recipe, bars)
        certificate = run.certify(policy)
    say(str(certificate))
    _print_hacking(recipe.folder, parts=policy is None)
    write_result(json_file, {**certificate.as_dict(), "about": run.about})


@app.command(
    epilog="Examples: tiltlm sample recipes/film.yaml --engine rejection --count 2 · … --proposal runs/film/policy"
)
@recipe_command("Prior", "Evidence", "Running the reward", "Run")
def sample(
    recipe: Recipe,
    engine: Annotated[str, typer.Option(help="a decoding engine; tiltlm engines lists them")] = "importance",
    draws: Annotated[int, typer.Option(help="proposals a prompt", min=1)] = 64,
    count: Annotated[int, typer.Option(help="samples a prompt", min=1)] = 1,
    proposal: Annotated[
        str | None, typer.Option(help="adapter or model to draw from instead of the prior", show_default=False)
    ] = None,
    twist: Annotated[
        str | None, typer.Option(help="for smc: a critic's folder, or 'prefix'", show_default=False)
    ] = None,
    masked_lm: Annotated[
        str | None,
        typer.Option(
            "--masked-lm", help="for mcmc: a masked language model that edits in the middle", show_default=False
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="a setting of the engine, as name=value", show_default=False)
    ] = None,
    json_file: Json = None,
) -> None:
    """Draw from the posterior now, without training."""
    from tiltlm.records import shown
    from tiltlm.workflow import sampling

    require_writable(json_file)
    settings = pairs("option", option or [])
    with _draw_bars() as bars:
        ways = {"twist": twist, "masked_lm": masked_lm, "options": settings}
        weighted, rows = sampling.sample(_run(recipe, bars), engine, draws, count, proposal, **ways)
    for row in rows:
        say(shown(row["prompt"]), style="bold")
        for completion in row["completions"]:
            text = f"  {completion['reward']:+.2f} {completion['text']}"
            say(text)
        if not row["completions"]:
            console.print(f"  none accepted in {draws} draws; raise --draws or beta", style="yellow")
        elif len(row["completions"]) < count:
            more = "" if engine.endswith("best-of-n") else "raise --draws, or "  # of which more draws make another law
            console.print(
                f"  no more of {draws} draws were kept; for {count}, {more}go on with another --seed", style="yellow"
            )
    log_z = [estimate.as_dict() for estimate in weighted.log_z] if weighted.log_z else None
    signs = {name: values.tolist() for name, values in weighted.diagnostics.items()}
    if signs:
        means = [f"{name} {sum(values) / len(values):.2f}" for name, values in signs.items()]
        stderr.print(f"mean over prompts: {', '.join(means)}", highlight=False, soft_wrap=True)
    write_result(json_file, {"engine": engine, "draws": draws, "prompts": rows, "log_z": log_z, "diagnostics": signs})


@app.command(
    epilog="Examples: tiltlm compare recipes/film.yaml --budget 2048 · … --engines prior,rloo,var-grad+replay,rloo/smc --seconds 60"
)
@recipe_command("Prior", "Evidence", "Running the reward", "Training", "Samples", "Run")
def compare(
    recipe: Recipe,
    engines: Annotated[
        str,
        typer.Option(
            help="names with commas: prior, an engine, engine+replay, engine/decoder; tiltlm engines lists them"
        ),
    ] = DEFAULT_CONTEST,
    samples_each: Annotated[int, typer.Option("--budget", help="completions that each engine may draw", min=1)] = 4096,
    seconds: Annotated[
        float | None, typer.Option(help="compare once more, at equal seconds of training", min=1, show_default=False)
    ] = None,
    json_file: Json = None,
) -> None:
    """Put engines side by side on one target, at an equal budget."""
    from tiltlm.workflow.contest import contest

    require_writable(json_file)
    with _draw_bars() as bars:
        run = _run(recipe, bars)
        run.check()
        run.chosen_beta()
    found = contest(run, engines, samples_each, seconds, stderr)
    for comparison in found:
        say(str(comparison))
    console.print(f"picture: {recipe.folder / 'compare.html'}", highlight=False, soft_wrap=True)
    write_result(json_file, {"comparisons": [comparison.as_dict() for comparison in found]})


@app.command(epilog="Examples: tiltlm engines · tiltlm engines --prove · tiltlm engines var-grad --prove")
def engines(
    name: Annotated[str | None, typer.Argument(help="only this engine", show_default=False)] = None,
    prove: Annotated[bool, typer.Option("--prove", help="check every claim by enumeration")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="also write the table as a page of documentation", show_default=False)
    ] = None,
    json_file: Json = None,
) -> None:
    """List the engines with what they claim; with --prove, prove it."""
    from tiltlm.workflow.claims import claims, claims_markdown, claims_table, details, proofs

    require_writable(json_file, markdown)
    rows = claims(name)
    if prove:
        rows = proofs(rows, lambda text: say(text, aside=True))
    console.print(claims_table(rows))
    if name is not None:
        say(details(rows[0]))
    if markdown is not None:
        from tiltlm.workflow.files import write_text

        write_text(markdown, claims_markdown(rows))
    write_result(json_file, {"engines": [row.as_dict() for row in rows]})
    if any(row.refuted for row in rows):
        raise typer.Exit(1)


@app.command(
    epilog="Examples: tiltlm explain grpo.yaml · tiltlm explain train.sh --format openrlhf · tiltlm explain recipe.yaml"
)
def explain(
    config: Annotated[Path, typer.Argument(help="a recipe, TRL config, verl YAML or OpenRLHF command line")],
    kind: Annotated[
        str | None,
        typer.Option("--format", help="tiltlm, trl, openrlhf or verl; by default it is recognised", show_default=False),
    ] = None,
    p0: Annotated[
        float, typer.Option("--p0", help="the prior's rate of success, for figures about rewards of 0 or 1")
    ] = 0.2,
    json_file: Json = None,
) -> None:
    """Say what distribution a reinforcement-learning configuration really converges to."""
    from tiltlm.explanation import explain as explained

    require_writable(json_file)
    found = explained(config, format=kind, p0=p0)
    say(str(found))
    write_result(json_file, found.as_dict())


@app.command(epilog="Example: tiltlm report runs/film")
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    json_file: Json = None,
) -> None:
    """Show a run as one table and one self-contained HTML file."""
    from tiltlm.report.html import write_report
    from tiltlm.report.summary import summary_table

    require_writable(json_file)
    page = write_report(run)
    console.print(summary_table(run))
    _print_hacking(run, parts=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    found = {name: run / f"{name}.json" for name in ("plan", "certificate")}
    parts = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    write_result(json_file, {"report": str(page), **parts})


def _draw_bars() -> DrawBars:
    return draw_bars(stderr)


def _run(recipe: Recipe, bars: DrawBars) -> Any:
    from tiltlm.lm.load import quieten
    from tiltlm.workflow.run import Run

    quieten()
    run = Run(recipe, progress=bars.bar)
    at_end.callback(run.close)
    return run


def _print_hacking(run: Path, certified: bool = True, parts: bool = False) -> None:
    """What became of the reward's parts, and what the held-out reward says in two lines; nothing where there is none."""
    from tiltlm.report.folder import read_what_is_there
    from tiltlm.report.hacking import hacking_lines, part_lines

    found = read_what_is_there(run)
    for line in [*(part_lines(found) if parts else []), *hacking_lines(found, certified)]:
        say(line)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    """Our warnings in one line; other libraries' are not for whoever runs a command."""
    if issubclass(category, TiltWarning):
        stderr.print(f"[yellow]warning:[/yellow] {message}", highlight=False, soft_wrap=True)


def run() -> None:
    """Entry point: what the user can mend is one sentence on stderr and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        _enter(sys.argv[1:2])
        with at_end:
            code = app(args=sys.argv[1:] or ["--help"], prog_name="tiltlm", standalone_mode=False)
    except USAGE_ERROR as error:
        _stop(_usage(error))
    except (InputError, FloatingPointError) as error:
        _stop(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        left = [safe for command, safe in SAFE.items() if " ".join(sys.argv[1:]).startswith(command)]
        stderr.print("; ".join(["interrupted", *left]), soft_wrap=True)
    sys.exit(code or 0)


def _enter(command: list[str]) -> None:
    """Join the processes that a launcher started beside this one, if it did; the main one does the talking."""
    world = join()
    if world.size == 1:
        return
    speak_only(world.main)
    if command != ["train"]:
        raise InputError(
            f"tiltlm {' '.join(command)} runs in one process, and {world.size} were launched; only train is shared between processes"
        )


def _stop(message: str) -> NoReturn:
    stderr.print(f"[red]error:[/red] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    sys.exit(2)


def _usage(error: Any) -> str:
    """Typer's message on a flag, as one sentence with the flag's value, that says where the flags are listed."""
    message = error.format_message().rstrip(".")
    names = getattr(getattr(error, "param", None), "opts", [])
    given = [value for flag, value in pairwise(sys.argv) if flag in names]
    if given and message.startswith("Invalid value"):
        message = f"{names[0]} is {given[-1]!r}: {error.message.rstrip('.')}"
    command = error.ctx.command_path if error.ctx is not None else "tiltlm"
    return f"{message[0].lower()}{message[1:]}; {command} --help lists what there is"
