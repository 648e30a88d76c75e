"""Small models of every kind at random weights, each with the tokenizer and the processor that it needs."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

import tiltlm as tl

PIXELS = 8
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for p in m['content'] %}{% if p['type'] == 'image' %}<image> {% else %}"
    "{{ p['text'] }} {% endif %}{% endfor %}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def words(*more, end=True):
    """A tokenizer of whole words: <pad> </s> and then a, b, c or the like; it ends every text with </s>, as T5's does."""
    names = ["<pad>", "</s>", *more]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[2]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([name for name in names if name.startswith("<")])
    if end:
        inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def text_model(kind, vocab=4, seed=0, positions=16):
    """An encoder–decoder of texts in double precision, with logits far from uniform."""
    torch.manual_seed(seed)
    ids = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 1}
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": positions}
    if kind in ("t5", "t5-untied"):
        size = {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "initializer_factor": 2.0 if kind == "t5" else 0.7,
        }
        tied = kind == "t5"
        config = T5Config(**ids, **size, decoder_start_token_id=0, tie_word_embeddings=tied)
        model = T5ForConditionalGeneration(config)
    elif kind == "bart":
        config = BartConfig(**ids, **sizes, **heads, bos_token_id=2, decoder_start_token_id=1, init_std=0.7)
        model = BartForConditionalGeneration(config)
        model.final_logits_bias.copy_(torch.linspace(-1, 1, vocab)[None])
        model.generation_config.forced_bos_token_id = 2
    else:
        config = MarianConfig(**ids, **sizes, **heads, decoder_start_token_id=0, forced_eos_token_id=1, init_std=0.7)
        model = MarianMTModel(config)
        model.generation_config.bad_words_ids = [[0]]
    return model.double().eval()


def image_model(kind, vocab=4, seed=0):
    """A vision encoder–decoder in double precision."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.5}
    vit = ViTModel(ViTConfig(hidden_size=16, image_size=PIXELS, patch_size=4, **sizes), add_pooling_layer=False)
    crossed = {"is_decoder": True, "add_cross_attention": True, "vocab_size": vocab}
    if kind == "vit-gpt2":  # of another width, so that the encoder's states are projected
        sized = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.5}
        decoder = GPT2LMHeadModel(GPT2Config(**sized, **crossed, bos_token_id=0, eos_token_id=1))
    else:
        decoder = BertLMHeadModel(BertConfig(hidden_size=16, max_position_embeddings=16, **sizes, **crossed))
    model = VisionEncoderDecoderModel(encoder=vit, decoder=decoder)
    model.generation_config.decoder_start_token_id = 0
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    return model.double().eval()


def llava(seed=0):
    """A vision-language chat model in double precision, and its processor."""
    torch.manual_seed(seed)
    tokenizer = words("a", "b", "c", "<image>", "user", "assistant", end=False)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=PIXELS, patch_size=4, initializer_factor=3.0, **sizes),
        text_config=LlamaConfig(
            vocab_size=8, eos_token_id=1, max_position_embeddings=32, initializer_range=0.5, **sizes
        ),
        image_token_id=5,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    square = {"height": PIXELS, "width": PIXELS}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=square),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    return LlavaForConditionalGeneration(config).double().eval(), processor


def idefics():
    """SmolVLM's class: padded images with a mask of their own, and any number of them in a prompt."""
    torch.manual_seed(0)
    marks = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    side = {"longest_edge": 2 * PIXELS}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    processor = Idefics3Processor(images, words("a", "b", *marks, end=False), image_seq_len=4)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
    text = {"model_type": "llama", "vocab_size": 8, "eos_token_id": 1, "pad_token_id": 0}
    config = Idefics3Config(
        vision_config={"image_size": 2 * PIXELS, "patch_size": 4, **sizes},
        text_config={**text, "max_position_embeddings": 64, "initializer_range": 0.5, **sizes},
        scale_factor=2,
        image_token_id=processor.image_token_id,
    )
    return Idefics3ForConditionalGeneration(config).double().eval(), processor


def picture(seed, size=PIXELS):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def vit_processor():
    return ViTImageProcessorPil(size={"height": PIXELS, "width": PIXELS})


KINDS = ("t5", "t5-untied", "bart", "marian", "vit-gpt2", "vit-bert", "llava")


def small(kind, **law):
    """A prior of three new tokens and its three prompts."""
    if kind == "llava":
        model, processor = llava()
        lm = tl.load(model, processor.tokenizer, processor=processor)
        texts = ["a b", "<image> c", [{"role": "user", "content": "a"}]]
        images = [picture(1), picture(2), picture(3)]
        data = [{"prompt": text, "image": image} for text, image in zip(texts, images, strict=True)]
    elif kind.startswith("vit"):
        lm = tl.load(image_model(kind), words("a", "b"), processor=vit_processor())
        data = [{"image": picture(seed)} for seed in range(3)]
    else:
        lm = tl.load(text_model(kind), words("a", "b"))
        data = ["a", "b a b a", "b b"]
    prior = lm.prior(**{"max_new_tokens": 3} | law)
    return prior, prior.encode(data)


def every(vocab, length, eos=1):
    """Every completion of at most `length` tokens."""
    inner = [token for token in range(vocab) if token != eos]
    short = [(*p, eos) for n in range(length) for p in itertools.product(inner, repeat=n)]
    return [*short, *itertools.product(inner, repeat=length)]
