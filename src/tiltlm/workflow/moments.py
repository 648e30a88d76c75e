"""Moments of a recipe: solved once, kept in the run's folder, and the same evidence for every later command."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tiltlm.evidence.constraint import Constraint
from tiltlm.evidence.moments import Moment, match_moments
from tiltlm.evidence.reward import Reward
from tiltlm.protocols import Evidence, Prior
from tiltlm.records import Draws, Scored
from tiltlm.target import Target
from tiltlm.workflow.files import write_json
from tiltlm.workflow.inputs import reward_of
from tiltlm.workflow.recipe import MomentSpec

if TYPE_CHECKING:
    from tiltlm.lm.load import LanguageModel

FILE = "moments.json"


def load_moments(
    specs: Sequence[MomentSpec], lm: LanguageModel | str = ""
) -> tuple[tuple[Moment, ...], tuple[str, ...]]:
    """The moments with their functions or parts, and hashes of what they are made of.

    Args:
        lm: the language model of parts that need one and name none; its name will do to check the rest.
    """
    found = [(spec, *reward_of(spec.source, lm, what="moments")) for spec in specs]
    moments = tuple(Moment(fn, spec.mean, spec.label, spec.bounds) for spec, fn, _ in found)
    return moments, tuple(code for *_, code in found)


def solve_moments(
    base: Prior | Target,
    moments: Sequence[Moment],
    draw: Callable[[], Draws],
    samples: int,
    folder: Path,
    key: str,
) -> Evidence:
    """The evidence under which the moments hold, from `moments.json` if it is there and of this target.

    A run's commands may draw different numbers of samples; the weights come from the first of them, so that all of them speak of
    one target.

    Args:
        draw: gives the prior's draws; only called where there are no weights yet.
        key: what the weights depend on.

    Raises:
        InputError: if the moments cannot be had, with the moment, the figures and the remedy.
    """
    kept = _kept(folder / FILE, key)
    if kept is None:
        draws = draw()
        unjudged = Scored(draws, draws.log_q, torch.zeros(len(draws), dtype=torch.float64))
        scored = base.score(draws) if isinstance(base, Target) else unjudged
        found = match_moments(base, draws.prompts, moments, scored=scored, min_ess=min(32.0, samples / 4))
        estimates = zip(found.names, found.weights, found.achieved, strict=True)
        rows = {name: {"weight": w.as_dict(), "achieved": a.as_dict()} for name, w, a in estimates}
        kept = {"key": key, "moments": rows, "ess": found.ess, "kl": found.kl.as_dict()}
        write_json(folder / FILE, kept)
    return evidence_of(moments, {name: row["weight"]["value"] for name, row in kept["moments"].items()})


def evidence_of(moments: Sequence[Moment], weights: Mapping[str, float]) -> Evidence:
    """sum_i lambda_i phi_i in nats at temperature 1; a moment without a weight always holds."""
    terms: list[Any] = [
        weights[m.label] * Reward(m.fn, bounds=m.bounds, name=m.label)
        if m.label in weights
        else Constraint(m.fn, name=m.label)
        for m in moments
    ]
    return functools.reduce(operator.add, terms)


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or half a file: solved again
        return None
    return found if isinstance(found, dict) and found.get("key") == key else None


def moments_text(folder: Path) -> str:
    """What the moments came to, a line each; empty where there are none."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    lines = [
        f"moment {name}: lambda {row['weight']['value']:.3f} ± {row['weight']['stderr']:.3f} nats, mean "
        f"{row['achieved']['value']:.3f} ± {row['achieved']['stderr']:.3f}"
        for name, row in found["moments"].items()
    ]
    kl = found["kl"]
    return "\n".join([*lines, f"KL(p||base) {kl['value']:.3f} ± {kl['stderr']:.3f} nats, ESS {found['ess']:.0f}"])
