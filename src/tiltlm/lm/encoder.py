"""Encoders: a text as a vector, by BERT and its kin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from tiltlm.errors import InputError
from tiltlm.lm.batching import in_batches, longest_text, padding_id, token_ids
from tiltlm.lm.load import load_as, model_source

Pooling = Literal["mean", "first"]
ROWS = 64


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model whose hidden states, pooled, stand for a text.

    Attributes:
        pooling: the mean over a text's tokens, or the state of the first one ([CLS]).
        longest: tokens of a text that are read; None for all.
        rows: most texts in the model at a time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling = "mean"
    longest: int | None = None
    rows: int = ROWS

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Each text as a vector of length 1, so that inner products are cosines; float32, no gradient."""
        ids = token_ids(texts, self.tokenizer, self.longest)
        pooled = in_batches(ids, self.rows, padding_id(self.tokenizer), self._pooled)
        return torch.nn.functional.normalize(pooled, dim=-1)

    def _pooled(self, tokens: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        tokens, mask = tokens.to(self.model.device), mask.to(self.model.device)
        states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()
        if self.pooling == "first":
            return states[:, 0]
        return (states * mask[..., None]).sum(1) / mask.sum(-1, keepdim=True)


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
        pooling: "mean" or "first"; what the folder says, else "mean".
        dtype, device: as `tiltlm.load` takes them.

    Raises:
        InputError: if there is nothing to load under that name, or it pools in another way.
    """
    loaded, tokenizer = load_as(AutoModel, model, tokenizer, dtype=dtype, device=device)
    folder = None if isinstance(model, PreTrainedModel) else Path(model_source(str(model)))
    read = longest_text(loaded, tokenizer)
    trained = None if folder is None else _json(folder / "sentence_bert_config.json").get("max_seq_length")
    longest = min((limit for limit in (read, trained) if limit is not None), default=None)
    return Encoder(loaded, tokenizer, pooling or _pooling(folder), longest)


def _pooling(folder: Path | None) -> Pooling:
    says = {} if folder is None else _json(folder / "1_Pooling" / "config.json")
    chosen = [name for name, on in says.items() if name.startswith("pooling_mode_") and on is True]
    if chosen in ([], ["pooling_mode_mean_tokens"]):
        return "mean"
    if chosen == ["pooling_mode_cls_token"]:
        return "first"
    raise InputError(
        f"encoder {str(folder)!r} pools by {', '.join(chosen)}, which is not known here; give pooling='mean' or 'first'"
    )


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
