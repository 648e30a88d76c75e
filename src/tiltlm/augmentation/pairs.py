"""Pairs that follow from pairs: what must hold of a preference whoever gave it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator

from tiltlm.augmentation.rows import Row, prompt_of, require_preference, text_of, with_text, without_scores
from tiltlm.errors import InputError

FILLERS = (
    "I hope this helps.",
    "Please let me know if there is anything else.",
    "As always, feel free to ask again.",
    "That is what there is to say about it.",
    "Thank you for asking.",
    "With that, the question is answered.",
)
"""Sentences that say nothing: they make an answer longer and not better."""


@dataclass(frozen=True)
class LabelSwap:
    """The same two texts in the other order, with the label turned round: P(first) becomes 1 - P(first).

    For rows with `first`, `second` and `label`, the probability that the first is better (1, 0, or 1/2 for a tie): what a judge
    or a pairwise model reads, which otherwise may learn the position. Rows with chosen and rejected have no order to learn.
    """

    name: ClassVar[str] = "label-swap"
    preserves: ClassVar[str] = "which text is better; both texts as they are"

    def __call__(self, rows: Sequence[Row], rngs: Sequence[Generator]) -> list[list[dict[str, Any]]]:
        return [[self._swapped(row, number)] for number, row in enumerate(rows, 1)]

    def _swapped(self, row: Row, number: int) -> dict[str, Any]:
        if "first" not in row or "second" not in row or "label" not in row:
            raise InputError(
                f"row {number} has the columns {', '.join(row) or 'none'}, but label-swap needs first, second and label; rows of "
                f"chosen and rejected have no order, leave it out"
            )
        label = _probability(row["label"])
        if label is None:
            raise InputError(
                f"row {number} has label {row['label']!r}; give the probability that first is better, in [0, 1]"
            )
        return {**row, "first": row["second"], "second": row["first"], "label": 1 - label}


def _probability(value: Any) -> float | None:
    """A number in [0, 1], which a CSV has as a text; None for anything else."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    is_one = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1
    return number if is_one else None


@dataclass(frozen=True)
class CrossPromptNegatives:
    """The chosen completion against the chosen one of another prompt, which loses: an answer has to fit its question.

    Other rows with the same prompt, or whose chosen text occurs as an answer to this prompt, are not taken.
    """

    name: ClassVar[str] = "cross-prompt"
    preserves: ClassVar[str] = "prompt and chosen as they are; chosen answers this prompt, rejected another one"

    def __call__(self, rows: Sequence[Row], rngs: Sequence[Generator]) -> list[list[dict[str, Any]]]:
        for number, row in enumerate(rows, 1):
            require_preference(row, number, self.name)
        prompts = [prompt_of(row, number) for number, row in enumerate(rows, 1)]
        texts = [text_of(row["chosen"], number) for number, row in enumerate(rows, 1)]
        own: dict[str, set[str]] = {}
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True), 1):
            own.setdefault(prompt, set()).update(text_of(row[name], number) for name in ("chosen", "rejected"))
        found = []
        for place, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
            order = torch.randperm(len(rows), generator=rng).tolist()
            fits = (i for i in order if prompts[i] != prompts[place] and texts[i] not in own[prompts[place]])
            other = next(fits, None)
            new = [] if other is None else [{**without_scores(row), "rejected": with_text(row["chosen"], texts[other])}]
            found.append(new)
        return found


@dataclass(frozen=True)
class LengthCounterfactual:
    """The chosen completion with filler after it against itself: a tie, so that length by itself earns nothing.

    A tie is two rows, each order once: -log sigma(d) - log sigma(-d) is smallest at d = 0 and nowhere else, so that any trainer
    of Bradley–Terry preferences understands it.

    Attributes:
        sentences: how many sentences of filler.
    """

    sentences: int = 2
    name: ClassVar[str] = "length"
    preserves: ClassVar[str] = "all that chosen says; the filler says nothing, so neither is better"

    def __post_init__(self) -> None:
        if not 1 <= self.sentences <= len(FILLERS):
            raise InputError(f"sentences is {self.sentences}; give 1 to {len(FILLERS)}")

    def __call__(self, rows: Sequence[Row], rngs: Sequence[Generator]) -> list[list[dict[str, Any]]]:
        return [self._tie(row, number, rng) for number, (row, rng) in enumerate(zip(rows, rngs, strict=True), 1)]

    def _tie(self, row: Row, number: int, rng: Generator) -> list[dict[str, Any]]:
        require_preference(row, number, self.name)
        text = text_of(row["chosen"], number)
        filler = [FILLERS[i] for i in torch.randperm(len(FILLERS), generator=rng)[: self.sentences].tolist()]
        return tie(row, " ".join([text.rstrip(), *filler]))


@dataclass(frozen=True)
class FormatCounterfactual:
    """The chosen completion laid out as Markdown against itself: a tie, so that layout by itself earns nothing.

    The layout is drawn: a list of its sentences, paragraphs of one sentence, the first sentence in bold, or a heading above. For
    the form of a tie see `LengthCounterfactual`.
    """

    name: ClassVar[str] = "format"
    preserves: ClassVar[str] = (
        "every word of chosen in its order; only Markdown and line breaks are added, so neither is better"
    )

    def __call__(self, rows: Sequence[Row], rngs: Sequence[Generator]) -> list[list[dict[str, Any]]]:
        return [self._tie(row, number, rng) for number, (row, rng) in enumerate(zip(rows, rngs, strict=True), 1)]

    def _tie(self, row: Row, number: int, rng: Generator) -> list[dict[str, Any]]:
        require_preference(row, number, self.name)
        text = text_of(row["chosen"], number)
        if not text.strip():
            return []
        sentences = re.split(r"(?<=[.!?])\s+", text.strip())
        first, rest = sentences[0], " ".join(sentences[1:])
        layouts = [
            "\n".join(f"- {sentence}" for sentence in sentences),
            "\n\n".join([f"**{first}**", *sentences[1:]]),
            f"# {first}\n\n{rest}".rstrip(),
            *(["\n\n".join(sentences)] if rest else []),
        ]
        return tie(row, layouts[int(torch.randint(len(layouts), (1,), generator=rng))])


def tie(row: Row, other: str) -> list[dict[str, Any]]:
    """Two rows that say that chosen and another text are equally good; none if they are the same text."""
    chosen, same = row["chosen"], with_text(row["chosen"], other)
    if same == chosen:
        return []
    base = without_scores(row)
    return [{**base, "chosen": chosen, "rejected": same}, {**base, "chosen": same, "rejected": chosen}]
