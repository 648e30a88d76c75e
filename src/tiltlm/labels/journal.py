"""An append-only file of JSON lines that a crash cannot spoil."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiltlm.errors import InputError


class Journal:
    """Events in the order in which they happened.

    Each event is one line, on the disk before `append` returns. A process that was killed while it wrote leaves at most a
    torn last line; that event did not happen, and the next append writes over it.

    Args:
        file: need not exist yet.

    Raises:
        InputError: if it cannot be read, or a line before the last is no JSON object.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.events: list[dict[str, Any]] = []
        self._size = 0
        self._read()

    def append(self, event: Mapping[str, Any]) -> None:
        """Add an event.

        Raises:
            InputError: if the file cannot be written, or another process has added to it since it was read.
        """
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
        try:
            with os.fdopen(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as handle:
                _lock(handle, self.file)
                handle.seek(self._size)
                if handle.read().count(b"\n"):
                    raise InputError(f"{self.file} was added to by another process; open the session again and go on")
                handle.seek(self._size)
                handle.truncate()
                handle.write(line)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise InputError(
                f"{self.file} cannot be written ({error.strerror}); make room or mend its rights"
            ) from error
        if not self._size:
            _keep_name(self.file)
        self._size += len(line)
        self.events.append(json.loads(line))

    def _read(self) -> None:
        try:
            content = self.file.read_bytes() if self.file.exists() else b""
        except OSError as error:
            raise InputError(f"{self.file} cannot be read ({error.strerror}); mend its rights") from error
        lines = content.split(b"\n")[:-1]  # what follows the last line's end is torn
        for number, line in enumerate(lines, 1):
            event = _event(line)
            if event is None:
                raise InputError(f"{self.file} line {number} is no event ({line[:60]!r}); take that line out")
            self.events.append(event)
            self._size += len(line) + 1


def _keep_name(file: Path) -> None:
    """Have the folder remember a new file too, where folders can be flushed."""
    try:
        folder = os.open(file.parent, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _lock(handle: Any, file: Path) -> None:
    """Keep other processes from writing until the handle is closed, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{file} is being written by another process; wait for it, then go on") from error
