"""`Cached`: a deterministic function is asked once for each completion, by this run and by the ones after it."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sqlite3
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltlm.errors import InputError, TiltWarning
from tiltlm.evidence.running.calls import Layer, Request, TextFunction, attempt
from tiltlm.evidence.running.tally import count

SIZE = 100_000
"""Values kept in memory; a value and its key take about 200 bytes."""
AT_ONCE = 500
"""Keys in one query."""
BUSY = 30.0
"""Seconds to wait for another process that is writing."""


class Cached(Layer):
    """A function whose values are kept: say so only of one that gives the same value for the same completion at any time.

    A value is kept for what the function reads: those of prompt, completion, its ids and the columns that it names (all, if it takes
    `**kwargs`). Only numbers are kept; completions at fault are asked for again. The same completion twice in a batch is
    asked for once.

    Args:
        fn: the function.
        size: most values in memory; the least recently used go first.
        path: an SQLite file that keeps all values, for a resumed run and for the next one. Each batch is one transaction, so that a
            crash loses at most the batch under way. Several processes may share it.
        version: tells this function's values from others' in the file, for example a hash of its code. By default its name and
            source code, where it has them: code that it calls is not seen, so change the version, or the file, with that.

    Raises:
        InputError: if the function has no source to be known by and no version; when called, if the file is no cache or a column
            that the function reads cannot be a key.
    """

    def __init__(
        self, fn: TextFunction, *, size: int = SIZE, path: str | Path | None = None, version: str = ""
    ) -> None:
        if size < 1:
            raise InputError(f"cache size is {size}; give the most values to keep in memory, at least 1")
        super().__init__(fn)
        self.size = size
        self.path = None if path is None else Path(path)
        self._recent: OrderedDict[bytes, float] = OrderedDict()
        self._salt = "" if path is None else version or _source_of(fn)
        self._file = None if self.path is None else _File(self.path)

    def attempt(self, request: Request) -> list[Any]:
        """The kept values, and the function's for the rest."""
        keys = self._keys(request)
        known = self._known(keys)
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
        rows = sorted(first.values())
        count("cached", request.count - len(rows))
        found = dict(zip(rows, attempt(self.fn, request.rows(rows)) if rows else [], strict=True))
        new = {keys[row]: float(answer) for row, answer in found.items() if _is_number(answer)}
        self._keep(known | new)
        if new and self._file is not None:
            self._file.write(new)
        return [known[key] if key in known else found[first[key]] for key in keys]

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        super().close()
        if self._file is not None:
            self._file.close()

    def _keys(self, request: Request) -> list[bytes]:
        names = sorted(request.arguments)
        try:
            rows = zip(*(request.arguments[name] for name in names), strict=True)
            texts = [json.dumps([self._salt, names, row]) for row in rows]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the cache of {self._label()!r} cannot use its arguments {', '.join(names)} as a key ({error}); let it read plain "
                f"values only, or turn the cache off"
            ) from error
        return [hashlib.sha256(text.encode()).digest() for text in texts]

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        known = {key: self._recent[key] for key in keys if key in self._recent}
        rest = [key for key in dict.fromkeys(keys) if key not in known]
        return known | self._file.read(rest) if self._file is not None and rest else known

    def _keep(self, values: Mapping[bytes, float]) -> None:
        for key, value in values.items():
            self._recent[key] = value
            self._recent.move_to_end(key)
        while len(self._recent) > self.size:
            self._recent.popitem(last=False)

    def __repr__(self) -> str:
        return f"Cached({self.fn!r}" + (f", path={str(self.path)!r})" if self.path else ")")


class _File:
    """Values by key in an SQLite file. A file that cannot be written any more costs a warning, not the run."""

    def __init__(self, path: Path) -> None:
        self.path, self._said = path, False
        self._lock = threading.Lock()
        self._end: Any = None

    def _live(self) -> sqlite3.Connection:
        """The connection, opened when first needed."""
        if self._end is not None and self._end.alive:
            return self._connection
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=BUSY, check_same_thread=False)
            with self._connection as transaction:
                transaction.execute(
                    "CREATE TABLE IF NOT EXISTS rewards (key BLOB PRIMARY KEY, value REAL) WITHOUT ROWID"
                )
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"cache {str(self.path)!r} cannot be used ({error}); delete it, or choose another file"
            ) from error
        self._end = weakref.finalize(self, self._connection.close)
        return self._connection

    def read(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        found: dict[bytes, float] = {}
        with self._lock:
            try:
                for first in range(0, len(keys), AT_ONCE):
                    some = keys[first : first + AT_ONCE]
                    marks = ",".join("?" * len(some))
                    found |= dict(self._live().execute(f"SELECT key, value FROM rewards WHERE key IN ({marks})", some))
            except sqlite3.Error as error:
                self._warn(error)
        return found

    def write(self, values: Mapping[bytes, float]) -> None:
        with self._lock:
            try:
                with self._live() as transaction:
                    transaction.executemany("INSERT OR REPLACE INTO rewards VALUES (?, ?)", values.items())
            except sqlite3.Error as error:
                self._warn(error)

    def close(self) -> None:
        if self._end is not None:
            self._end()

    def _warn(self, error: sqlite3.Error) -> None:
        if not self._said:
            warnings.warn(
                f"cache {str(self.path)!r} cannot be used any more ({error}); values are kept in memory only: make room, or "
                f"delete it",
                TiltWarning,
                stacklevel=4,
            )
        self._said = True


def _is_number(answer: Any) -> bool:
    try:
        return not isinstance(answer, str | Exception) and math.isfinite(answer)
    except (TypeError, ValueError, OverflowError):
        return False


def _source_of(fn: TextFunction) -> str:
    """What a plain function is known by: its name and its source."""
    try:
        if not inspect.isfunction(fn) or fn.__closure__ is not None:
            raise TypeError("it is not a plain function, and may hold values of its own")
        return f"{fn.__module__}.{fn.__qualname__}\n{inspect.getsource(fn)}"
    except (OSError, TypeError) as error:
        raise InputError(
            f"the cache file cannot tell {fn!r} from another function ({error}); give version='…' and change it with the function"
        ) from error
