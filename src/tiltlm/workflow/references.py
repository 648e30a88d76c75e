"""What a reward's or a metric's parts read of the data, looked at before anything is drawn: columns, references, their language."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tiltlm.errors import InputError, TiltWarning
from tiltlm.evidence.composition import Formula
from tiltlm.evidence.function import TextFunction
from tiltlm.evidence.parts import Column, Part, named_parts
from tiltlm.rewards.lexicons import Language
from tiltlm.rewards.references import AgainstReference
from tiltlm.workflow.inputs import reward_of
from tiltlm.workflow.recipe import Recipe

GIVEN = ("prompts", "completions", "completion_ids")
"""What parts read that is no column."""
WORDS, JUDGED = 5, 200
"""Words of a text whose language can be told, and most texts that are looked at."""
SOME, MOST = 0.2, 0.5
"""Shares of references in another language that are worth a warning, and that cannot be meant."""


def parts_of(recipe: Recipe) -> list[TextFunction]:
    """The named parts of a recipe's reward; what a function reads, only the function knows."""
    items = [] if recipe.reward is None or isinstance(recipe.reward, str) else recipe.reward
    named = [item for item in items if "part" in item]
    return [reward_of(named, recipe.model)[0]] if named else []


def require_references(functions: Sequence[TextFunction], rows: Sequence[Any], source: str) -> None:
    """Look at the columns that named parts read.

    Args:
        source: the rows', for messages.

    Raises:
        InputError: naming a column that is not there, the first row without a reference, or without a number where one is added,
            or references that are mostly of another language than the reward asks for.

    Warns:
        TiltWarning: where some of them are.
    """
    parts = [part for function in functions for part in named_parts(function)]
    for part in parts:
        for column in part.reads:
            if column not in GIVEN:
                _require_column(part, column, rows, source)
    for part in (part for function in functions if isinstance(function, Formula) for part in function.parts()):
        if isinstance(part, Column):
            _require_numbers(part, rows, source)
    columns = dict.fromkeys(part.column for part in parts if isinstance(part, AgainstReference))
    for part in parts:
        if isinstance(part, Language):
            for column in columns:
                _require_language(part, column, rows, source)


def _require_column(part: Part, column: str, rows: Sequence[Any], source: str) -> None:
    for number, row in enumerate(rows, 1):
        values = row if isinstance(row, Mapping) else {}
        if column not in values:
            there = f"the columns {', '.join(map(str, values))}" if values else "no columns"
            raise InputError(
                f"part {part.label!r} reads {column!r}, but {source} has {there}; name the one that it should read"
            )
        value = values[column]
        items = list(value) if isinstance(value, list | tuple) else [value]
        if any(item is None for item in items) or (isinstance(part, AgainstReference) and not any(map(_says, items))):
            raise InputError(f"row {number} of {source} has no {column} ({value!r}); give one, or leave the row out")


def _require_numbers(part: Column, rows: Sequence[Any], source: str) -> None:
    _require_column(part, part.column, rows, source)
    for number, row in enumerate(rows, 1):
        try:
            part.score([""], **{part.column: [row[part.column]]})
        except InputError as error:
            raise InputError(f"row {number} of {source}: {error}") from error


def _says(item: Any) -> bool:
    return bool(str(item).strip())


def _require_language(part: Language, column: str, rows: Sequence[Any], source: str) -> None:
    """References of some words whose language is not the one asked for."""
    texts = {}
    for number, row in enumerate(rows, 1):
        value = row[column]
        text = value[0] if isinstance(value, list | tuple) else value
        if isinstance(text, str) and len(text.split()) >= WORDS:
            texts[number] = text
        if len(texts) == JUDGED:
            break
    other = [n for n, value in zip(texts, part.score(list(texts.values())), strict=True) if value < 1 / 2]
    if len(other) <= SOME * len(texts):
        return
    says = (
        f"{len(other)} of {len(texts)} texts in {column!r} of {source} do not look like {part.language!r}, which the part "
        f"{part.label!r} asks for (row {other[0]}: {texts[other[0]]!r:.60}); take rows of one language, or name theirs"
    )
    if len(other) > MOST * len(texts):
        raise InputError(says)
    warnings.warn(says, TiltWarning, stacklevel=3)
