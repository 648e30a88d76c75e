"""Causal language models: the prompt is the beginning of the text, and may have images in it."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tiltlm.errors import InputError
from tiltlm.lm.backbone import Backbone, Memory, Prefix, joined, left_pad, right_pad, to_device
from tiltlm.lm.light import LightBody
from tiltlm.lm.shared_cache import SharedCache
from tiltlm.records import Prompts

BY_TOKEN = "token_type_ids"
"""Inputs whose names end so have a value for each token of the prompt, and are padded with it."""

SPARED = {"cpu": 256, "other": 4096}
"""So many tokens that need not be read repay one more pass through the layers, by device."""


class CausalBackbone(Backbone):
    """A decoder-only model. Pixels and the like go in with the prompt, and with nothing after it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        super().__init__(model)
        self._light = LightBody.of(self._body)

    def _find_body(self) -> nn.Module | None:
        prefix = self.model.base_model_prefix
        body = getattr(self.model, prefix, None) if prefix else None
        return body if isinstance(body, nn.Module) else None

    def _probe(self) -> tuple[Tensor, Tensor]:
        ids = torch.arange(1, 4, device=self.device)[None] % self.vocabulary
        mask = torch.ones_like(ids, dtype=torch.bool)
        expected = self.model(input_ids=ids, attention_mask=mask.long()).logits
        return expected[0], self.features(ids, mask)[0]

    def _run(
        self, ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B L"], memory: Memory | None, **inputs: Tensor
    ) -> Float[Tensor, "B S D"]:
        if memory is not None and isinstance(memory.cache, SharedCache):
            assert self._light is not None
            return self._light.features(ids, mask, memory.cache)
        positions = mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {"position_ids": positions} if "position_ids" in self._accepts else {}
        split = self._split
        run = split if split is not None else self.model
        out = run(
            input_ids=ids,
            attention_mask=mask.long(),
            past_key_values=None if memory is None else memory.cache,
            use_cache=memory is not None,
            **extra,
            **inputs,
        )
        return out.last_hidden_state if split is not None else out.logits

    def prefill(self, prompts: Prompts) -> Prefix:
        """Run the prompts once; inside they are padded on the left."""
        tokens, mask = self._left(prompts)
        return self._read(tokens, mask, self._inputs(prompts, tokens.shape[1]))

    def read(
        self, prompts: Prompts, rows: Int[Tensor, " B"], tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T+1 D"]:
        """In one pass if we run the layers, unless the prompts begin alike."""
        light = self._light if self._split is not None and not prompts.inputs else None
        ids, real = self._left(prompts)
        found = None
        if light is not None and tokens.shape[1] and not _common(ids, real):
            found = light.prompts_and_completions(ids, real, *(x.to(self.device) for x in (rows, tokens, mask)))
        if found is None:
            return super().read(prompts, rows, tokens, mask)
        of_prompts, after = found
        return self._tilted(torch.cat([of_prompts[rows.to(self.device), -1:], after], dim=1))

    def _left(self, prompts: Prompts) -> tuple[Int[Tensor, "P L"], Bool[Tensor, "P L"]]:
        """Prompts padded on the left."""
        if not int(prompts.mask.any(-1).all()):
            raise InputError("a prompt has no tokens; write a text that the tokenizer knows")
        return left_pad(prompts.tokens.to(self.device), prompts.mask.to(self.device))

    def resume(
        self, prompts: Prompts, rows: Int[Tensor, " B"], tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Prefix:
        """Read on from where completions stand: prompt and beginning together are what the model reads."""
        if not self.takes_ragged(prompts):
            return super().resume(prompts, rows, tokens, mask)
        whole = torch.cat([prompts.tokens[rows], tokens * mask], dim=-1).to(self.device)
        return self._read(*left_pad(whole, torch.cat([prompts.mask[rows], mask], dim=-1).to(self.device)), {})

    def takes_ragged(self, prompts: Prompts) -> bool:
        return not prompts.inputs  # an image token in a completion is no image, so prompts with pixels are read alone

    def recomputing(self) -> AbstractContextManager[None]:
        return super().recomputing() if self._light is None else self._light.recomputing()

    def room(self, max_new_tokens: int) -> int | None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = None if limit is None else limit - max_new_tokens
        if room is not None and room < 1:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}, but the model has a context of {limit} tokens; lower max_new_tokens"
            )
        return room

    def _read(self, tokens: Tensor, mask: Tensor, inputs: dict[str, Tensor]) -> Prefix:
        light = self._light if self._split is not None and not inputs else None
        begin = 0 if light is None else _common(tokens, mask)
        cache = light.open(1 if begin else len(tokens)) if light is not None else None
        if cache is not None and begin:
            return self._read_apart(tokens, mask, begin, cache)
        memory = Memory(DynamicCache(config=self.model.config) if cache is None else cache)
        return Prefix(memory, mask, self.features(tokens, mask, memory, **inputs)[:, -1])

    def _read_apart(self, tokens: Tensor, mask: Tensor, begin: int, cache: SharedCache) -> Prefix:
        """Read the `begin` tokens that all rows begin with once, and then what each goes on with."""
        tokens, mask = right_pad(tokens, mask)
        self.features(tokens[:1, :begin], mask[:1, :begin], Memory(cache))
        every = cache.rows(torch.zeros(len(tokens), dtype=torch.long, device=tokens.device))
        rest, real = left_pad(tokens[:, begin:], mask[:, begin:])
        seen = torch.cat([mask[:, :begin], real], dim=-1)
        last = self.features(rest, seen, Memory(every))[:, -1]
        return Prefix(Memory(every.as_prompts()), seen, last)

    def _inputs(self, prompts: Prompts, width: int) -> dict[str, Tensor]:
        """What goes in beside the tokens, for all prompts together."""
        found = {}
        for name, parts in prompts.inputs.items():
            if name not in self._accepts:  # a processor says more than its model asks
                continue
            if name.endswith(BY_TOKEN):
                found[name] = torch.stack([nn.functional.pad(part[0], (width - part.shape[1], 0)) for part in parts])
            elif any(len(part) for part in parts):
                found[name] = joined(parts)
        return to_device(found, self.model)


def _common(tokens: Int[Tensor, "P L"], mask: Bool[Tensor, "P L"]) -> int:
    """How many tokens all rows begin with, such as a system prompt or examples, each row's last one apart; 0 if it is not worth it."""
    spared = SPARED.get(tokens.device.type, SPARED["other"])
    if (len(tokens) - 1) * tokens.shape[1] < spared:
        return 0
    tokens, mask = right_pad(tokens, mask)
    shortest = int(mask.sum(-1).min())
    same = (tokens[:, : shortest - 1] == tokens[:1, : shortest - 1]).all(0)
    begin = int(same.int().cumprod(0).sum())
    return begin if (len(tokens) - 1) * begin >= spared else 0
