"""Scored draws on disk, so that a later command need not draw them again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tiltlm.errors import InputError
from tiltlm.records import Draws, Prompts, Scored


def save_scored(scored: Scored, folder: Path, key: str) -> None:
    """Write scored draws; `key` says what they are draws of. A reader never sees half of them."""
    draws, prompts = scored.draws, scored.draws.prompts
    tensors = {
        "prompts.tokens": prompts.tokens,
        "prompts.mask": prompts.mask,
        "tokens": draws.tokens,
        "mask": draws.mask,
        "ended": draws.ended,
        "prompt_index": draws.prompt_index,
        "log_q": draws.log_q,
        "log_prior": scored.log_prior,
        "log_evidence": scored.log_evidence,
        **{f"reward.{name}": value for name, value in scored.rewards.items()},
    }
    values = {
        "key": key,
        "texts": draws.texts,
        "prompts": prompts.texts,
        "columns": prompts.columns,
        "beta": scored.beta,
        "dropped": scored.dropped,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "draws.json").unlink(missing_ok=True)
        copies = {k: v.contiguous().clone() for k, v in tensors.items()}  # the prior's log_q may be the very log_prior
        save_file(copies, folder / "draws.safetensors")
        partial = folder / "draws.json.tmp"
        partial.write_text(json.dumps(values, default=str))
        os.replace(partial, folder / "draws.json")  # last, so that its presence means that all is there
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} cannot be written ({reason}); make room or choose another out folder") from error


def load_scored(folder: Path, key: str) -> Scored | None:
    """Scored draws that were saved under the same key, or None."""
    try:
        values: dict[str, Any] = json.loads((folder / "draws.json").read_text())
        if values["key"] != key:
            return None
        tensors = load_file(folder / "draws.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    texts = tuple(t if isinstance(t, str) else tuple(t) for t in values["prompts"])
    columns = {name: tuple(column) for name, column in values["columns"].items()}
    prompts = Prompts(tensors["prompts.tokens"], tensors["prompts.mask"].bool(), texts, columns)
    draws = Draws(
        prompts,
        tensors["tokens"],
        tensors["mask"].bool(),
        tensors["ended"].bool(),
        tensors["prompt_index"],
        tensors["log_q"],
        tuple(values["texts"]),
    )
    rewards = {name[7:]: value for name, value in tensors.items() if name.startswith("reward.")}
    return Scored(
        draws,
        tensors["log_prior"],
        tensors["log_evidence"].to(torch.float64),
        rewards,
        beta=values["beta"],
        dropped=values["dropped"],
    )
