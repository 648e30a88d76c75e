"""Answers that may be withheld: a reward under which silence is right below a stated confidence, and what is measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part
from tiltlm.rewards.answers import normalised
from tiltlm.rewards.references import AgainstReference

SILENCE = "I don't know"
PHRASES = (SILENCE, "I do not know", "I'm not sure", "I am not sure", "unknown")
"""How a completion says that it gives no answer."""


def abstains(text: str, phrases: Sequence[str] = PHRASES) -> bool:
    """Whether a completion begins with one of the phrases (case, punctuation and articles aside), or has no letter and no digit."""
    said = normalised(text)
    return not any(map(str.isalnum, text)) or any(f"{said} ".startswith(f"{normalised(phrase)} ") for phrase in phrases)


@dataclass(frozen=True)
class _Withholding(AgainstReference):
    """An answer that is right (SQuAD's exact match), wrong, or withheld.

    Attributes:
        column: the right answer, or all of them.
        phrases: the beginnings of completions that withhold one.
    """

    phrases: tuple[str, ...] = PHRASES

    def right(self, texts: Sequence[str], columns: dict[str, Sequence[Any]]) -> list[bool]:
        """Whether each completion is one of its references."""
        same = self.best(texts, columns, lambda text, wanted: float(normalised(text) == normalised(wanted)))
        return [value == 1 for value in same]


@dataclass(frozen=True)
class CalibratedAnswer(_Withholding):
    """1 for the right answer, 0 for none, -t / (1 - t) for a wrong one (Chow 1970; with these points Kalai et al. 2025, section 4.2).

    Whoever is right with probability p expects p - (1 - p) t / (1 - t) of an answer, which is more than silence's 0 exactly where
    p > t. At p* the odds of the right answer against silence are the prior's times exp(1 / beta), and of a wrong one the
    prior's times exp(-t / ((1 - t) beta)). Where the policy cannot know which answer is right, the evidence is the mean over
    what may be, and the odds of an answer held with p are the prior's times exp((p - t) / ((1 - t) beta)).

    Attributes:
        confidence: t, in (0, 1): from which an answer should be given.
        phrases: the beginnings of completions that withhold it.
    """

    confidence: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; it is a probability between 0 and 1, for example 0.5")

    @property
    def bounds(self) -> Bounds:
        return -self.confidence / (1 - self.confidence), 1.0

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        right = self.right(texts, columns)
        wrong = self.bounds[0]
        silent = (abstains(text, self.phrases) for text in texts)
        return [1.0 if yes else 0.0 if none else wrong for yes, none in zip(right, silent, strict=True)]


@dataclass(frozen=True)
class Answered(Part):
    """1 where the completion gives an answer, 0 where it withholds it. Its mean is the coverage.

    Attributes:
        phrases: the beginnings of completions that withhold it.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    phrases: tuple[str, ...] = PHRASES

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [float(not abstains(text, self.phrases)) for text in texts]


@dataclass(frozen=True)
class SelectiveAccuracy(_Withholding):
    """1 for the right answer, else 0; over a corpus, the share of the given answers that is right (El-Yaniv & Wiener 2010).

    One minus it is the selective risk. It says nothing without the coverage beside it; where no answer is given it is NaN. As a
    reward it would never make silence worth while: take `CalibratedAnswer`.

    Attributes:
        phrases: the beginnings of completions that withhold it.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [float(yes) for yes in self.right(texts, columns)]

    def corpus(self, texts: Sequence[str], **columns: Sequence[Any]) -> dict[str, float]:
        """The share of the answers given that is right."""
        counts, meaning = self.summable(texts, **columns)
        return meaning(counts.sum(0))

    def summable(
        self, texts: Sequence[str], **columns: Sequence[Any]
    ) -> tuple[Float[Tensor, "B S"], Callable[[Float[Tensor, " S"]], dict[str, float]]]:
        """Of each text whether it is right and whether it answers, and the corpus's figure from their sums."""
        rows = [
            [float(yes), float(yes or not abstains(text, self.phrases))]
            for yes, text in zip(self.right(texts, columns), texts, strict=True)
        ]
        counts = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)
        return counts, lambda sums: {self.label: float(sums[0] / sums[1]) if sums[1] > 0 else math.nan}
