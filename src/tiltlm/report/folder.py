"""The JSON files of a run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltlm.errors import InputError

Json = Mapping[str, Any]

PLAN_KEYS = ("prior_reward", "frontier", "best_of_n", "chosen", "per_prompt", "notes")
CERTIFICATE_KEYS = ("beta", "reward", "kl_prior", "elbo", "kl_posterior", "ess", "diversity", "per_prompt", "notes")
NO_PLAN: Json = {
    "prior_reward": {"value": None, "low": None, "high": None},
    "frontier": [],
    "best_of_n": [],
    "chosen": None,
    "per_prompt": [],
    "notes": [],
}
"""Stands for a plan where there is none."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds; all but the plan may be missing.

    Attributes:
        recipe: the resolved configuration.
        plan: `Plan.as_dict()`.
        metrics: one mapping a step.
        certificate: `Certificate.as_dict()` of the trained policy.
        samples: one mapping a prompt, with the lists "prior", "posterior" and "policy".
        hacking: what `tiltlm certify` keeps of lengths, log-weights and the held-out reward.
        trained: what the policy was trained on, as hashes; None where nothing was, or the folder does not say.
    """

    folder: Path
    recipe: Json
    plan: Json
    metrics: tuple[Json, ...] = ()
    certificate: Json | None = None
    samples: tuple[Json, ...] = ()
    hacking: Json | None = None
    trained: Json | None = None


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: if the folder or its plan is missing, or a file cannot be read.
    """
    run = read_what_is_there(folder)
    if run.plan is NO_PLAN:
        raise InputError(f"{run.folder / 'plan.json'} is missing; run tiltlm plan first")
    return run


def read_what_is_there(folder: Path) -> Run:
    """Read a run folder that may lack even its plan (a run at a given beta can be trained without one).

    Raises:
        InputError: if there is no such folder, or a file in it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no run folder {str(folder)!r}; run tiltlm plan first, or check the path")
    plan = _read(folder / "plan.json", PLAN_KEYS, "tiltlm plan") or NO_PLAN
    return Run(
        folder=folder,
        recipe=_read(folder / "recipe.json", (), "tiltlm plan") or {},
        plan=plan,
        metrics=_read_metrics(folder / "metrics.jsonl"),
        certificate=_read(folder / "certificate.json", CERTIFICATE_KEYS, "tiltlm certify"),
        samples=tuple((_read(folder / "samples.json", ("prompts",), "tiltlm certify") or {"prompts": ()})["prompts"]),
        hacking=_read(folder / "hacking.json", ("length", "draws", "heaviest"), "tiltlm certify"),
        trained=trained_about(folder),
    )


def _read(path: Path, keys: tuple[str, ...], command: str) -> Json | None:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); run {command} again") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no JSON object; run {command} again")
    lacking = [key for key in keys if key not in loaded]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}; it is of another version, so run {command} again")
    return loaded


def _read_metrics(path: Path) -> tuple[Json, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); run tiltlm train again") from error
    rows: list[Json] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # a run that is being written, or was killed while writing: its last line may be half a line
            raise InputError(f"{path} is not JSON in line {number} ({error}); remove that line") from error
        if not isinstance(row, dict) or "step" not in row:
            raise InputError(f"{path} has no step in line {number}; remove that line")
        rows.append(row)
    return tuple(rows)


def is_trained(folder: Path) -> bool:
    """Whether training has begun in a folder."""
    return (folder / "checkpoints").is_dir() or (folder / "policy").is_dir()


def trained_about(folder: Path) -> Json | None:
    """What was trained in a folder, also where training came to no end; None where nothing was, or an earlier version does not say."""
    if (folder / "policy" / "tiltlm.json").is_file():
        return policy_about(folder / "policy")
    return _about(folder / "recipe.json") if is_trained(folder) else None


def policy_about(policy: Path) -> Json | None:
    """What a policy was trained on, if its folder says so."""
    return _about(policy / "tiltlm.json", "recipe")


def _about(file: Path, *within: str) -> Json | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for key in (*within, "about"):
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None


def differing(one: Json | None, other: Json | None, kinds: Sequence[str]) -> str:
    """Which of `kinds` are not the same in what two files are about; "" where one of them does not say."""
    one, other = one or {}, other or {}
    return ", ".join(kind for kind in kinds if kind in one and kind in other and one[kind] != other[kind])


def finite(value: Any) -> float | None:
    """A number that can be drawn: None for null, NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
