"""`tiltlm compare`: contenders by name, their comparison, and what is written of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltlm.errors import InputError
from tiltlm.inference.catalogue import decoding_engines, make_engine, make_trainer, training_engines
from tiltlm.inference.compare import Comparison, Contender, compare
from tiltlm.inference.decoding.budget import within
from tiltlm.inference.monitor import Monitor
from tiltlm.inference.source import Decoded, Replay
from tiltlm.report.comparison import write_comparison
from tiltlm.workflow.files import require_writable_folder, write_json
from tiltlm.workflow.run import Run
from tiltlm.workflow.training import lora_of, training_of

TEACHER = "best-of-n"
"""Whose samples an engine learns from that learns from given completions."""


def contenders_of(names: str, group: int, max_new_tokens: int) -> dict[str, Contender]:
    """Contenders from a list such as "prior,smc,rloo,var-grad+replay,rloo/smc,sft".

    A name is an engine's. `+replay` lets a training engine reuse earlier draws, `/decoder` decodes with the trained policy as the
    proposal, and an engine that learns from given completions gets the best of n of the prior.

    Raises:
        InputError: for an engine that is not there.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise InputError("engines is empty; name some, for example rloo,var-grad+replay,best-of-n")
    return {name: _contender(name, group, max_new_tokens) for name in found}


def _contender(name: str, group: int, max_new_tokens: int) -> Contender:
    if name == "prior":
        return Contender()
    trained, decodes, decoder = name.partition("/")
    base, plus, habit = trained.partition("+")
    if plus and habit != "replay":
        raise InputError(f"engine is {name!r}; after the plus only 'replay' is known")
    then = within(make_engine(decoding_engines(), decoder, {}), group) if decodes else None
    trainers, decoders = training_engines(), decoding_engines()
    if base in decoders and not decodes and not plus:
        return Contender(decoders[base])
    if base not in trainers:
        make_engine({**decoders, **trainers}, base, {})  # says what there is
    engine = make_trainer(base, group, max_new_tokens, {})
    source: Any = Replay(old=group) if plus else None
    if source is None and engine.claim.data == "given":
        source = Decoded(within(decoders[TEACHER], group))
    return Contender(engine, source, then=then)


def contest(
    run: Run, engines: str, samples: int | None, seconds: float | None, console: Any = None
) -> tuple[Comparison, ...]:
    """Compare engines on a recipe's target, at equal samples and, if asked for, at equal seconds.

    Writes `compare.json` and `compare.html` into the recipe's folder.
    """
    contenders = contenders_of(engines, run.recipe.group, run.recipe.max_new_tokens)
    run.check()
    require_writable_folder(run.recipe.folder)
    target = run.target(run.chosen_beta())
    budgets: Sequence[Mapping[str, Any]] = [
        *([{"samples": samples, "seconds": None}] if samples is not None else []),
        *([{"samples": None, "seconds": seconds}] if seconds is not None else []),
    ]
    found = tuple(
        compare(
            target,
            run.prompts,
            contenders,
            settings=training_of(run.recipe),
            lora=lora_of(run.recipe),
            evaluation=run.recipe.samples,
            exact_budget=run.recipe.exact_budget,
            gold=run.gold,
            progress=lambda name: Monitor(console=console, what=name),
            **budget,
        )
        for budget in budgets
    )
    write_json(run.recipe.folder / "compare.json", {"comparisons": [c.as_dict() for c in found]})
    write_comparison([c.as_dict() for c in found], Path(run.recipe.folder) / "compare.html")
    return found
