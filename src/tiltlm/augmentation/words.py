"""Editing words: deletion, swap and replacement, around what carries the label.

After Wei & Zou 2019 (EDA) and, for replacement by frequency, Xie et al. 2020 (UDA), with a protected set that they do not
have: an edit of "not good" must not make it "good".
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Generator

from tiltlm.augmentation.rows import Row, editable, edited, is_preference
from tiltlm.errors import InputError

NEGATIONS = frozenset(
    re.findall(
        r"\w+",
        """
        no not never none nobody nothing neither nor nowhere cannot without hardly
        barely scarcely rarely seldom few little less least lack lacks lacking fail
        fails failed unless except isnt arent wasnt werent dont doesnt didnt wont
        wouldnt cant couldnt shouldnt hasnt havent hadnt aint
        """,
    )
)
"""Words that turn round what follows; words that end in n't are negations as well."""

NUMBERS = frozenset(
    re.findall(
        r"\w+",
        """
        zero one two three four five six seven eight nine ten
        eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty
        forty fifty sixty seventy eighty ninety hundred thousand million billion half
        quarter third first second once twice double
        """,
    )
)
"""Numbers in words; words with a digit in them are numbers as well."""

CLAUSE_END = re.compile(r"[.,;:!?)\]—]['\"”’]?$")

Editor = Callable[[list[str], Generator], list[str]]
"""The words of a text to as many new ones; "" for a word that is gone."""


@dataclass(frozen=True)
class _Edit(ABC):
    """What the three edits share.

    Attributes:
        rate: share of the words open to an edit that is edited; at least one is.
        protected: further words, in lower case, that stay where they are.
    """

    rate: float = 0.1
    protected: frozenset[str] = field(default_factory=frozenset)
    name: ClassVar[str] = ""
    preserves: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise InputError(f"rate is {self.rate}; it is a share of the words, give a number in (0, 1]")

    def __call__(self, rows: Sequence[Row], rngs: Sequence[Generator]) -> list[list[dict[str, Any]]]:
        """For each row the edited one, or nothing where no word may be edited or both completions became equal.

        Both completions of a preference are edited at the same rate, so that being edited says nothing about the label.
        """
        edit = self._editor(rows)
        return [_edited(row, number, edit, rng) for number, (row, rng) in enumerate(zip(rows, rngs, strict=True), 1)]

    @abstractmethod
    def _editor(self, rows: Sequence[Row]) -> Editor:
        """What edits a text of these rows."""

    def _places(self, count: int, among: Sequence[int], rng: Generator) -> list[int]:
        """`count` words' share of the places, drawn without replacement."""
        n = min(len(among), max(1, round(self.rate * count)))
        return [among[place] for place in torch.randperm(len(among), generator=rng)[:n].tolist()]


@dataclass(frozen=True)
class DeleteWords(_Edit):
    """Leaves words out, at most half of them."""

    name: ClassVar[str] = "delete"
    preserves: ClassVar[str] = "the label; negations with their clause, numbers, and the order of what is left"

    def _editor(self, rows: Sequence[Row]) -> Editor:
        def edit(words: list[str], rng: Generator) -> list[str]:
            free = _open(words, self.protected)
            gone = set(self._places(len(free), free, rng)[: max(1, len(words) // 2)]) if len(words) > 1 else set()
            return ["" if i in gone else word for i, word in enumerate(words)]

        return edit


@dataclass(frozen=True)
class SwapWords(_Edit):
    """Exchanges neighbouring words."""

    name: ClassVar[str] = "swap"
    preserves: ClassVar[str] = "the label; every word, and the place of negations with their clause and of numbers"

    def _editor(self, rows: Sequence[Row]) -> Editor:
        def edit(words: list[str], rng: Generator) -> list[str]:
            free = set(_open(words, self.protected))
            both = [i for i in free if i + 1 in free and words[i] != words[i + 1] and not CLAUSE_END.search(words[i])]
            done: set[int] = set()
            for i in self._places(len(free), sorted(both), rng):
                if not {i, i + 1} & done:
                    words[i], words[i + 1] = words[i + 1], words[i]
                    done |= {i, i + 1}
            return words

        return edit


@dataclass(frozen=True)
class ReplaceWords(_Edit):
    """Puts other words in the place of words.

    Attributes:
        lexicon: from a word in lower case to what may stand for it, synonyms for instance; other words are left alone. Without
            it, any open word is replaced by one drawn from the texts of all rows by frequency, which is noise and not paraphrase.
    """

    lexicon: Mapping[str, Sequence[str]] | None = None
    name: ClassVar[str] = "replace"
    preserves: ClassVar[str] = (
        "the label and the number of words; negations with their clause and numbers, none are put in"
    )

    def _editor(self, rows: Sequence[Row]) -> Editor:
        if self.lexicon is not None:
            return self._by_lexicon(self.lexicon)
        texts = (text for number, row in enumerate(rows, 1) for text in editable(row, number))
        counts = Counter(_bare(word) for text in texts for word in text.split())
        known = sorted(word for word in counts if word and not _carries(word, self.protected))
        weight = torch.tensor([counts[word] for word in known], dtype=torch.float64)

        def edit(words: list[str], rng: Generator) -> list[str]:
            free = _open(words, self.protected) if len(known) > 1 else []
            for i in self._places(len(free), free, rng):
                words[i] = _dressed(known[int(torch.multinomial(weight, 1, generator=rng))], words[i])
            return words

        return edit

    def _by_lexicon(self, lexicon: Mapping[str, Sequence[str]]) -> Editor:
        def edit(words: list[str], rng: Generator) -> list[str]:
            free = [i for i in _open(words, self.protected) if lexicon.get(_bare(words[i]))]
            for i in self._places(len(free), free, rng):
                others = lexicon[_bare(words[i])]
                words[i] = _dressed(others[int(torch.randint(len(others), (1,), generator=rng))], words[i])
            return words

        return edit


def frozen_words(text: str, protected: frozenset[str] = frozenset()) -> list[str]:
    """The words of a text that no edit touches, in their order: see `_open`."""
    words, _ = _split(text)
    free = set(_open(words, protected))
    return [word for i, word in enumerate(words) if i not in free]


def _edited(row: Row, number: int, edit: Editor, rng: Generator) -> list[dict[str, Any]]:
    before = editable(row, number)
    after = [_joined(edit(words, rng), gaps) for words, gaps in map(_split, before)]
    if after == before or (is_preference(row) and after[0] == after[1]):
        return []
    return [edited(row, after)]


def _split(text: str) -> tuple[list[str], list[str]]:
    """The words with their punctuation, and the gaps before, between and after them."""
    return re.findall(r"\S+", text), re.split(r"\S+", text)


def _joined(words: Sequence[str], gaps: Sequence[str]) -> str:
    """The inverse of `_split`; the gap after a word that is gone goes with it."""
    kept = [word + gap if word else "" for word, gap in zip(words, gaps[1:], strict=True)]
    text = gaps[0] + "".join(kept)
    return text if not words or words[-1] or gaps[-1] else text.rstrip()


def _open(words: Sequence[str], protected: frozenset[str]) -> list[int]:
    """The places that an edit may touch.

    Frozen are negations and all that follows them up to the end of the clause, which is their scope (Das & Chen 2001), numbers
    and the word they count, and the words that the user protects.
    """
    free, negated, counted = [], False, False
    for i, word in enumerate(words):
        bare = _bare(word)
        negation, number = _negates(bare), _is_number(bare)
        negated = negated or negation
        if bare and not negated and not number and not counted and bare not in protected:
            free.append(i)
        ends = CLAUSE_END.search(word) is not None
        negated, counted = negated and not ends, number and not ends
    return free


def _bare(word: str) -> str:
    return re.sub(r"^\W+|\W+$", "", word.lower().replace("’", "'"))


def _negates(bare: str) -> bool:
    return bare in NEGATIONS or bare.endswith("n't") or bare.replace("'", "") in NEGATIONS


def _is_number(bare: str) -> bool:
    return any(letter.isdigit() for letter in bare) or any(part in NUMBERS for part in bare.split("-"))


def _carries(bare: str, protected: frozenset[str]) -> bool:
    return _negates(bare) or _is_number(bare) or bare in protected


def _dressed(word: str, like: str) -> str:
    """A word with the punctuation and the capital of another."""
    start, end = re.match(r"^\W*", like), re.search(r"\W*$", like)
    core = word.capitalize() if like.strip("\"'([“‘*_")[:1].isupper() else word
    return f"{start.group() if start else ''}{core}{end.group() if end else ''}"
