"""Texts as vectors: a model without its head, and one way to make its hidden states a vector.

Encoders (`Encoder`, whose vectors are compared) and trunks (`Trunk`, whose vectors are a reward model's features) stand on this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tiltlm.errors import InputError
from tiltlm.lm.batching import in_batches, longest_text, padding_id
from tiltlm.lm.load import load_as, model_source

Pooling = Literal["mean", "first", "last"]
"""The mean of the states of a text's tokens, the first one's ([CLS]), or the last one's, which alone has seen all in a causal LM."""


@dataclass(frozen=True, eq=False)
class PooledModel:
    """A frozen model without its head, its tokenizer, and how its states become a vector.

    Attributes:
        name: what it was loaded by.
        trained: tokens that its training took of a text, where its folder says so; at most what the model can read.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    pooling: Pooling
    longest: int | None = None
    trained: int | None = None

    def pooled(self, tokens: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """One vector a text in single precision; padding stands at the end. Carries gradient to weights that have it."""
        device = self.model.device
        tokens, mask = tokens.to(device), mask.to(device)
        states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()
        if self.pooling == "first":
            return states[:, 0]
        if self.pooling == "last":
            return states[torch.arange(len(states), device=device), mask.sum(-1) - 1]
        return (states * mask[..., None]).sum(1) / mask.sum(-1, keepdim=True)

    def vectors(
        self, ids: Sequence[Sequence[int]], rows: int, progress: Callable[[int], None] | None = None
    ) -> Float[Tensor, "B D"]:
        """One vector a text, at most `rows` in the model at a time; on the CPU, no gradient."""

        def run(tokens: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
            found = self.pooled(tokens, mask)
            if progress is not None:
                progress(len(numbers))
            return found

        return in_batches(ids, rows, padding_id(self.tokenizer), run)


def load_pooled(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    pooling: Pooling | None = None,
    causal: Pooling = "last",
    dtype: str = "auto",
    device: str = "auto",
    name: str | None = None,
) -> PooledModel:
    """A causal LM or an encoder without its head, from a hub id, a folder, an embedded name, or a model in memory.

    Args:
        tokenizer: needed with a model in memory, which is taken over and frozen.
        pooling: what its folder says (of sentence-transformers) by default, else `causal` for a causal LM and the mean for others.
        name: how to call a model in memory.

    Raises:
        InputError: if there is nothing to load under that name, it is an encoder-decoder, or it pools in a way not known here.
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise InputError(
            f"pooling is {pooling!r}; use {', '.join(get_args(Pooling))}, or leave the choice to the model"
        )
    in_memory = isinstance(model, PreTrainedModel)
    loaded, tokenizer = load_as(AutoModel, model, tokenizer, dtype=dtype, device=device)
    body: Any = getattr(loaded, loaded.base_model_prefix or "", loaded) if in_memory else loaded
    label = name or (getattr(loaded.config, "_name_or_path", "") or type(loaded).__name__ if in_memory else str(model))
    config: Any = body.config
    if config.is_encoder_decoder:
        raise InputError(f"model {label!r} is an encoder-decoder; give a causal LM or a BERT-like encoder")
    folder = None if in_memory else Path(model_source(str(model)))
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    chosen = pooling or _pooling_of(folder) or (causal if is_causal else "mean")
    longest = longest_text(body, tokenizer)
    trained = None if folder is None else _json(folder / "sentence_bert_config.json").get("max_seq_length")
    known = [limit for limit in (longest, trained) if limit is not None]
    return PooledModel(body, tokenizer, label, chosen, longest, min(known, default=None))


def _pooling_of(folder: Path | None) -> Pooling | None:
    """What a folder of sentence-transformers says; None where it says nothing."""
    says = {} if folder is None else _json(folder / "1_Pooling" / "config.json")
    chosen = [name for name, on in says.items() if name.startswith("pooling_mode_") and on is True]
    known: dict[str, Pooling] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "first",
        "pooling_mode_lasttoken": "last",
    }
    if not chosen:
        return None
    if len(chosen) > 1 or chosen[0] not in known:
        raise InputError(
            f"model {str(folder)!r} pools by {', '.join(chosen)}, which is not known here; give pooling='mean', 'first' or 'last'"
        )
    return known[chosen[0]]


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
