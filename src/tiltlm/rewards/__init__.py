"""Named parts of rewards, with known bounds: `Reward(0.3 * rewards.Fluency(lm) + rewards.TopicSimilarity(text="space travel"), beta=0.1)`.

Each is a frozen dataclass that is called as TRL calls rewards. Parts and plain functions add, multiply and scale; see
`tiltlm.evidence.composition`. The same parts evaluate a corpus: `evaluate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltlm.evidence.composition import Clipped, Formula, Linear, Offset, Product
    from tiltlm.evidence.parts import Column, Function, Part
    from tiltlm.rewards.abstention import Answered, CalibratedAnswer, SelectiveAccuracy
    from tiltlm.rewards.answers import ExactMatch, LabelMatch, NumericEquality, TokenF1, TokenPrecision, TokenRecall
    from tiltlm.rewards.catalogue import described, make_part, part_kinds
    from tiltlm.rewards.classifiers import Classifier
    from tiltlm.rewards.evaluation import evaluate
    from tiltlm.rewards.judge import Judge
    from tiltlm.rewards.lexicons import Language, Profanity, Sentiment
    from tiltlm.rewards.likelihoods import AnswerLikelihood, Fluency, PseudoLogLikelihood
    from tiltlm.rewards.overlap import BLEU, CHRF, RougeL
    from tiltlm.rewards.programs import RunsCode
    from tiltlm.rewards.scenes import SceneF1
    from tiltlm.rewards.similarity import TopicSimilarity
    from tiltlm.rewards.texts import JSONSchema, Length, Pattern, Repetition

_HOME = {
    "AnswerLikelihood": "rewards.likelihoods",
    "Answered": "rewards.abstention",
    "BLEU": "rewards.overlap",
    "CHRF": "rewards.overlap",
    "CalibratedAnswer": "rewards.abstention",
    "Classifier": "rewards.classifiers",
    "Clipped": "evidence.composition",
    "Column": "evidence.parts",
    "ExactMatch": "rewards.answers",
    "Fluency": "rewards.likelihoods",
    "Formula": "evidence.composition",
    "Function": "evidence.parts",
    "JSONSchema": "rewards.texts",
    "Judge": "rewards.judge",
    "LabelMatch": "rewards.answers",
    "Language": "rewards.lexicons",
    "Length": "rewards.texts",
    "Linear": "evidence.composition",
    "NumericEquality": "rewards.answers",
    "Offset": "evidence.composition",
    "Part": "evidence.parts",
    "Pattern": "rewards.texts",
    "Product": "evidence.composition",
    "Profanity": "rewards.lexicons",
    "PseudoLogLikelihood": "rewards.likelihoods",
    "Repetition": "rewards.texts",
    "RougeL": "rewards.overlap",
    "RunsCode": "rewards.programs",
    "SceneF1": "rewards.scenes",
    "SelectiveAccuracy": "rewards.abstention",
    "Sentiment": "rewards.lexicons",
    "TokenF1": "rewards.answers",
    "TokenPrecision": "rewards.answers",
    "TokenRecall": "rewards.answers",
    "TopicSimilarity": "rewards.similarity",
    "described": "rewards.catalogue",
    "evaluate": "rewards.evaluation",
    "make_part": "rewards.catalogue",
    "part_kinds": "rewards.catalogue",
}

__all__ = [
    "BLEU",
    "CHRF",
    "AnswerLikelihood",
    "Answered",
    "CalibratedAnswer",
    "Classifier",
    "Clipped",
    "Column",
    "ExactMatch",
    "Fluency",
    "Formula",
    "Function",
    "JSONSchema",
    "Judge",
    "LabelMatch",
    "Language",
    "Length",
    "Linear",
    "NumericEquality",
    "Offset",
    "Part",
    "Pattern",
    "Product",
    "Profanity",
    "PseudoLogLikelihood",
    "Repetition",
    "RougeL",
    "RunsCode",
    "SceneF1",
    "SelectiveAccuracy",
    "Sentiment",
    "TokenF1",
    "TokenPrecision",
    "TokenRecall",
    "TopicSimilarity",
    "described",
    "evaluate",
    "make_part",
    "part_kinds",
]


def __getattr__(name: str) -> Any:
    """Import on first use: a length needs no transformers."""
    if name not in _HOME:
        raise AttributeError(f"module 'tiltlm.rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tiltlm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
