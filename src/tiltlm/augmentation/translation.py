"""Back-translation: another wording by way of another language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator

from tiltlm.augmentation.rows import Row, editable, edited, is_preference
from tiltlm.errors import InputError

Translate = Callable[[Sequence[str], Generator], Sequence[str]]
"""Texts to as many translations; `tiltlm.lm.translate.Translator` is one."""


@dataclass(frozen=True)
class BackTranslation:
    """There and back (Sennrich et al. 2016; as augmentation, Xie et al. 2020).

    It keeps the label as far as the two models keep the meaning; nothing here can vouch for them. What comes back empty, or as
    it was, is left out. Both completions of a preference are translated, so that the style of a translation says nothing about
    the label.

    Attributes:
        there, back: translate into the other language and from it.
    """

    there: Translate
    back: Translate
    name: ClassVar[str] = "back-translation"
    preserves: ClassVar[str] = "the meaning, as far as both models do; which completion is chosen"

    def __call__(self, rows: Sequence[Row], rngs: Sequence[Generator]) -> list[list[dict[str, Any]]]:
        before = [editable(row, number) for number, row in enumerate(rows, 1)]
        flat = [text for texts in before for text in texts]
        if not flat:
            return []
        flat = _translated(self.back, _translated(self.there, flat, rngs[0], "there"), rngs[0], "back")
        found, rest = [], iter(flat)
        for row, texts in zip(rows, before, strict=True):
            after = [next(rest).strip() for _ in texts]
            same = after == [text.strip() for text in texts] or (is_preference(row) and after[0] == after[1])
            found.append([] if same or not all(after) else [edited(row, after)])
        return found


def _translated(translate: Translate, texts: Sequence[str], rng: Generator, which: str) -> list[str]:
    out = list(translate(texts, rng))
    if len(out) != len(texts) or not all(isinstance(text, str) for text in out):
        raise InputError(
            f"the translator {which!r} returned {len(out)} items for {len(texts)} texts; return one text for each"
        )
    return out
