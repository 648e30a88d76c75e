"""Policies on disk, as samplers."""

from __future__ import annotations

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
