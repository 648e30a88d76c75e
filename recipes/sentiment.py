"""The demo's reward: how positive a text sounds, by VADER's lexicon (Hutto & Gilbert 2014)."""

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def analyser() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(completions: list[str], **columns: object) -> list[float]:
    """VADER's compound score of each completion, in [-1, 1]."""
    return [analyser().polarity_scores(text)["compound"] for text in completions]
