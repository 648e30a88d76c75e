"""Files that a command writes: whole or not at all, and found unwritable before the work rather than after it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiltlm.errors import InputError
from tiltlm.inference.monitor import plain


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole; numbers that JSON does not have become null.

    Raises:
        InputError: if it cannot be written.
    """
    write_text(path, json.dumps(plain(values), indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole.

    Raises:
        InputError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise unwritable(path, error) from error


def require_writable_file(path: Path) -> None:
    """Raise now if `path` could not be written later.

    Raises:
        InputError: saying why.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    require_writable_folder(path.parent)


def require_writable_folder(folder: Path) -> None:
    """Make the folder if need be, and raise now if no file could be written into it later.

    Raises:
        InputError: saying why.
    """
    probe = folder / f".writable.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path, error: Exception) -> InputError:
    """The error for a path that cannot be written."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return InputError(f"{path} cannot be written ({reason}); make room or choose another folder")
