"""Policies on disk, as samplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiltlm.errors import InputError
from tiltlm.lm.load import load
from tiltlm.lm.view import ModelPrior


def read_policy(folder: Path, prior: ModelPrior, dtype: str, device: str) -> Any:
    """An adapter or a critic on the prior's model, or a model of its own.

    Raises:
        InputError: if the folder holds none of them.
    """
    if (folder / "adapter_config.json").is_file():
        return prior.policy(start=folder)
    if (folder / "critic.json").is_file():
        return prior.critic(start=folder)
    if (folder / "config.json").is_file():
        return prior.policy_of(load(folder, dtype=dtype, device=device).body)
    raise InputError(
        f"{str(folder)!r} holds neither an adapter, nor a critic, nor a model; run tiltlm train first, or give its folder"
    )


def policy_folder(run: Path, policy: str | None) -> Path | None:
    """Where a policy is: the run's own (None), another folder; the prior ("prior") has none."""
    if policy == "prior":
        return None
    return Path(policy) if policy is not None else run / "policy"


def trained_beta(folder: Path | None) -> float | None:
    """The temperature that a policy was trained at, if its folder says so; None too where training had no use for one."""
    if folder is None or not (folder / "tiltlm.json").is_file():
        return None
    return json.loads((folder / "tiltlm.json").read_text())["beta"]
