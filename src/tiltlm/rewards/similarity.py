"""Likeness of meaning: cosines between the embeddings of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part, text_of
from tiltlm.lm.encoder import Encoder, load_encoder

PROMPT = "prompt"


@dataclass(frozen=True)
class TopicSimilarity(Part):
    """The cosine between the embeddings of the completion and of a topic, the prompt, or a reference, in [-1, 1].

    The β·cos of a reward α·P(x) + β·cos(x, target). With a reference column it is the similarity metric of embeddings, as a
    reward and as evaluation. MiniLM's cosines of unrelated sentences are around 0, of paraphrases above 0.8.

    Attributes:
        encoder: an encoder, or what `load_encoder` loads.
        text: the topic, the same for all prompts.
        column: instead of a text, the column with a reference for each prompt; "prompt" is the prompt itself (of a
            conversation, its last message).
    """

    extent: ClassVar[Bounds] = (-1.0, 1.0)
    on_prefixes: ClassVar[bool] = True
    encoder: Encoder | str = "all-minilm-l6-v2"
    text: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.column is None):
            raise InputError(
                f"text is {self.text!r} and column is {self.column!r}; give one of them: what completions should be like"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.column is None else ("prompts",) if self.column == PROMPT else (self.column,)

    @cached_property
    def _encoder(self) -> Encoder:
        return load_encoder(self.encoder) if isinstance(self.encoder, str) else self.encoder

    @cached_property
    def _topic(self) -> Float[Tensor, "1 D"]:
        return self._encoder.embed([self.text or ""])

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        if not texts:
            return []
        wanted = self._topic if self.column is None else self._references(columns)
        cosine = (self._encoder.embed(texts) * wanted).sum(-1)
        return cosine.clamp(-1.0, 1.0).tolist()

    def _references(self, columns: dict[str, Sequence[Any]]) -> Float[Tensor, "B D"]:
        values = columns[self.reads[0]]
        if self.column == PROMPT:
            values = [value if isinstance(value, str) else text_of([value[-1]]) for value in values]
        distinct = {str(value): place for place, value in reversed(list(enumerate(dict.fromkeys(map(str, values)))))}
        return self._encoder.embed(list(dict.fromkeys(map(str, values))))[[distinct[str(value)] for value in values]]
