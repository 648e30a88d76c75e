"""Labelling from the command line: where the candidates come from, and what the reward's posterior says of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.labels import Candidates, Question, Session
from tiltlm.seeds import generator
from tiltlm.workflow.files import write_text
from tiltlm.workflow.inputs import LOADERS, load_function, read_prompts
from tiltlm.workflow.recipe import Recipe
from tiltlm.workflow.run import Progress, Run

PREFERENCES = "preferences.jsonl"
"""The decided questions of a session in TRL's columns, written anew after every sitting."""


def session_of(
    folder: Path, recipe: Recipe, *, draws: int, policy: Path | None, candidates: Path | None, progress: Progress | None
) -> Session:
    """The folder's session; if there is none, a new one on given candidates, or on draws of the prior or a policy.

    Args:
        draws: completions a prompt.
        policy: adapter to draw from instead of the prior.
        candidates: a table with `prompt` and `completions`, instead of draws.

    Raises:
        InputError: if there is nothing to draw from.
    """
    if (folder / "session.json").exists():
        return Session.open(folder)
    if candidates is not None:
        return Session.create(folder, _given(candidates), seed=recipe.seed)
    if draws < 2:
        raise InputError(f"draws is {draws}; a question needs two completions of a prompt")
    run = Run(recipe, progress=progress)
    sampler: Any = run.prior
    if policy is not None:
        if not (policy / "adapter_config.json").is_file():
            raise InputError(f"policy {str(policy)!r} holds no adapter; give the policy folder of a run")
        sampler = run.prior.policy(start=policy)
    if progress is not None:
        sampler = replace(sampler, progress=progress("completions", len(run.prompts) * draws))
    drawn = sampler.draw(run.prompts, draws, generator(recipe.seed, "labels/candidates"))
    return Session.create(folder, Candidates.of_draws(drawn), seed=recipe.seed)


def members_of(source: str, session: Session) -> Tensor:
    """Members [K, B] from a user's function, `fn(prompts, completions, answers) -> list`, any of the arguments by name.

    The function returns for each completion its rewards under K draws of the reward's posterior, or one number (K = 1);
    `answers` are the rows answered so far, with prompt, chosen and rejected, to learn from. (prompts, completions) are lists of
    the same length, plain strings for completions.

    Raises:
        InputError: if it does not.
    """
    fn, _ = load_function(source, "members")
    world = session.candidates
    known: dict[str, Callable[[], Any]] = {
        "prompts": lambda: [world.prompts[i] for i in world.prompt_index.tolist()],
        "completions": lambda: list(world.completions),
        "answers": session.rows,
    }
    parameters = inspect.signature(fn).parameters.values()
    missing = [
        p.name for p in parameters if p.name not in known and p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    if missing:
        raise InputError(f"members {source!r} asks for {missing[0]!r}; it may ask for {', '.join(known)}")
    names = (
        known if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in parameters if p.name in known]
    )
    try:
        returned: Any = fn(**{name: known[name]() for name in names})
    except Exception as error:  # whatever the user's code does
        raise InputError(f"members {source!r} raised {type(error).__name__} ({error}); mend it") from error
    try:
        values = torch.as_tensor(returned, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"members {source!r} returned {returned!r:.60}; return as many numbers for each completion"
        ) from error
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != len(world.completions):
        raise InputError(
            f"members {source!r} returned the shape {tuple(values.shape)} for {len(world.completions)} completions; return a list "
            f"with K numbers for each completion"
        )
    return values.T


def write_questions(questions: Sequence[Question], file: Path) -> None:
    """Questions as JSON lines with an empty `answer` to fill in.

    Raises:
        InputError: if the file cannot be written.
    """
    rows = [json.dumps({**question.as_dict(), "answer": None}, ensure_ascii=False) for question in questions]
    write_text(file, "".join(f"{row}\n" for row in rows))


def write_preferences(session: Session) -> Path:
    """The session's decided questions in TRL's columns, ready for `data:`.

    Raises:
        InputError: if the file cannot be written.
    """
    file = session.folder / PREFERENCES
    write_text(file, "".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in session.rows()))
    return file


def _given(file: Path) -> Candidates:
    if file.suffix not in LOADERS:
        raise InputError(f"candidates {str(file)!r} is no table; use {', '.join(LOADERS)}, with prompt and completions")
    return Candidates.of_rows(read_prompts(str(file), "prompt"))
