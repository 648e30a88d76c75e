"""Rewards from small models of words: language, profanity, sentiment. They cost microseconds to milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part
from tiltlm.rewards.optional import require


@dataclass(frozen=True)
class Language(Part):
    """The probability that the completion is in a language, by py3langid's naive Bayes over some 140 languages.

    It is sure of a sentence and unsure of a word; of an empty text it knows nothing, and all languages are alike.

    Attributes:
        language: its ISO 639 code, such as en, de, es.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    on_prefixes: ClassVar[bool] = True
    language: str = "en"

    def _require_known(self) -> None:
        codes = [str(code) for code in _identifier(self.label).labels]
        if self.language not in codes:
            raise InputError(f"language is {self.language!r}; py3langid knows {', '.join(sorted(codes))}")

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        self._require_known()
        ranks = [dict(_identifier(self.label).rank(text)) for text in texts]
        return [min(1.0, max(0.0, float(rank[self.language]))) for rank in ranks]


@dataclass(frozen=True)
class Profanity(Part):
    """The probability that the completion is offensive, by alt-profanity-check's linear classifier. Weigh it negatively."""

    extent: ClassVar[Bounds] = (0.0, 1.0)
    on_prefixes: ClassVar[bool] = True

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        predict = require("profanity_check", "alt-profanity-check", self.label).predict_prob
        return [float(p) for p in predict(list(texts))] if texts else []


@dataclass(frozen=True)
class Sentiment(Part):
    """How positive the completion sounds, by VADER's lexicon and rules (Hutto & Gilbert 2014): the compound score.

    English only. 0 for a text without words of the lexicon.
    """

    extent: ClassVar[Bounds] = (-1.0, 1.0)
    on_prefixes: ClassVar[bool] = True

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        analyser = _analyser(self.label)
        return [float(analyser.polarity_scores(text)["compound"]) for text in texts]


@cache
def _identifier(part: str) -> Any:
    langid = require("py3langid.langid", "py3langid", part)
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@cache
def _analyser(part: str) -> Any:
    return require("vaderSentiment.vaderSentiment", "vaderSentiment", part).SentimentIntensityAnalyzer()
