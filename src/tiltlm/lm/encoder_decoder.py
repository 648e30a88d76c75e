"""Encoder–decoders: the prompt is a source, a text or an image, that an encoder reads once for all of its completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    EncoderDecoderModel,
    PreTrainedModel,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

from tiltlm.errors import InputError
from tiltlm.lm.backbone import Backbone, Memory, Prefix, joined, right_pad, to_device
from tiltlm.lm.head import Head
from tiltlm.records import Prompts

COMPOSED = (EncoderDecoderModel, VisionEncoderDecoderModel)
"""transformers' models that are made of an encoder and a language model with cross-attention."""


class EncoderDecoderBackbone(Backbone):
    """An encoder, and a decoder that begins with the model's start tokens.

    The start tokens (`decoder_start_token_id`, and `forced_bos_token_id` where the generation config has one) are given, and
    are no part of a completion. Tokens that the generation config never generates (`suppress_tokens`, and single tokens among
    `bad_words_ids`: Marian's padding) have probability zero. Its other habits, such as a forced end, are `generate`'s and not
    the model's law.
    """

    has_encoder = True

    def __init__(self, model: PreTrainedModel) -> None:
        self._composed = isinstance(model, COMPOSED)
        self.unread = ("encoder.pooler.",) if self._composed else ()
        self._never: tuple[int, ...] = ()
        self._start = start_tokens(model)
        super().__init__(model)
        self._never = never_generated(model)

    def _find_body(self) -> nn.Module | None:
        if not self._composed:
            return self.model.get_decoder()
        decoder = self.model.decoder
        body = getattr(decoder, decoder.base_model_prefix, None)
        return body if isinstance(body, nn.Module) else None

    def _probe(self) -> tuple[Tensor, Tensor]:
        """The decoder on a made-up source: the split does not touch the encoder."""
        config = self._config
        width = getattr(config, "cross_attention_hidden_size", None) or config.hidden_size
        source = torch.linspace(-1, 1, 3 * width, device=self.device, dtype=self.model.dtype).view(1, 3, width)
        ids = torch.arange(1, 4, device=self.device)[None] % self.vocabulary
        mask = torch.ones_like(ids, dtype=torch.bool)
        memory = Memory(self._cache(), source, mask)
        features = self.features(ids, mask, memory)[0]
        return self._whole(ids, mask, replace(memory, cache=None)).logits[0], features

    @property
    def head(self) -> Head:
        """The map from `features` to logits, with Bart's bias, T5's scale, and what is never generated ruled out."""
        head, bias = super().head, getattr(self.model, "final_logits_bias", None)
        if head.weight is not None and bias is not None:
            head = replace(head, bias=bias[0] if head.bias is None else head.bias + bias[0])
        if head.weight is not None and getattr(self.model.config, "scale_decoder_outputs", False):
            head = replace(head, scale=head.scale * self.model.config.d_model**-0.5)
        if not self._never:
            return head
        ruled_out = torch.zeros(self.vocabulary, device=self.device, dtype=self.model.dtype)
        ruled_out[list(self._never)] = -torch.inf
        return replace(head, bias=ruled_out if head.bias is None else head.bias + ruled_out)

    def prefill(self, prompts: Prompts) -> Prefix:
        """Run the encoder on the prompts, and the decoder on its start tokens."""
        source, source_mask = self._encode(prompts)
        memory = Memory(self._cache(), source, source_mask)
        ids = torch.tensor(self._start, device=self.device).expand(len(prompts), -1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        return Prefix(memory, mask, self.features(ids, mask, memory)[:, -1])

    def room(self, max_new_tokens: int) -> int | None:
        config = self.model.config
        limit = _first(self._config, "max_decoder_position_embeddings", "max_position_embeddings")
        most = None if limit is None else limit - len(self._start) + 1  # the last token is not read
        if most is not None and max_new_tokens > most:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}, but the model's decoder writes at most {most}; lower max_new_tokens"
            )
        source = config.encoder if self._composed else config.get_text_config(encoder=True)
        return _first(source, "max_encoder_position_embeddings", "max_position_embeddings")

    def _encode(self, prompts: Prompts) -> tuple[Float[Tensor, "P S D"], Bool[Tensor, "P S"]]:
        """What the encoder makes of the prompts; sources are padded on the right, where no position is counted from."""
        encoder = self.model.encoder if self._composed else self.model.get_encoder()
        if prompts.inputs:
            inputs = to_device({name: joined(parts) for name, parts in prompts.inputs.items()}, self.model)
            source = encoder(**inputs)[0]
            mask = torch.ones(source.shape[:2], dtype=torch.bool, device=self.device)
        else:
            tokens, mask = right_pad(prompts.tokens.to(self.device), prompts.mask.to(self.device))
            pad = getattr(self.model.config, "pad_token_id", None)
            source = encoder(
                input_ids=tokens.masked_fill(~mask, 0 if pad is None else pad), attention_mask=mask.long()
            )[0]
        project = getattr(self.model, "enc_to_dec_proj", None) if self._composed else None
        return source if project is None else project(source), mask

    def _cache(self) -> EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(config=self._config), DynamicCache())

    def _run(
        self, ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B L"], memory: Memory | None, **inputs: Tensor
    ) -> Float[Tensor, "B S D"]:
        assert memory is not None, "a decoder needs a source"
        split = self._split
        if split is None:
            return self._whole(ids, mask, memory).logits
        assert memory.source_mask is not None
        return split(
            input_ids=ids,
            attention_mask=mask.long(),
            encoder_hidden_states=memory.source,
            encoder_attention_mask=memory.source_mask.long(),
            past_key_values=memory.cache,
            use_cache=True,
        ).last_hidden_state

    def _whole(self, ids: Tensor, mask: Tensor, memory: Memory) -> Any:
        """The model after its encoder, output layer included."""
        assert memory.source_mask is not None
        shared = {"past_key_values": memory.cache, "use_cache": memory.cache is not None}
        if self._composed:
            return self.model.decoder(
                input_ids=ids,
                attention_mask=mask.long(),
                encoder_hidden_states=memory.source,
                encoder_attention_mask=memory.source_mask.long(),
                **shared,
            )
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory.source),  # pyright: ignore[reportArgumentType]
            attention_mask=memory.source_mask.long(),
            decoder_input_ids=ids,
            decoder_attention_mask=mask.long(),
            **shared,
        )


def start_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """What the decoder begins every completion with.

    Raises:
        InputError: if the model does not say.
    """
    places = (model.generation_config, model.config, model.config.get_text_config(decoder=True))
    first = next((v for place in places if (v := getattr(place, "decoder_start_token_id", None)) is not None), None)
    if first is None:
        first = next((v for place in places if (v := getattr(place, "bos_token_id", None)) is not None), None)
    if isinstance(first, list):
        first = first[0] if len(set(first)) == 1 else None
    if first is None:
        raise InputError(
            f"{type(model).__name__} does not say what its decoder begins with; set model.generation_config.decoder_start_token_id"
        )
    forced = next((v for place in places[:2] if (v := getattr(place, "forced_bos_token_id", None)) is not None), None)
    return (first,) if forced is None else (first, forced)


def never_generated(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that the generation config rules out wherever they stand."""
    words = getattr(model.generation_config, "bad_words_ids", None) or []
    single = [word[0] for word in words if len(word) == 1]
    return tuple(dict.fromkeys([*single, *(getattr(model.generation_config, "suppress_tokens", None) or [])]))


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
