"""Encoders: a text as a vector, by BERT and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiltlm.lm.batching import token_ids
from tiltlm.lm.pooled import PooledModel, Pooling, load_pooled

ROWS = 64


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model whose pooled hidden states stand for a text.

    Attributes:
        longest: tokens of a text that are read; None for all.
        rows: most texts in the model at a time.
    """

    body: PooledModel
    longest: int | None = None
    rows: int = ROWS

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Each text as a vector of length 1, so that inner products are cosines; float32, no gradient."""
        ids = token_ids(texts, self.body.tokenizer, self.longest)
        return torch.nn.functional.normalize(self.body.vectors(ids, self.rows), dim=-1)


def load_encoder(
    model: str | Path | PreTrainedModel = "all-minilm-l6-v2",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    pooling: Pooling | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> Encoder:
    """Load an encoder.

    Args:
        model: a hub id, a folder (also one of sentence-transformers, whose pooling and length are then taken), the embedded
            "all-minilm-l6-v2", or a model in memory.
        tokenizer: needed with a model in memory.
        pooling: "mean", "first" or "last"; what the folder says, else "mean".
        dtype, device: as `tiltlm.load` takes them.

    Raises:
        InputError: if there is nothing to load under that name, or it pools in another way.
    """
    body = load_pooled(model, tokenizer, pooling=pooling, causal="mean", dtype=dtype, device=device)
    return Encoder(body, body.trained)
