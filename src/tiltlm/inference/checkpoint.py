"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step-000010` with tensors (safetensors), JSON, and a manifest of SHA-256 sums. It is written
under a temporary name, synced, and renamed, so that a folder of that name is always whole; what is damaged later
is found by its sums. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlm.errors import InputError, TiltWarning
from tiltlm.inference.shards import is_shared, load_shares, save_shares
from tiltlm.world import ALONE, World

FORMAT = 1
NAME = re.compile(r"step-(\d{6,})$")


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on: tensors by name, and plain values."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def write(folder: Path, checkpoint: Checkpoint, keep: int = 2, world: World = ALONE) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    All processes of `world` call it. The main one writes, and the others only what they have shares of.

    Raises:
        InputError: if the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    unfinished = folder / f".{final.name}.{world.of_main(os.getpid())}.tmp"
    shared = {name: tensor for name, tensor in checkpoint.tensors.items() if is_shared(tensor)}

    def attempt(work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, SafetensorError) as error:
            raise _unwritable(folder, unfinished, final, error) from error

    world.each(lambda: attempt(lambda: _begin(folder, unfinished)) if world.main else None)
    if shared:
        attempt(lambda: save_shares(shared, unfinished))
    world.each(lambda: attempt(lambda: _finish(unfinished, final, checkpoint)) if world.main else None)
    if world.main:
        for old in steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{old:06d}", ignore_errors=True)
    return final


def _begin(folder: Path, unfinished: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    unfinished.mkdir()


def _finish(unfinished: Path, final: Path, checkpoint: Checkpoint) -> None:
    """Write all but the shares, and give the folder its name."""
    whole = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_shared(tensor)}
    save_file({k: v.detach().cpu().contiguous() for k, v in whole.items()}, unfinished / "state.safetensors")
    (unfinished / "state.json").write_text(json.dumps(checkpoint.values, indent=1))
    sums = {path.name: _sum(path) for path in sorted(unfinished.iterdir())}
    manifest = {"format": FORMAT, "step": checkpoint.step, "sha256": sums}
    (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in unfinished.iterdir():
        _sync(path)
    _sync(unfinished)
    if final.exists():  # a damaged one of the same step
        shutil.rmtree(final)
    os.rename(unfinished, final)
    _sync(final.parent)


def _unwritable(folder: Path, unfinished: Path, final: Path, error: Exception) -> InputError:
    shutil.rmtree(unfinished, ignore_errors=True)
    last = steps(folder)
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    kept = f"the last good checkpoint is step {last[-1]}" if last else "there is no checkpoint yet"
    return InputError(
        f"checkpoint {final} cannot be written ({reason}); {kept}: make room or choose another out folder, then go on with --resume"
    )


def refuse_earlier(out: Path) -> None:
    """Raise if a run in this folder has got somewhere.

    Raises:
        InputError: if it holds checkpoints, which a new run would replace.
    """
    if steps(out / "checkpoints"):
        raise InputError(
            f"out {str(out)!r} holds checkpoints of an earlier run; go on with --resume, or choose another folder"
        )


def steps(folder: Path) -> list[int]:
    """Steps of which there is a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := NAME.match(path.name)))


def latest(folder: Path, like: Mapping[str, Tensor] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. A damaged one is named in a warning and passed over.

    Args:
        like: tensors of which this process has a share, and wants no more; by default all are read as a whole.
    """
    found = steps(folder)
    for step in reversed(found):
        path = folder / f"step-{step:06d}"
        fault = damage(path)
        if fault is None:
            values = json.loads((path / "state.json").read_text())
            return Checkpoint(step, _tensors(path, like or {}), values)
        instead = (
            "the one before it is used" if step != found[0] else "there is none before it, so training starts anew"
        )
        warnings.warn(f"checkpoint {path} is damaged ({fault}); {instead}", TiltWarning, stacklevel=2)
    return None


def _tensors(path: Path, like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not like and len(list(path.glob("*.safetensors"))) == 1:
        return load_file(path / "state.safetensors")
    return load_shares(path, like)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, None if nothing is."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        for name, expected in manifest["sha256"].items():
            if _sum(path / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
