"""What a data set is: where its files come from, how rows are made of them, and which columns may not meet across splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
Progress = Callable[[str, int], Callable[[int], None]]
"""(what, how many) -> a function that moves its bar on."""
Grouping = Callable[[Sequence[Row], Progress], Sequence[str]]
"""rows -> a key of content for each; rows with the same key go into the same split."""
SPLITS = ("train", "validation", "test")


def no_progress(what: str, count: int) -> Callable[[int], None]:
    """Shows nothing."""
    return lambda done: None


class Source(Protocol):
    """A package that files come from."""

    @property
    def name(self) -> str:
        """Package, with the version where it is pinned."""
        ...

    @property
    def how(self) -> str:
        """The command that installs it."""
        ...

    def find(self) -> Path | None:
        """Where its files are; None if they are not here."""
        ...

    def fetch(self) -> Path:
        """Where its files are, fetched first if they may be fetched.

        Raises:
            InputError: saying what to install.
        """
        ...

    def version(self) -> str:
        """What the files are known by, for the card and the cache."""
        ...


@dataclass
class Tally:
    """Rows that were dropped, by reason."""

    dropped: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count rows that are left out."""
        self.dropped[reason] += count


class MakeRows(Protocol):
    """Reads a set's files."""

    def __call__(self, files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
        """The rows, of the files by package; what is left out is counted."""
        ...


@dataclass(frozen=True)
class DataSet:
    """A data set that `tiltlm data` prepares. Each is a file in `tiltlm.data.sets` that has one as `SET`.

    Attributes:
        task: the application: question answering, translation, …
        what: a sentence on a row.
        licence: of the texts or pictures.
        sources: packages that the files come from.
        columns: what each column holds; `prompt` is conditioned on, `reference` or `references` compared with.
        content: columns whose values, normalised, must not be in two splits.
        split: a sentence on how rows are grouped before the split.
        rows: makes the rows.
        groups: the key of content of each row.
        shares: of train, validation and test, in percent.
    """

    task: str
    what: str
    licence: str
    sources: Sequence[Source]
    columns: Mapping[str, str]
    content: tuple[str, ...]
    split: str
    rows: MakeRows
    groups: Grouping
    shares: tuple[int, int, int] = (80, 10, 10)
