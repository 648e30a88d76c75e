"""Features for moments: yes/no questions about a text."""

import re
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

WOMEN = re.compile(
    r"\b(she|her|hers|herself|wom[ae]n|girls?|mother|daughter|sister|wife|mrs|ms|lady|ladies|queen)\b", re.IGNORECASE
)


def mentions_a_woman(completions: list[str], **columns: object) -> list[float]:
    """Whether a text speaks of a woman, by a list of words."""
    return [float(bool(WOMEN.search(text))) for text in completions]


@cache
def analyser() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def is_not_negative(completions: list[str], **columns: object) -> list[float]:
    """Whether VADER's compound score of a text is not under -0.05, its own threshold of a negative text."""
    return [float(analyser().polarity_scores(text)["compound"] > -0.05) for text in completions]
