"""Small real models: architectures at random weights, with a real tokenizer, in milliseconds."""

from __future__ import annotations

import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CORPUS = ["the film was good and the film was bad", "a quiet story of two friends who meet again", "<user><assistant>"]


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on three lines; it adds a BOS to raw text, as Llama's does."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(kind: str, vocab: int = 300, seed: int = 0):
    """A two-layer model of a real architecture, with logits far from uniform."""
    torch.manual_seed(seed)
    common = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=128, **common))
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        model = {
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **common)),
            "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, **common)),
        }[kind]()
    return model.eval()


@pytest.fixture(params=["llama", "gpt2", "qwen"])
def any_model(request):
    return make_model(request.param)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def llama():
    return make_model("llama")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def tuples(count: int, length: int):
    return list(itertools.product(range(count), repeat=length))


def pytest_terminal_summary(terminalreporter):
    """Show the coverage that the statistical tests measured, not only that they passed."""
    lines = [
        f"  {name.removeprefix('coverage_')}: {share:.1%}"
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for name, share in report.user_properties
        if name.startswith("coverage_")
    ]
    if lines:
        terminalreporter.write_line("coverage of 95% intervals on languages whose truth is known:")
        for line in lines:
            terminalreporter.write_line(line)
