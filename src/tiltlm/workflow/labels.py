"""Labelling from the command line: where the candidates come from, and what the reward's posterior says of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.data.spec import Progress
from tiltlm.errors import InputError
from tiltlm.evidence.running import Isolated
from tiltlm.evidence.running.calls import told
from tiltlm.labels import Candidates, Question, Session
from tiltlm.reward_models.model import MODEL_FILE, RewardModel
from tiltlm.seeds import generator
from tiltlm.workflow.files import write_text
from tiltlm.workflow.inputs import LOADERS, load_function, read_prompts
from tiltlm.workflow.recipe import Recipe
from tiltlm.workflow.run import Run

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


def members_of(
    source: str,
    session: Session,
    *,
    draws: int = 64,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Members [K, B]: rewards of every completion under draws of the reward's posterior.

    Args:
        source: a reward model's folder, or a function `fn(prompts, completions, answers) -> list`, any of the arguments by name. It
            returns for each completion its rewards under K draws, or one number (K = 1). `answers` are the rows answered so far,
            with prompt, chosen and rejected, to learn from; prompts and completions are lists of the same length.
        draws: K, of a reward model: from its last-layer posterior, or its ensemble.
        timeout: seconds that the function may take, in a worker process that is killed after them; None calls it here.

    Raises:
        InputError: if there is no such thing, or it does not do that.
    """
    prompts = [session.candidates.prompts[i] for i in session.candidates.prompt_index.tolist()]
    if (Path(source) / MODEL_FILE).is_file():
        if timeout is not None:
            raise InputError(f"members is the reward model {source!r}, which runs in this process; leave --timeout out")
        return _drawn_members(RewardModel.load(source), prompts, session, draws, progress)
    known = {"prompts": prompts, "completions": list(session.candidates.completions), "answers": session.rows()}
    if timeout is None:
        fn, _ = load_function(source, "members")
        returned = _call(fn, source, known, fn)
    else:
        with Isolated(source, timeout=timeout) as worker:
            returned = _call(worker, source, known, lambda **given: worker.once(len(prompts), **given))
    return _as_members(returned, source, len(prompts))


def _drawn_members(
    model: RewardModel, prompts: Sequence[Any], session: Session, draws: int, progress: Progress | None
) -> Tensor:
    """Draws of a reward model's posterior; other ones after every answer."""
    completions = session.candidates.completions
    bar = None if progress is None else progress("features", len(completions) * len(model.trunks))
    rng = generator(session.seed, f"labels/members/{len(session.answers)}")
    return model.posterior().members(model.features(prompts, completions, bar), draws, rng).double()


def _call(fn: Any, source: str, known: Mapping[str, Any], ask: Callable[..., Any]) -> Any:
    """What a user's function returns, given of what is known what it asks for by name."""
    parameters = inspect.signature(fn).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    missing = [p.name for p in named if p.name not in known and p.default is p.empty]
    if missing:
        raise InputError(f"members {source!r} asks for {missing[0]!r}; it may ask for {', '.join(known)}")
    names = known if takes_all else [p.name for p in named if p.name in known]
    try:
        return ask(**{name: known[name] for name in names})
    except (Exception, SystemExit) as error:  # whatever the user's code does
        raise InputError(f"members {source!r} {told(error)}; mend it") from error


def _as_members(returned: Any, source: str, count: int) -> Tensor:
    try:
        values = torch.as_tensor(returned, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"members {source!r} returned {returned!r:.60}; return as many numbers for each completion"
        ) from error
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != count:
        raise InputError(
            f"members {source!r} returned the shape {tuple(values.shape)} for {count} completions; return a list with K numbers for "
            f"each completion"
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
    return Candidates.of_rows(read_prompts(str(file), "prompt", what="candidates"))
