"""`augment`: apply augmentations to rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Generator

from tiltlm.augmentation.pairs import CrossPromptNegatives, FormatCounterfactual, LabelSwap, LengthCounterfactual
from tiltlm.augmentation.rows import Row
from tiltlm.augmentation.words import DeleteWords, ReplaceWords, SwapWords
from tiltlm.errors import InputError
from tiltlm.seeds import generator

MARK = "augmentation"
"""The column that says by what a row was made; None for the rows that were given."""


class Augmentation(Protocol):
    """Makes new rows of rows.

    Attributes:
        name: how the command line and the new rows call it.
        preserves: what is the same in the new row as in the old, in words.
    """

    name: ClassVar[str]
    preserves: ClassVar[str]

    def __call__(self, rows: Sequence[Row], rngs: Sequence[Generator]) -> list[list[dict[str, Any]]]:
        """For each row, with its own generator, the rows made of it; none where nothing can be."""
        ...


AUGMENTATIONS: dict[str, Callable[..., Augmentation]] = {
    kind.name: kind
    for kind in (
        DeleteWords,
        SwapWords,
        ReplaceWords,
        LabelSwap,
        CrossPromptNegatives,
        LengthCounterfactual,
        FormatCounterfactual,
    )
}
"""Those that need nothing but their settings; back-translation needs two models."""


def augment(
    rows: Iterable[Row], augmentations: Sequence[Augmentation], *, n: int = 1, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows, and after them new ones: `n` versions of each row by each augmentation.

    Args:
        rows: with TRL's columns (prompt, chosen, rejected; or prompt, completion; or messages), plain or conversational; a
            `datasets.Dataset` is such an iterable.
        n: versions of a row; ones that came out already are left out, so that there may be fewer.
        seed: what becomes of a row depends on it, on the row's place and on the version, not on what else is asked for (nor,
            for edits of words without a vocabulary, on the other rows).

    Returns:
        Rows with the column `augmentation`: the name of what made them, None for the given ones.

    Raises:
        InputError: naming the row that an augmentation cannot work on.
    """
    given = [dict(row) for row in rows]
    if not given:
        raise InputError("there are no rows: the list is empty; give at least one")
    if n < 1:
        raise InputError(f"n is {n}; make at least one version of a row")
    found = [{**row, MARK: row.get(MARK)} for row in given]
    seen = {_key(row) for row in given}
    for augmentation in augmentations:
        for version in range(n):
            purpose = f"augment/{augmentation.name}/{version}"
            rngs = [generator(seed, purpose, place) for place in range(len(given))]
            for new in (row for rows_of_one in augmentation(given, rngs) for row in rows_of_one):
                if _key(new) not in seen:
                    seen.add(_key(new))
                    found.append({**new, MARK: augmentation.name})
    return found


def make_augmentation(name: str, **settings: Any) -> Augmentation:
    """An augmentation by its name.

    Raises:
        InputError: naming those that there are.
    """
    if name not in AUGMENTATIONS:
        raise InputError(
            f"with is {name!r}; use {', '.join([*AUGMENTATIONS, 'back-translation'])}, with commas between"
        )
    return AUGMENTATIONS[name](**settings)


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in row.items() if name != MARK}, sort_keys=True, default=str)
