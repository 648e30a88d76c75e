"""Rewards from models that read a whole text: classifiers and reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part
from tiltlm.lm.classifier import SequenceClassifier, load_classifier

Output = Literal["probability", "logit"]


@dataclass(frozen=True)
class Classifier(Part):
    """A label's probability or logit by any AutoModelForSequenceClassification: sentiment, toxicity, reward models.

    Attributes:
        model: a classifier, or what `load_classifier` loads.
        target: the label, by name or number; not needed for a reward model, which has one output.
        output: the probability, in [0, 1], or the logit, which has no bounds and is what a reward model is trained as.
        given: "nothing" reads the completion alone; "prompt" the prompt before it, conversations as the model's own chat template
            writes them, which is what reward models want.
    """

    model: SequenceClassifier | str
    target: str | int | None = None
    output: Output = "probability"
    given: Literal["prompt", "nothing"] = "nothing"

    def __post_init__(self) -> None:
        if self.output not in ("probability", "logit"):
            raise InputError(f"output is {self.output!r}; choose probability, logit")
        if self.given not in ("prompt", "nothing"):
            raise InputError(f"given is {self.given!r}; choose prompt, nothing")

    @property
    def bounds(self) -> Bounds | None:
        return (0.0, 1.0) if self.output == "probability" else None

    @property
    def reads(self) -> tuple[str, ...]:
        return ("prompts",) if self.given == "prompt" else ()

    @cached_property
    def _classifier(self) -> SequenceClassifier:
        return load_classifier(self.model) if isinstance(self.model, str) else self.model

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        classifier = self._classifier
        place = classifier.index(self.target)
        if not texts:
            return []
        logits = self._logits(texts, columns).double()
        if self.output == "logit":
            return logits[:, place].tolist()
        probability = logits.sigmoid() if classifier.independent else torch.softmax(logits, -1)
        return probability[:, place].clamp(0.0, 1.0).tolist()

    def _logits(self, texts: Sequence[str], columns: dict[str, Sequence[Any]]) -> torch.Tensor:
        if self.given == "nothing":
            return self._classifier.logits(texts)
        prompts = columns["prompts"]
        if isinstance(prompts[0], str):
            return self._classifier.logits([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
        return self._classifier.logits(self._classifier.dialogues(prompts, texts), special=False)
