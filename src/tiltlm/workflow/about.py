"""What the files of a run's folder are about: its prior, prompts and reward, as hashes.

So files about different ones, which came into one folder, are not taken for one run's.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiltlm.errors import InputError, TiltWarning
from tiltlm.report.folder import differing, policy_about, trained_about

if TYPE_CHECKING:
    from tiltlm.workflow.run import Run

About = Mapping[str, str]
"""Hashes by what they are of: "prior", "prompts", "reward"."""


def digest(*parts: Any) -> str:
    """A hash of plain values; of anything else that of its text."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def about(run: Run, moment_codes: tuple[str, ...]) -> About:
    """What a run is about.

    A reward counts with its code and its settings, wherever its file is, at whatever temperature, and with whatever bounds. There
    is none where none has a part in what is learned.
    """
    r, prompts = run.recipe, run.prompts
    found = {
        "prior": digest(run.prior.fingerprint(), repr(run.prior.law), r.chat),
        "prompts": digest(prompts.texts, prompts.fingerprint(), prompts.column_fingerprints()),
    }
    if r.imitates or (r.reward is None and not r.moments):
        return found
    name = r.reward.rpartition(":")[2] if isinstance(r.reward, str) and ":" in r.reward else ""
    moments = [(moment.label, moment.mean) for moment in r.moments]
    return found | {
        "reward": digest(name, run.reward_code, r.uncertainty, r.uncertainty_options, moments, moment_codes)
    }


def refuse_others_policy(folder: Path, now: About) -> None:
    """Raise if a plan would come to lie beside a policy that it says nothing about. It may be for other prompts.

    Raises:
        InputError: naming what is different.
    """
    other = differing(trained_about(folder), now, ("prior", "reward"))
    if other:
        raise InputError(
            f"out {str(folder)!r} holds the policy of another run (not the same: {other}); choose another folder, --out"
        )


def say_if_mended(folder: Path, now: About) -> None:
    """Warn if the reward is not what the steps before were trained on; it may be mended between a crash and --resume."""
    if differing(trained_about(folder), now, ("reward",)):
        warnings.warn(
            f"the reward (its code or its settings) has changed since the run in {folder} began: its earlier steps were trained "
            f"on the earlier one; to train on this one alone, choose another folder, --out",
            TiltWarning,
            stacklevel=2,
        )


def say_if_of_another(policy: Path, now: About) -> None:
    """Warn if a policy was trained from another prior, or for another reward, than it is judged by now."""
    other = differing(policy_about(policy), now, ("prior", "reward"))
    if other:
        warnings.warn(
            f"the policy in {policy} was trained on something else than it is judged by now (not the same: {other}); the "
            f"certificate is true of what it is here, and not of what was trained",
            TiltWarning,
            stacklevel=2,
        )
