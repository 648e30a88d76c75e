"""When to answer: the vote of several draws as a confidence, and the risk of answering more and more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiltlm.errors import InputError
from tiltlm.evaluation.systems import Completions, System
from tiltlm.rewards.abstention import PHRASES, SILENCE, abstains
from tiltlm.rewards.answers import normalised


@dataclass(frozen=True)
class Vote:
    """What most of a prompt's draws answer.

    Attributes:
        answer: as the first of them writes it; `SILENCE` where none answers.
        share: of all draws, silent ones included: the confidence (self-consistency, Wang et al. 2023).
    """

    answer: str
    share: float


def vote(texts: Sequence[str], phrases: Sequence[str] = PHRASES) -> Vote:
    """The answer of most draws, told apart after SQuAD's normalisation; of equals the one drawn first."""
    answers = [text for text in texts if not abstains(text, phrases)]
    if not answers:
        return Vote(SILENCE, 0.0)
    (winner, count), *_ = Counter(map(normalised, answers)).most_common(1)  # in the order of first sight
    return Vote(next(text for text in answers if normalised(text) == winner), count / len(texts))


def voted(name: str, completions: Completions, least: float) -> System:
    """Each prompt's vote, if its share is at least `least`; else `SILENCE`.

    Raises:
        InputError: for a share outside of (0, 1].
    """
    if not 0 < least <= 1:
        raise InputError(f"least is {least}; it is a share of the draws, in (0, 1]")
    found = map(vote, completions)
    return System.of(name, [one.answer if one.share >= least else SILENCE for one in found])


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve of answers with a confidence each (El-Yaniv & Wiener 2010): answer those of at least a threshold.

    Attributes:
        points: (threshold, coverage, risk) from the highest threshold to the lowest; risk is the share of the answers given
            that is wrong. Answers of equal confidence come together.
        area: the mean over questions of the risk at which each is answered, AURC (Geifman et al. 2019).
    """

    name: str
    points: tuple[tuple[float, float, float], ...]
    area: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        named = [dict(zip(("confidence", "coverage", "risk"), point, strict=True)) for point in self.points]
        return {"name": self.name, "points": named, "area": self.area}


def risk_coverage(name: str, confidence: Sequence[float], right: Sequence[bool]) -> RiskCoverage:
    """The curve of answers.

    Args:
        confidence: of each answer.
        right: whether each is.

    Raises:
        InputError: if there are none, or not as many of both.
    """
    if not confidence or len(confidence) != len(right):
        raise InputError(f"there are {len(confidence)} confidences and {len(right)} answers; give one for each")
    points = []
    for threshold in sorted(set(confidence), reverse=True):
        given = [ok for sure, ok in zip(confidence, right, strict=True) if sure >= threshold]
        points.append((threshold, len(given) / len(right), 1 - sum(given) / len(given)))
    risk = {threshold: value for threshold, _, value in points}
    return RiskCoverage(name, tuple(points), sum(risk[sure] for sure in confidence) / len(confidence))
