"""Task metrics for short answers: exact match, token F1, labels, numbers. As rewards, and as evaluation over a corpus."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.rewards.optional import require
from tiltlm.rewards.references import AgainstReference

NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and further white space: SQuAD's normalisation (Rajpurkar et al. 2016)."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def token_overlap(text: str, reference: str) -> tuple[float, float, float]:
    """Precision, recall and F1 over words, as SQuAD counts them; all 1 if both are empty, all 0 if one is."""
    words, wanted = normalised(text).split(), normalised(reference).split()
    if not words or not wanted:
        same = float(words == wanted)
        return same, same, same
    shared = sum((Counter(words) & Counter(wanted)).values())
    return shared / len(words), shared / len(wanted), 2 * shared / (len(words) + len(wanted))


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, SQuAD's F1; 1 if both are empty, 0 if one is."""
    return token_overlap(text, reference)[2]


@dataclass(frozen=True)
class ExactMatch(AgainstReference):
    """1 where the completion is the reference, after SQuAD's normalisation, else 0. Over a corpus, its mean is the accuracy."""

    extent: ClassVar[Bounds] = (0.0, 1.0)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return self.best(texts, columns, lambda text, reference: float(normalised(text) == normalised(reference)))


@dataclass(frozen=True)
class TokenF1(AgainstReference):
    """The words that completion and reference share: SQuAD's F1, in [0, 1] (Rajpurkar et al. 2016)."""

    extent: ClassVar[Bounds] = (0.0, 1.0)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return self.best(texts, columns, token_f1)


@dataclass(frozen=True)
class TokenPrecision(AgainstReference):
    """The share of the completion's words that the reference has, in [0, 1]. Saying less never hurts it: no reward on its own."""

    extent: ClassVar[Bounds] = (0.0, 1.0)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return self.best(texts, columns, lambda text, reference: token_overlap(text, reference)[0])


@dataclass(frozen=True)
class TokenRecall(AgainstReference):
    """The share of the reference's words that the completion has, in [0, 1]. Saying more never hurts it: no reward on its own."""

    extent: ClassVar[Bounds] = (0.0, 1.0)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return self.best(texts, columns, lambda text, reference: token_overlap(text, reference)[1])


@dataclass(frozen=True)
class LabelMatch(AgainstReference):
    """1 where the completion gives the right label, else 0; over a corpus accuracy, macro precision, recall and F1.

    Attributes:
        column: holds the right label.
        labels: the labels there are. The first of them in the completion, as a word of its own in any case, is its answer; one
            with none of them is wrong. Without labels the whole completion, normalised, is.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    column: str = "label"
    labels: tuple[str, ...] = ()

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        pairs = zip(texts, self.references(columns), strict=True)
        return [float(self.predicted(text) in {normalised(label) for label in wanted}) for text, wanted in pairs]

    def predicted(self, text: str) -> str:
        """The label that a completion gives, normalised; "" for none."""
        if not self.labels:
            return normalised(text)
        found = [(re.search(rf"\b{re.escape(label)}\b", text, re.IGNORECASE), label) for label in self.labels]
        places = [(match.start(), -len(label), label) for match, label in found if match]
        return normalised(min(places)[2]) if places else ""

    def corpus(self, texts: Sequence[str], **columns: Sequence[Any]) -> dict[str, float]:
        """Accuracy, and precision, recall and F1 of each label averaged without weights; no answer is a label of none."""
        metrics = require("sklearn.metrics", "scikit-learn", self.label)
        truth = [normalised(wanted[0]) for wanted in self.references(columns)]
        predicted = [self.predicted(text) for text in texts]
        labels = sorted({normalised(label) for label in self.labels} or set(truth))
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            truth, predicted, labels=labels, average="macro", zero_division=0.0
        )
        right = sum(a == b for a, b in zip(truth, predicted, strict=True))
        return {"accuracy": right / len(truth), "precision": precision, "recall": recall, "f1": f1}


@dataclass(frozen=True)
class NumericEquality(AgainstReference):
    """1 where a number in the completion equals the reference's, else 0.

    Commas between thousands are read, units and signs of money are not looked at: "$1,250.00 in all" is 1250. The reference's
    number is its last, so that a worked solution ("… #### 42") may stand there.

    Attributes:
        which: the completion's last number (after the reasoning), its first, or any.
        relative, absolute: tolerances, as math.isclose has them.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    which: str = "last"
    relative: float = 1e-9
    absolute: float = 0.0

    def __post_init__(self) -> None:
        if self.which not in ("last", "first", "any"):
            raise InputError(f"which is {self.which!r}; choose last, first, any")
        if not (self.relative >= 0 and self.absolute >= 0):
            raise InputError(f"tolerances are {self.relative} and {self.absolute}; they must not be negative")

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return self.best(texts, columns, self._equal)

    def _equal(self, text: str, reference: str) -> float:
        wanted = numbers(reference)
        if not wanted:
            raise InputError(
                f"column {self.column!r} of reward {self.label!r} holds {reference!r:.60}, without a number"
            )
        found = numbers(text)
        chosen = found if self.which == "any" else found[-1:] if self.which == "last" else found[:1]
        return float(any(math.isclose(n, wanted[-1], rel_tol=self.relative, abs_tol=self.absolute) for n in chosen))


def numbers(text: str) -> list[float]:
    """The numbers in a text, in order. A hyphen after a letter or digit joins and does not negate."""
    found = []
    for match in NUMBER.finditer(text):
        written = match[0].replace(",", "")
        joined = written[0] in "+-" and match.start() and text[match.start() - 1].isalnum()
        found.append(float(written[1:] if joined else written))
    return found
