"""The kinds of language models: which class of transformers loads one, and what runs it here."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    PreTrainedModel,
    VisionEncoderDecoderModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from tiltlm.errors import InputError
from tiltlm.lm.backbone import Backbone
from tiltlm.lm.causal import CausalBackbone
from tiltlm.lm.encoder_decoder import COMPOSED, EncoderDecoderBackbone


def class_of(source: str) -> Any:
    """transformers' class for the model in a folder or on the hub; the causal one where its configuration cannot be read."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return AutoModelForCausalLM  # which says better what is wrong
    kind = type(config)
    if config.is_encoder_decoder and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    sees = hasattr(config, "vision_config") or kind is VisionEncoderDecoderModel.config_class
    return (
        AutoModelForImageTextToText if sees and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM
    )


def backbone_of(model: PreTrainedModel) -> Backbone:
    """What runs a model.

    Raises:
        InputError: for a model that conditions on its images, or on sound, in a way that is not provided for.
    """
    accepts = inspect.signature(model.forward).parameters
    name = type(model).__name__
    if isinstance(model, COMPOSED) or model.config.is_encoder_decoder:
        if not isinstance(model, COMPOSED) and {"pixel_values", "input_features", "input_values"} & set(accepts):
            raise InputError(
                f"{name} is an encoder–decoder that reads more than a text; use one that reads a text (T5, BART, Marian), or a "
                f"VisionEncoderDecoderModel"
            )
        return EncoderDecoderBackbone(model)
    if "pixel_values" in accepts:
        body = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
        if "past_key_values" not in accepts or "cross_attention_mask" in accepts or hasattr(body, "get_rope_index"):
            raise InputError(
                f"{name} reads images by cross-attention, or counts positions in several dimensions, which is not provided for; "
                f"use a model whose images are tokens of the prompt (LLaVA, SmolVLM, Gemma 3), or a VisionEncoderDecoderModel"
            )
    return CausalBackbone(model)


def processor_of(model: PreTrainedModel, source: str) -> Any:
    """What reads images for a loaded model, from its folder; None for a model of texts, or where the folder has none."""
    if not reads_images(model):
        return None
    kind = AutoImageProcessor if isinstance(model, VisionEncoderDecoderModel) else AutoProcessor
    try:
        return kind.from_pretrained(source)
    except ImportError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the image processor of {source!r} cannot be loaded ({reason}); pip install 'tiltlm[images]'"
        ) from error
    except (OSError, ValueError, KeyError):
        return None


def reads_images(model: PreTrainedModel) -> bool:
    """Whether images may be in its prompts."""
    return "pixel_values" in inspect.signature(model.forward).parameters
