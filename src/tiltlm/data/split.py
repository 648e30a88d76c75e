"""Splits by content: what says the same goes into the same split, and `leaks` counts what does not."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltlm.data.spec import SPLITS, Progress, Row, no_progress

SHINGLE = 3
"""Words in a shingle: near-duplicates are told by the runs of words that they share."""
USUAL = ("prompt", "reference", "references", "image")


def content_key(value: Any) -> str:
    """A value without what does not change its content: case, punctuation, white space and Unicode's ways of writing the same.

    Bytes are known by their hash. A text of punctuation alone is kept as it is.
    """
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    folded = unicodedata.normalize("NFKC", str(value)).casefold()
    words = "".join(character if character.isalnum() else " " for character in folded).split()
    return " ".join(words) or folded.strip()


def split_of(key: str, shares: Sequence[int] = (80, 10, 10)) -> str:
    """The split of a key of content: by its hash, so that it is the same whatever else is in the set."""
    place = int.from_bytes(hashlib.sha256(f"split/{key}".encode()).digest()[:8], "big") * 100 / 2**64
    edge = 0
    for name, share in zip(SPLITS, shares, strict=True):
        edge += share
        if place < edge:
            return name
    return SPLITS[-1]


def linked(
    columns: Sequence[str], near: Mapping[str, float] | None = None
) -> Callable[[Sequence[Row], Progress], list[str]]:
    """Groups of rows that share the content of any of these columns, directly or through other rows.

    Args:
        columns: equal content in one of them puts two rows into one group.
        near: for some columns, the Jaccard similarity of word shingles from which texts count as near-duplicates.
    """

    def groups(rows: Sequence[Row], progress: Progress = no_progress) -> list[str]:
        union = _Union(len(rows))
        for column in columns:
            first: dict[str, int] = {}
            for number, row in enumerate(rows):
                for item in _items(row[column]):
                    union.join(number, first.setdefault(content_key(item), number))
        for column, least in (near or {}).items():
            for one, other in near_duplicates([str(row[column]) for row in rows], least, progress):
                union.join(one, other)
        return union.keys([content_key(next(iter(_items(row[columns[0]])), "")) for row in rows])

    return groups


def near_duplicates(texts: Sequence[str], least: float, progress: Progress = no_progress) -> Iterator[tuple[int, int]]:
    """Pairs of texts whose sets of word shingles have a Jaccard similarity of at least `least`.

    Exact. Two such sets share one of their rarest ⌊(1 − least)·n⌋ + 1 shingles, so that only texts with one of those in common
    are compared: prefix filtering (Bayardo, Ma and Srikant 2007, All-Pairs; Xiao et al. 2008, PPJoin).
    """
    if not 0 < least <= 1:
        raise ValueError(f"least is {least}; a Jaccard similarity is in (0, 1]")
    sets = [_shingles(text) for text in texts]
    count = Counter(shingle for shingles in sets for shingle in shingles)
    index: dict[str, list[int]] = defaultdict(list)
    done = progress("near-duplicates", len(texts))
    for number, shingles in enumerate(sets):
        rare = sorted(shingles, key=lambda shingle: (count[shingle], shingle))
        prefix = rare[: len(rare) - math.ceil(least * len(rare) - 1e-9) + 1]
        candidates = {other for shingle in prefix for other in index[shingle]}
        for other in sorted(candidates):
            shorter, longer = sorted((len(shingles), len(sets[other])))
            if shorter >= least * longer - 1e-9:
                both = len(shingles & sets[other])
                if both >= least * (shorter + longer - both) - 1e-9:
                    yield other, number
        for shingle in prefix:
            index[shingle].append(number)
        done(1)


@dataclass(frozen=True)
class Leaks:
    """Contents that are in more than one split.

    Attributes:
        exact: by column, how many values are in several splits as they stand.
        normalised: the same, by `content_key`.
    """

    exact: Mapping[str, int]
    normalised: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.normalised.values()) + sum(self.exact.values())


def leaks(dataset: Mapping[Any, Any], columns: Sequence[str] | None = None) -> Leaks:
    """Count what is in more than one split.

    Args:
        dataset: splits by name, each with columns (a `datasets.DatasetDict`, or dicts of lists).
        columns: to look at; by default those of prompt, reference, references and image that are there and are not the same in
            every row. Lists count by their items.
    """
    parts = list(dataset.values())
    names = parts[0].keys() if isinstance(parts[0], Mapping) else parts[0].column_names
    chosen = columns if columns is not None else [name for name in USUAL if name in names]
    exact, normalised = {}, {}
    for column in chosen:
        values = [{_hashable(item) for value in part[column] for item in _items(value)} for part in parts]
        if columns is None and len(set().union(*values)) == 1:
            continue
        exact[column] = _shared(values)
        normalised[column] = _shared([{content_key(item) for item in items} for items in values])
    return Leaks(exact, normalised)


def _shared(sets: Sequence[set[Any]]) -> int:
    times = Counter(item for items in sets for item in items)
    return sum(count > 1 for count in times.values())


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | bytes | int | float | None) else str(value)


def _shingles(text: str) -> frozenset[str]:
    words = content_key(text).split()
    return frozenset(" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1)))


class _Union:
    """Disjoint sets of row numbers."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        self.parent[self.find(one)] = self.find(other)

    def keys(self, contents: Sequence[str]) -> list[str]:
        """For each row the smallest content in its set: it does not depend on the order of the rows."""
        smallest: dict[int, str] = {}
        for number, content in enumerate(contents):
            root = self.find(number)
            smallest[root] = min(smallest.get(root, content), content)
        return [smallest[self.find(number)] for number in range(len(contents))]
