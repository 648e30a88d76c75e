"""What is measured of all completions of a prompt together: how many tries it takes, and how different they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltlm.errors import InputError
from tiltlm.evidence.composition import as_formula
from tiltlm.rewards.optional import require


@dataclass(frozen=True)
class PassAtK:
    """The chance that one of k completions is right: 1 - C(n - c, k) / C(n, k), of n drawn and c right ones.

    Unbiased for every n >= k (Chen et al. 2021, eq. 1), which 1 - (1 - c/n)^k is not. Not known (NaN) where fewer than k were drawn.

    Attributes:
        k: tries.
        judge: a part or reward function; a completion is right if it is worth at least `right`.
    """

    k: int
    judge: Any
    right: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k is {self.k}; pass@k needs at least one try")

    @property
    def label(self) -> str:
        return f"pass@{self.k}"

    def of_prompt(self, texts: Sequence[str], row: Mapping[str, Any]) -> float:
        """The value of one prompt's completions; `row` holds its columns."""
        columns = {name: [value] * len(texts) for name, value in row.items()}
        values = as_formula(self.judge)(completions=list(texts), **columns)
        return pass_at_k(len(texts), sum(value >= self.right for value in values), self.k)


def pass_at_k(drawn: int, right: int, k: int) -> float:
    """Chen et al. (2021), eq. 1; NaN where fewer than k were drawn."""
    if k > drawn:
        return math.nan
    return 1.0 - math.comb(drawn - right, k) / math.comb(drawn, k)


@dataclass(frozen=True)
class DistinctN:
    """Different n-grams of words over all n-grams of a prompt's completions (Li et al. 2016); of a single one there is none.

    Fewer texts raise it and longer ones lower it, so that only systems with as many completions a prompt compare.
    """

    n: int = 2

    @property
    def label(self) -> str:
        return f"distinct-{self.n}"

    def of_prompt(self, texts: Sequence[str], row: Mapping[str, Any]) -> float:
        """The value of one prompt's completions."""
        if len(texts) < 2:
            return math.nan
        grams = [
            tuple(words[i : i + self.n]) for words in map(str.split, texts) for i in range(len(words) - self.n + 1)
        ]
        return len(set(grams)) / len(grams) if grams else math.nan


@dataclass(frozen=True)
class SelfBLEU:
    """The mean BLEU of each completion against the others of its prompt (Zhu et al. 2018): 1 where all are the same text."""

    @property
    def label(self) -> str:
        return "self-bleu"

    def of_prompt(self, texts: Sequence[str], row: Mapping[str, Any]) -> float:
        """The value of one prompt's completions; of a single one there is none."""
        if len(texts) < 2:
            return math.nan
        bleu = require("sacrebleu", "sacrebleu", self.label).BLEU(effective_order=True)
        scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
        return min(1.0, sum(scores) / len(scores) / 100)


@dataclass(frozen=True)
class Unique:
    """The share of a prompt's completions that are different texts; of a single one there is none."""

    @property
    def label(self) -> str:
        return "unique"

    def of_prompt(self, texts: Sequence[str], row: Mapping[str, Any]) -> float:
        """The value of one prompt's completions."""
        return len(set(texts)) / len(texts) if len(texts) > 1 else math.nan
