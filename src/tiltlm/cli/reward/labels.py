"""`tiltlm reward ask`, `answer` and `status`: ask for the preferences that help most, and keep the answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tiltlm.cli.bars import draw_bars
from tiltlm.cli.options import Json, recipe_command
from tiltlm.cli.output import require_writable, say, stderr, write_result
from tiltlm.errors import InputError
from tiltlm.workflow.recipe import PriorRecipe, Recipe

Folder = Annotated[Path, typer.Argument(help="folder of the session", show_default=False)]


@recipe_command("Prior", "Run", kind=PriorRecipe)
def ask(
    recipe: Recipe,
    session: Annotated[Path, typer.Option(help="folder of the session; made if it is not there", show_default=False)],
    n: Annotated[int, typer.Option("--n", help="questions to ask", min=1)] = 10,
    by: Annotated[str, typer.Option(help="bald, double-thompson, margin or random")] = "random",
    members: Annotated[
        str | None,
        typer.Option(
            help="the reward's posterior: a reward model's folder, or file.py:function with K rewards a completion",
            show_default=False,
        ),
    ] = None,
    member_draws: Annotated[int, typer.Option(help="draws of a reward model's posterior", min=1)] = 64,
    timeout: Annotated[
        float | None,
        typer.Option(help="seconds that a function of members may take, in a worker process", show_default=False),
    ] = None,
    draws: Annotated[int, typer.Option(help="completions a prompt, for a new session")] = 4,
    policy: Annotated[
        Path | None, typer.Option(help="adapter to draw from instead of the prior", show_default=False)
    ] = None,
    candidates: Annotated[
        Path | None, typer.Option(help="table with prompt and completions, instead of draws", show_default=False)
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="write the open questions to this .jsonl, to be answered there", show_default=False),
    ] = None,
) -> None:
    """Choose the pairs to ask about; they stay open until they are answered."""
    from tiltlm.labels.acquisition import acquisition
    from tiltlm.lm.load import quieten
    from tiltlm.workflow.labels import members_of, session_of, write_questions

    rule = acquisition(by)
    if rule.least_members and members is None:
        raise InputError(f"by is {by!r}, which looks at a reward; give --members, or ask by random")
    require_writable(write)
    quieten()
    with draw_bars(stderr) as bars:
        found = session_of(session, recipe, draws=draws, policy=policy, candidates=candidates, progress=bars.bar)
        drawn = None
        if members is not None:
            drawn = members_of(members, found, draws=member_draws, timeout=timeout, progress=bars.bar)
    asked = found.ask(n, rule, drawn)
    waiting = found.open_questions
    if write is not None:
        write_questions(waiting, write)
        say(f"{len(waiting)} open questions: {write}")
    else:
        for question in asked:
            _print(question)
    if len(asked) < n:
        say(f"{len(asked)} pairs were left to ask about", aside=True)
    say(f"answer with: tiltlm reward answer {session} --terminal", aside=True)


def answer(
    session: Folder,
    answers: Annotated[
        Path | None,
        typer.Argument(help="JSON lines with question and answer: first, second, tie, skip", show_default=False),
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="ask here, one key for an answer")] = False,
) -> None:
    """Answer the open questions; every answer is kept at once, and the preferences are written in TRL's columns."""
    from tiltlm.labels import AnswerFile, Session
    from tiltlm.labels.terminal import answer_at_terminal
    from tiltlm.workflow.labels import write_preferences

    if (answers is None) is not terminal:
        raise InputError("answers come from a file or from the terminal; give a file, or --terminal")
    found = Session.open(session)
    try:
        new = AnswerFile(answers).into(found) if answers is not None else answer_at_terminal(found, stderr, _read_key)
    finally:
        file = write_preferences(found)
    say(f"{new} new answers, {len(found.open_questions)} questions open, {len(found.rows())} preferences: {file}")


def status(
    session: Folder,
    json_file: Json = None,
) -> None:
    """Say how far a session is."""
    from tiltlm.labels import Session
    from tiltlm.workflow.labels import write_preferences

    require_writable(json_file)
    found = Session.open(session)
    values = found.status()
    by = ", ".join(f"{count} by {name}" for name, count in values["asked"].items()) or "none"
    said = f"{values['first']} first, {values['second']} second, {values['tie']} ties, {values['skip']} skipped"
    lines = [f"pairs: {values['pairs']}", f"asked: {by}", f"open: {values['open']}", f"answers: {said}"]
    if values["first_won"] is not None:
        lines.append(
            f"the text shown first won {values['first_won']:.0%} of {values['first'] + values['second']} decisions"
        )
    lines.append(f"preferences: {write_preferences(found)}")
    for line in lines:
        say(line)
    write_result(json_file, values)


def _print(question: Any) -> None:
    from tiltlm.records import shown

    prompt = shown(question.prompt)
    for line, style in (
        (f"question {question.number}: {prompt}", "bold"),
        (f"  1  {question.first}", ""),
        (f"  2  {question.second}", ""),
    ):
        say(line, style=style)


def _read_key() -> str:
    """One key from the keyboard, or one letter of what is piped in; "" at the end."""
    if not sys.stdin.isatty():
        return sys.stdin.read(1)
    return typer.getchar()
