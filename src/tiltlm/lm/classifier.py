"""Sequence classifiers and reward models: any AutoModelForSequenceClassification, as numbers for texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from tiltlm.errors import InputError
from tiltlm.lm.batching import in_batches, longest_text, padding_id, token_ids
from tiltlm.lm.load import load_as
from tiltlm.lm.text import render
from tiltlm.records import Text

ROWS = 32


@dataclass(frozen=True, eq=False)
class SequenceClassifier:
    """A model with a head over the whole text.

    Attributes:
        labels: what each output stands for; one for a reward model or a regression.
        longest: tokens of a text that are read; None for all.
        rows: most texts in the model at a time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    longest: int | None = None
    rows: int = ROWS

    @property
    def independent(self) -> bool:
        """Whether each output is a yes or no of its own (a sigmoid), and not one of several exclusive labels (a softmax)."""
        return len(self.labels) == 1 or self.model.config.problem_type == "multi_label_classification"

    def logits(self, texts: Sequence[str], *, special: bool = True) -> Float[Tensor, "B K"]:
        """The outputs for each text, in float32, no gradient.

        Args:
            special: add the special tokens that the tokenizer adds; a text from a chat template has them.
        """
        ids = token_ids(texts, self.tokenizer, self.longest, special=special)
        return in_batches(ids, self.rows, padding_id(self.tokenizer), self._logits)

    def dialogues(self, prompts: Sequence[Text], answers: Sequence[str]) -> list[str]:
        """Each conversation with its answer, as the model's chat template writes it."""
        turns = [[*prompt, {"role": "assistant", "content": a}] for prompt, a in zip(prompts, answers, strict=True)]
        return [render(turn, self.tokenizer, number, answered=True) for number, turn in enumerate(turns, 1)]

    def index(self, label: str | int | None) -> int:
        """The output of a label, by its name or number.

        Raises:
            InputError: for a label that is not there, or None where there are several.
        """
        names = {name.lower(): place for place, name in enumerate(self.labels)}
        if label is None and len(self.labels) == 1:
            return 0
        if isinstance(label, int) and 0 <= label < len(self.labels):
            return label
        if isinstance(label, str) and label.lower() in names:
            return names[label.lower()]
        raise InputError(f"label is {label!r}; the classifier has {', '.join(map(repr, self.labels))}")

    def _logits(self, tokens: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        config: Any = self.model.config.get_text_config()
        before = config.pad_token_id
        padded = tokens[~mask]  # a causal model finds a text's last token as the last that is not this id
        config.pad_token_id = int(padded[0]) if len(padded) else -1
        try:
            device = self.model.device
            return self.model(input_ids=tokens.to(device), attention_mask=mask.long().to(device)).logits.float()
        finally:
            config.pad_token_id = before


def load_classifier(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> SequenceClassifier:
    """Load a classifier or reward model: a hub id, a folder, or a model in memory with its tokenizer.

    Raises:
        InputError: if there is nothing to load under that name.
    """
    loaded, tokenizer = load_as(AutoModelForSequenceClassification, model, tokenizer, dtype=dtype, device=device)
    config: Any = loaded.config
    labels = tuple(str((config.id2label or {}).get(k, k)) for k in range(config.num_labels))
    return SequenceClassifier(loaded, tokenizer, labels, longest_text(loaded, tokenizer))
