"""The sizes of a small model, and the models of these sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from tiltlm.errors import InputError, at_least_one


@dataclass(frozen=True)
class Size:
    """Sizes of a transformer.

    Attributes:
        width: of the hidden states.
        layers: of the decoder, and of the encoder where it is trained.
        heads: of attention; they divide the width.
        feedforward: width between the two matrices after attention.
        dropout: while training.
    """

    width: int = 192
    layers: int = 2
    heads: int = 6
    feedforward: int = 512
    dropout: float = 0.1

    def __post_init__(self) -> None:
        at_least_one(self, "width", "layers", "heads", "feedforward")
        if self.width % self.heads:
            raise InputError(f"heads is {self.heads} and width {self.width}; take heads that divide the width")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; it must be at least 0 and below 1, for example 0.1")


def make_translator(size: Size, tokenizer: PreTrainedTokenizerBase, longest: int, seed: int) -> PreTrainedModel:
    """A Marian (Junczys-Dowmunt et al. 2018) at random weights, its embeddings shared by source, target and head.

    Marian, because with little time it learns to translate where T5 and Pegasus, which normalise before each layer, do not yet.
    Weights begin with variance 1 / width (Vaswani et al. 2017: embeddings of unit variance beside the positions once they are
    scaled, and as Glorot and Bengio 2010 for square matrices). The configuration's 0.02 is for widths of thousands: with it
    a translator of this size came to look at its source late, and once not at all (LAB.md).

    Args:
        longest: positions of source and of target; a longer text has none.
    """
    pad, eos = _id(tokenizer.pad_token_id), _id(tokenizer.eos_token_id)
    config = cast(
        "Any", MarianConfig
    )(
        vocab_size=len(tokenizer),
        d_model=size.width,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=size.feedforward,
        decoder_ffn_dim=size.feedforward,
        dropout=size.dropout,
        scale_embedding=True,
        init_std=size.width**-0.5,
        max_position_embeddings=longest,
        pad_token_id=pad,
        eos_token_id=eos,
        decoder_start_token_id=pad,
        forced_eos_token_id=None,
        attn_implementation="eager",  # on a CPU the fused kernel's backward pass takes longer than all matrix products together
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MarianMTModel(config)


def make_captioner(
    size: Size, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int, seed: int
) -> PreTrainedModel:
    """A GPT-2 at random weights that attends to an image encoder's patches; the encoder is frozen.

    Args:
        longest: most tokens of a caption, its end included.
    """
    pad, eos = _id(tokenizer.pad_token_id), _id(tokenizer.eos_token_id)
    decoder = cast("Any", GPT2Config)(
        vocab_size=len(tokenizer),
        n_positions=longest,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        n_inner=size.feedforward,
        resid_pdrop=size.dropout,
        embd_pdrop=size.dropout,
        attn_pdrop=size.dropout,
        bos_token_id=pad,
        eos_token_id=eos,
        pad_token_id=pad,
        is_decoder=True,
        add_cross_attention=True,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder.config, decoder, decoder_start_token_id=pad, pad_token_id=pad, eos_token_id=eos
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionEncoderDecoderModel(config, encoder=encoder, decoder=GPT2LMHeadModel(decoder))
    known = cast("Any", model).generation_config
    known.decoder_start_token_id, known.bos_token_id, known.pad_token_id, known.eos_token_id = pad, pad, pad, eos
    encoder.requires_grad_(False)
    return model


def _id(token: Any) -> int:
    assert isinstance(token, int), "the tokenizer has a padding and an end token"
    return token
