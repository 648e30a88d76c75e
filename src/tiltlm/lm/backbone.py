"""One forward pass of a causal language model, split where the logits would explode.

`Backbone` runs the transformer body and leaves the unembedding to `head.py`. Whether body and head together
give the model's own logits is checked once on a short text; a model for which they do not (an unusual output
layer, an adapter on it) is run whole, and its logits are the features.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tiltlm.errors import InputError
from tiltlm.lm.head import Head


@dataclass(frozen=True)
class Prefix:
    """What the model remembers of the prompts: their cache, and the features that predict the first token."""

    cache: Any
    mask: Bool[Tensor, "P L"]
    last: Float[Tensor, "P D"]

    def rows(self, index: Int[Tensor, " B"]) -> Prefix:
        """A copy for the rows in `index`; the original cache is left as it is."""
        index = index.to(self.last.device)
        return Prefix(select_cache(self.cache, index), self.mask[index], self.last[index])


def select_cache(cache: DynamicCache, index: Int[Tensor, " B"]) -> DynamicCache:
    """A cache that holds the rows in `index`; differentiable, and the original keeps its rows."""
    chosen = copy.copy(cache)
    chosen.layers = []
    for layer in cache.layers:
        other: Any = copy.copy(layer)
        if not hasattr(other, "batch_select_indices"):
            raise InputError(
                f"this model keeps a {type(layer).__name__} in its cache, whose rows cannot be selected; use a model with "
                f"ordinary attention caches"
            )
        other.batch_select_indices(index)  # assigns new tensors, so `layer` keeps its own
        chosen.layers.append(other)
    return chosen


class Backbone:
    """The body of a model, and the head that `head.py` applies to its features.

    Args:
        model: a causal language model in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._accepts_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._body: nn.Module | None = None
        self._adopt_head()

    def _adopt_head(self) -> None:
        """Use body and head apart if together they reproduce the model's logits."""
        output = self.model.get_output_embeddings()
        body = getattr(self.model, self.model.base_model_prefix, None) if self.model.base_model_prefix else None
        if type(output) is not nn.Linear or not isinstance(body, nn.Module):
            return
        self._body = body
        ids = torch.arange(1, 4, device=self.device)[None] % self.model.config.vocab_size
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            expected = self.model(input_ids=ids, attention_mask=mask.long()).logits.float()
            got = self.head.logits(self.features(ids, mask)[0]).float()
        gap = (expected[0].log_softmax(-1) - got.log_softmax(-1)).abs().max()
        if gap > (1e-4 if output.weight.dtype in (torch.float32, torch.float64) else 0.05):
            self._body = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def width(self) -> int:
        """Dimension of the features: of the hidden states, or of the logits where the model is run whole."""
        split = self._split is not None
        config = self.model.config.get_text_config()
        return config.hidden_size if split else config.vocab_size

    @property
    def _split(self) -> nn.Module | None:
        """The body, as long as the output layer is a plain one: an adapter on it has to be run whole."""
        return self._body if type(self.model.get_output_embeddings()) is nn.Linear else None

    @property
    def head(self) -> Head:
        """The map from `features` to logits."""
        if self._split is None:
            return Head()
        output: Any = self.model.get_output_embeddings()
        config = self.model.config
        scale = 1.0 / getattr(config, "logits_scaling", 1.0) * (getattr(config, "logit_scale", None) or 1.0)
        return Head(output.weight, output.bias, scale, getattr(config, "final_logit_softcapping", None))

    def features(
        self,
        ids: Int[Tensor, "B S"],
        mask: Bool[Tensor, "B L"],
        cache: Any = None,
    ) -> Float[Tensor, "B S D"]:
        """Features after each of `ids`, given what is in `cache` (which grows by them).

        Args:
            mask: True on real tokens, over the cache and `ids` together.
        """
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {"position_ids": positions} if self._accepts_positions else {}
        split = self._split
        run = split if split is not None else self.model
        out = run(
            input_ids=ids,
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        return out.last_hidden_state if split is not None else out.logits

    def prefill(self, tokens: Int[Tensor, "P L"], mask: Bool[Tensor, "P L"]) -> Prefix:
        """Run the prompts once. They may be padded on either side; inside they are padded on the left."""
        tokens, mask = left_pad(tokens.to(self.device), mask.to(self.device))
        cache = DynamicCache(config=self.model.config)
        features = self.features(tokens, mask, cache)
        return Prefix(cache, mask, features[:, -1])


def left_pad(tokens: Int[Tensor, "P L"], mask: Bool[Tensor, "P L"]) -> tuple[Tensor, Tensor]:
    """Move the real tokens of each row to its right end, in order, and cut columns that all rows pad."""
    order = mask.long().argsort(dim=-1, stable=True)  # pads (0) first, the rest as it was
    width = int(mask.sum(-1).max())
    return tokens.gather(-1, order)[:, -width:], mask.gather(-1, order)[:, -width:]
