"""One forward pass of a language model, split where the logits would explode.

`Backbone` runs the transformer body and leaves the unembedding to `head.py`. Whether body and head together
give the model's own logits is checked once on a short text; a model for which they do not (an unusual output
layer, an adapter on it) is run whole, and its logits are the features.

What a model conditions on differs by kind, and only here: `causal.py` reads the prompt as the beginning of the text (with
images in it, where the model has them), `encoder_decoder.py` reads it as a source. Whoever draws and scores sees a
`Prefix`: what the model remembers of the prompts, and the features that predict the first token.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedModel

from tiltlm.errors import InputError
from tiltlm.lm.head import Head
from tiltlm.lm.packing import Packer, worth_packing
from tiltlm.lm.shared_cache import SharedCache
from tiltlm.records import Prompts

Tilt = Callable[[Float[Tensor, "B S D"]], Float[Tensor, "B S D"]]
"""Features -> what a critic adds to them."""


@dataclass(frozen=True)
class Memory:
    """What a model remembers of the rows that it has read. The cache grows as it reads on; all else stays.

    Attributes:
        cache: keys and values: a `SharedCache`, or transformers' own.
        source: what an encoder made of the prompts; None where there is no encoder.
        source_mask: True where `source` stands for a real token or patch.
    """

    cache: Any
    source: Float[Tensor, "B S D"] | None = None
    source_mask: Bool[Tensor, "B S"] | None = None

    def rows(self, index: Int[Tensor, " B"]) -> Memory:
        """A copy for the rows in `index`; the original is left as it is."""
        source = None if self.source is None else self.source[index]
        mask = None if self.source_mask is None else self.source_mask[index]
        return Memory(select_cache(self.cache, index), source, mask)


@dataclass(frozen=True)
class Prefix:
    """What the model remembers of the prompts, and the features that predict the first token.

    Attributes:
        mask: True on the real tokens that the cache holds.
    """

    memory: Memory
    mask: Bool[Tensor, "P L"]
    last: Float[Tensor, "P D"]

    def rows(self, index: Int[Tensor, " B"]) -> Prefix:
        """A copy for the rows in `index`; the original cache is left as it is. What none of them looks at any more is left out."""
        index = index.to(self.last.device)
        memory, mask = self.memory.rows(index), self.mask[index]
        cache = memory.cache
        if isinstance(cache, SharedCache) and cache.used:
            forgotten = int((~mask[:, cache.shared :].any(0)).int().cumprod(0).sum())
            memory = replace(memory, cache=cache.forgetting(forgotten))
            mask = torch.cat([mask[:, : cache.shared], mask[:, cache.shared + forgotten :]], dim=-1)
        return Prefix(memory, mask, self.last[index])

    def apart(self) -> Prefix:
        """The same for rows that nobody comes beside any more: what they share is copied where that is faster."""
        cache = self.memory.cache
        return replace(self, memory=replace(self.memory, cache=cache.apart())) if self.takes_more else self

    @property
    def takes_more(self) -> bool:
        """Whether rows that begin now may come beside those that are under way."""
        return isinstance(self.memory.cache, SharedCache)

    def beside(self, other: Prefix) -> Prefix:
        """The rows of both, `other`'s behind, of which the prompts alone have been read. Only if it `takes_more`."""
        cache, fresh = self.memory.cache, other.memory.cache
        wide = max(cache.shared, fresh.shared)
        mine = _pad(self.mask, wide - cache.shared, 0)
        theirs = _pad(other.mask, wide - fresh.shared, cache.used)
        memory = Memory(cache.beside(fresh))
        return Prefix(memory, torch.cat([mine, theirs]), torch.cat([self.last, other.last]))


def _pad(mask: Bool[Tensor, "B L"], left: int, right: int) -> Bool[Tensor, "B W"]:
    return torch.nn.functional.pad(mask, (left, right), value=False)


def select_cache(cache: Any, index: Int[Tensor, " B"]) -> Any:
    """A cache that holds the rows in `index`; differentiable, and the original keeps its rows."""
    if isinstance(cache, SharedCache):
        return cache.rows(index)
    chosen = copy.copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        chosen.self_attention_cache = select_cache(cache.self_attention_cache, index)
        chosen.cross_attention_cache = select_cache(cache.cross_attention_cache, index)
        chosen.is_updated = dict(cache.is_updated)
        return chosen
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


class Backbone(ABC):
    """The body of a model, and the head that `head.py` applies to its features.

    Args:
        model: a language model in evaluation mode.

    Attributes:
        has_encoder: whether prompts are sources for an encoder, so that completions begin on their own.
        unread: beginnings of the names of weights that play no part; transformers makes some up anew at every load.
    """

    has_encoder = False
    unread: tuple[str, ...] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self._config: Any = model.config.get_text_config(
            decoder=True
        )  # which for some models is made anew at every call
        self._body: nn.Module | None = None
        self._tilt: Tilt | None = None
        self._packer = Packer()
        self._adopt_head()

    def _adopt_head(self) -> None:
        """Use body and head apart if together they reproduce the model's logits."""
        output, body = self.model.get_output_embeddings(), self._find_body()
        if type(output) is not nn.Linear or body is None:
            return
        self._body = body
        with torch.no_grad():
            expected, features = self._probe()
            if features.shape[-1] != output.in_features:  # a layer between them, as Electra has
                self._body = None
                return
            got = self.head.logits(features).float()
        gap = (expected.float().log_softmax(-1) - got.log_softmax(-1)).abs().max()
        if not gap <= (1e-4 if output.weight.dtype in (torch.float32, torch.float64) else 0.05):
            self._body = None

    def require_own_law(self) -> None:
        """Look whether rows that are run together have the probabilities that the model gives each by itself.

        An encoder–decoder's rows begin together, with the same tokens, and there is nothing to look at.

        Raises:
            InputError: if they have not, or the model cannot be run as it is here.
        """
        return

    @abstractmethod
    def _find_body(self) -> nn.Module | None:
        """The model without its output layer."""

    @abstractmethod
    def _probe(self) -> tuple[Float[Tensor, "S V"], Float[Tensor, "S D"]]:
        """The whole model's logits on a short text, and the features there."""

    @abstractmethod
    def _run(
        self, ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B L"], memory: Memory | None, **inputs: Tensor
    ) -> Float[Tensor, "B S D"]:
        """Features after each of `ids`: the body's, or the whole model's logits."""

    @abstractmethod
    def prefill(self, prompts: Prompts) -> Prefix:
        """Read the prompts once. They may be padded on either side."""

    @abstractmethod
    def room(self, max_new_tokens: int) -> int | None:
        """Most tokens that a prompt may have; None where the model sets no limit.

        Raises:
            InputError: if the model has no room for completions of that length.
        """

    def takes_ragged(self, prompts: Prompts) -> bool:
        """Whether `resume` takes completions of different lengths together."""
        return False

    def resume(
        self, prompts: Prompts, rows: Int[Tensor, " B"], tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Prefix:
        """Read prompts and the beginnings of completions, of one length unless `takes_ragged`.

        Args:
            rows: the prompt of each beginning.
        """
        prefix = self.prefill(prompts).rows(rows)
        width = int(mask.sum(-1).max()) if len(mask) else 0
        if width == 0:
            return prefix
        assert bool(mask[:, :width].all()), "beginnings of different lengths"
        seen = torch.cat([prefix.mask, mask[:, :width].to(prefix.mask.device)], dim=-1)
        return Prefix(prefix.memory, seen, self.features(tokens[:, :width], seen, prefix.memory)[:, -1])

    def read(
        self, prompts: Prompts, rows: Int[Tensor, " B"], tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T+1 D"]:
        """Features after each row's prompt and after each of its tokens.

        Args:
            rows: the prompt of each row; every prompt has one.
            mask: True on real tokens; what is found after the others has no meaning.
        """
        prefix = self.prefill(prompts).rows(rows)
        last = prefix.last[:, None]
        if not tokens.shape[1]:
            return last
        seen = torch.cat([prefix.mask, mask.to(prefix.mask.device)], dim=-1)
        return torch.cat([last, self.features(tokens, seen, prefix.memory)], dim=1)

    def features(
        self, ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B L"], memory: Memory | None = None, **inputs: Tensor
    ) -> Float[Tensor, "B S D"]:
        """Features after each of `ids`, given what is in `memory` (whose cache grows by them).

        Args:
            mask: True on real tokens, over the cache and `ids` together.
            inputs: what the model reads beside the tokens, by name, such as pixels.
        """
        return self._tilted(self._run(ids.to(self.device), mask.to(self.device), memory, **inputs))

    def _tilted(self, raw: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        return raw if self._tilt is None else raw + self._tilt(raw).to(raw.dtype)

    def tilted(self, tilt: Tilt) -> Backbone:
        """The same model, with `tilt` of the features added to them."""
        other = copy.copy(self)
        other._tilt = tilt
        return other

    def recomputing(self) -> AbstractContextManager[None]:
        """Keep less for backward passes, which run each layer again (gradient checkpointing).

        Raises:
            InputError: for a model that transformers runs: with a cache, as prompts are shared, it has no such thing.
        """
        raise InputError(
            f"gradient_checkpointing is on, which is for models that TiltLM runs itself, and {type(self.model).__name__} is not one "
            f"of them here; leave it out, and lower micro_tokens instead"
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocabulary(self) -> int:
        """Tokens that a completion may be made of."""
        output = self.model.get_output_embeddings()
        if isinstance(output, nn.Linear):
            return output.weight.shape[0]
        return self._config.vocab_size

    @property
    def width(self) -> int:
        """Dimension of the features: of the hidden states, or of the logits where the model is run whole."""
        return self.model.get_output_embeddings().weight.shape[1] if self._split is not None else self.vocabulary

    @property
    def drawing_head(self) -> Head:
        """The same map for products with few rows and no gradient."""
        head = self.head
        if head.weight is None or not worth_packing([head.weight]):
            return head
        return replace(head, packed=self._packer.weight("head", [head.weight]))

    @property
    def _split(self) -> nn.Module | None:
        """The body, as long as the output layer is a plain one: an adapter on it has to be run whole."""
        return self._body if type(self.model.get_output_embeddings()) is nn.Linear else None

    @property
    def head(self) -> Head:
        """The map from `features` to logits."""
        if self._split is None:
            return Head()
        output, config = self.model.get_output_embeddings(), self._config
        scale = 1.0 / getattr(config, "logits_scaling", 1.0) * (getattr(config, "logit_scale", None) or 1.0)
        return Head(output.weight, output.bias, scale, getattr(config, "final_logit_softcapping", None))


def to_device(inputs: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs where the model is, and the real-valued ones in its precision."""
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in moved.items()}


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """The tensors of several prompts along their first axis; where the others differ, padded with 0 to the longest."""
    real = [part for part in parts if len(part)] or list(parts[:1])
    widest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in real), strict=True)]
    padded = []
    for part in real:
        missing = [(0, most - size) for most, size in zip(widest, part.shape[1:], strict=True)]
        padded.append(nn.functional.pad(part, [n for pair in reversed(missing) for n in pair]))
    return torch.cat(padded)


def left_pad(tokens: Int[Tensor, "P L"], mask: Bool[Tensor, "P L"]) -> tuple[Tensor, Tensor]:
    """Move the real tokens of each row to its right end, in order, and cut columns that all rows pad."""
    order = mask.long().argsort(dim=-1, stable=True)  # pads (0) first, the rest as it was
    width = int(mask.sum(-1).max())
    return tokens.gather(-1, order)[:, -width:], mask.gather(-1, order)[:, -width:]


def right_pad(tokens: Int[Tensor, "P L"], mask: Bool[Tensor, "P L"]) -> tuple[Tensor, Tensor]:
    """Move the real tokens of each row to its left end, in order, and cut columns that all rows pad."""
    order = (~mask).long().argsort(dim=-1, stable=True)
    width = int(mask.sum(-1).max())
    return tokens.gather(-1, order)[:, :width], mask.gather(-1, order)[:, :width]
