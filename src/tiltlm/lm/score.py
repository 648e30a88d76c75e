"""Teacher forcing: the features that predict each token of given completions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.lm.backbone import Backbone
from tiltlm.records import Draws


def completion_features(backbone: Backbone, draws: Draws) -> tuple[Float[Tensor, "N D"], Bool[Tensor, "B T"]]:
    """Features that predict each real token of the completions, and the mask that says which tokens.

    Prompts are run once and shared by their completions; padding does not reach the head.
    """
    unique, owner = draws.prompt_index.unique(return_inverse=True)
    prompts = draws.prompts.select(unique.tolist())
    width = max(1, int(draws.lengths.max()))
    mask = draws.mask[:, :width]
    features = backbone.read(prompts, owner, draws.tokens[:, : width - 1], mask[:, :-1])
    return features[mask.to(features.device)], mask


def scatter(values: Float[Tensor, " N"], mask: Bool[Tensor, "B T"], width: int) -> Float[Tensor, "B W"]:
    """Put the values of real tokens back in place, 0 elsewhere, padded to `width` columns."""
    table = torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values.cpu())
    return torch.nn.functional.pad(table, (0, width - mask.shape[1]))


def batches(draws: Draws, tokens: int) -> Iterator[Tensor]:
    """Row indices in batches of about `tokens` completion tokens, neighbours (of one prompt) together."""
    lengths = draws.lengths.clamp(min=1).tolist()
    start, longest = 0, 0
    for row, length in enumerate(lengths):
        longest_now = max(longest, length)
        if row > start and longest_now * (row + 1 - start) > tokens:
            yield torch.arange(start, row)
            start, longest_now = row, length
        longest = longest_now
    yield torch.arange(start, len(lengths))
