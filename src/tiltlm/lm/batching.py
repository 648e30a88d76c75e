"""Texts through a model that reads a whole text at once: tokenised, cut to what it can read, padded, a batch at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiltlm.errors import InputError, TiltWarning

UNLIMITED = 1_000_000
"""Tokenizers that know no limit say a number far above this."""


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens that the model reads at once, special ones included; None where nothing says."""
    known = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    limits = [limit for limit in known if limit is not None and limit < UNLIMITED]
    return min(limits) if limits else None


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int | None, *, special: bool = True
) -> list[list[int]]:
    """The ids of each text, with the special tokens that the model was trained with, cut at `longest` with a warning."""
    rows: Any = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    if longest is None or all(len(ids) <= longest for ids in rows):
        return [list(ids) for ids in rows]
    warnings.warn(
        f"a text is longer than the {longest} tokens that {tokenizer.name_or_path or 'the model'} reads, and is judged by its "
        f"beginning; lower max_new_tokens, or take a model with a longer context",
        TiltWarning,
        stacklevel=2,
    )
    cut: Any = tokenizer(list(texts), add_special_tokens=special, truncation=True, max_length=longest)["input_ids"]
    return [list(ids) for ids in cut]


def in_batches(
    ids: Sequence[Sequence[int]],
    rows: int,
    pad: int | None,
    run: Callable[[Int[Tensor, "B L"], Bool[Tensor, "B L"], Int[Tensor, " B"]], Tensor],
) -> Tensor:
    """What `run` says of each row (the first axis of what it returns), in the order of `ids`; rows of like length go together.

    Args:
        rows: most rows in a pass.
        run: called with tokens, mask and the rows' numbers in `ids`.
        pad: the id that pads, None for one that no row holds: models that look for the last token by its id find it then.
    """
    if not ids:
        return torch.zeros(0)
    empty = next((row for row, some in enumerate(ids) if not some), None)
    if empty is not None:
        raise InputError(
            f"text {empty + 1} has no tokens; the model adds none of its own, so that nothing can be judged"
        )
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    filler = _absent(ids) if pad is None else pad
    parts = []
    with torch.inference_mode():
        for start in range(0, len(order), rows):
            numbers = order[start : start + rows]
            parts.append(run(*padded([ids[row] for row in numbers], filler), torch.tensor(numbers)).cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()].clone()


def padded(ids: Sequence[Sequence[int]], filler: int) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Texts as one tensor, filled up at the end, and where their tokens are."""
    width = max(map(len, ids))
    tokens = torch.tensor([[*row, *[filler] * (width - len(row))] for row in ids])
    return tokens, torch.arange(width)[None] < torch.tensor([len(row) for row in ids])[:, None]


def _absent(ids: Sequence[Sequence[int]]) -> int:
    """The smallest id that is in no row."""
    used = {token for row in ids for token in row}
    return next(token for token in range(len(used) + 1) if token not in used)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokenizer's padding, None where it has none of its own: an end token that doubles as padding can be a text's last."""
    pad: Any = tokenizer.pad_token_id
    return None if pad == tokenizer.eos_token_id else pad
