"""Scored draws on disk, so that a later command need not draw them again. Prompts are not stored: whoever asks for draws has theirs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.records import Draws, Prompts, Scored


def tensors_of(scored: Scored) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything in scored draws but their prompts: tensors by name, and plain values."""
    draws = scored.draws
    tensors = {
        "tokens": draws.tokens,
        "mask": draws.mask,
        "ended": draws.ended,
        "prompt_index": draws.prompt_index,
        "log_q": draws.log_q,
        "log_prior": scored.log_prior,
        "log_evidence": scored.log_evidence,
        **{f"reward.{name}": value for name, value in scored.rewards.items()},
    }
    optional = {"pairs": scored.pairs, "log_mu": draws.log_mu}
    tensors |= {name: value for name, value in optional.items() if value is not None}
    copies = {k: v.contiguous().clone() for k, v in tensors.items()}  # the prior's log_q may be the very log_prior
    return copies, {"texts": draws.texts, "beta": scored.beta, "dropped": scored.dropped}


def scored_of(tensors: Mapping[str, Tensor], values: Mapping[str, Any], prompts: Prompts | None = None) -> Scored:
    """The inverse of `tensors_of`; without `prompts`, whoever asked puts them in."""
    empty = Prompts(torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool), ())
    draws = Draws(
        prompts if prompts is not None else empty,
        tensors["tokens"],
        tensors["mask"].bool(),
        tensors["ended"].bool(),
        tensors["prompt_index"],
        tensors["log_q"],
        tuple(values["texts"]),
        log_mu=tensors.get("log_mu"),
    )
    return Scored(
        draws,
        tensors["log_prior"],
        tensors["log_evidence"].to(torch.float64),
        {name[7:]: value for name, value in tensors.items() if name.startswith("reward.")},
        beta=values["beta"],
        dropped=values["dropped"],
        pairs=tensors.get("pairs"),
    )


def save_scored(scored: Scored, folder: Path, key: str) -> None:
    """Write scored draws without their prompts; `key` says what they are draws of. A reader never sees half of them.

    Columns may hold anything, and JSON would give back something else (of a number of numpy's a text): a reward that is asked
    again has to see the very values that it saw before.
    """
    tensors, values = tensors_of(scored)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "draws.json").unlink(missing_ok=True)
        save_file(tensors, folder / "draws.safetensors")
        partial = folder / "draws.json.tmp"
        partial.write_text(json.dumps(values | {"key": key}))
        os.replace(partial, folder / "draws.json")  # last, so that its presence means that all is there
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} cannot be written ({reason}); make room or choose another out folder") from error


def load_scored(folder: Path, key: str, prompts: Prompts) -> Scored | None:
    """Scored draws that were saved under the same key, or None.

    Args:
        prompts: what they are draws for; the key has to tell them, with their columns, from any others.
    """
    try:
        values: dict[str, Any] = json.loads((folder / "draws.json").read_text())
        if values["key"] != key:
            return None
        return scored_of(load_file(folder / "draws.safetensors"), values, prompts)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
