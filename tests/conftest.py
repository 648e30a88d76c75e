"""Small real models: architectures at random weights, with a real tokenizer, in milliseconds."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tiltlm as tl
from tiltlm.cli.main import run

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CORPUS = ["the film was good and the film was bad", "a quiet story of two friends who meet again", "<user><assistant>"]


def engine_id(engine) -> str:
    """An engine's repr without addresses: the same in every process, as pytest-xdist wants the names of tests."""
    return re.sub(r"<function ([\w.]+) at 0x[0-9a-f]+>", r"\1", str(engine))


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on three lines; it adds a BOS to raw text, as Llama's does."""
    inner = Tokenizer(BPE())
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


# --- the command line ---

REWARDS = '''
import math


def good(completions):
    """In [0, 1], and different for most completions."""
    return [len(set(c)) % 8 / 8 for c in completions]


def odd(text):
    return len(text) % 2 == 1


def bad(value):
    return lambda completions: [value if odd(c) else 0.5 for c in completions]


none, nan, plus, minus, outside, text = bad(None), bad(math.nan), bad(math.inf), bad(-math.inf), bad(7.0), bad("seven")


def raises(completions):
    return [1 / 0 if odd(c) else 0.5 for c in completions]


def nothing(completions):
    return None


def short(completions):
    return [0.5]


def tensor(completions):
    import torch

    return torch.zeros(len(completions))


def never(completions):
    return [None] * len(completions)


def constant(completions):
    return [0.5] * len(completions)


def answered(completions, answer):
    return [float(a in c) for a, c in zip(answer, completions)]


def conversation(prompts, completions):
    assert all(p[-1]["role"] == "user" for p in prompts)
    assert all(m["role"] == "assistant" for c in completions for m in c)
    return [len(c[0]["content"]) % 5 / 5 for c in completions]


not_a_function = 3
'''


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("error:")]


@pytest.fixture
def cli(capsys, monkeypatch):
    """Call the entry point as the shell does; its exit code and what it wrote."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tiltlm", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=tl.TiltWarning)
            with pytest.raises(SystemExit) as end:
                run()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Ended(end.value.code, out, err)

    return call


@pytest.fixture
def refused(cli):
    """Call with something bad in it: one sentence on stderr, exit code 2. Returns the sentence."""

    def call(*arguments):
        ended = cli(*arguments)
        assert ended.code == 2, ended
        assert len(ended.errors) == 1, ended.err
        assert ended.err.splitlines()[-1] == ended.errors[0]
        assert ended.out == ""
        return ended.errors[0]

    return call


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of small models: one with a chat template, one without, one with pad = EOS, one with other weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in {"chat": 0, "base": 0, "padded": 0, "other": 1}.items():
        make_model("llama", seed=seed).save_pretrained(folder / name)
        tokenizer = make_tokenizer(chat=name != "base")
        if name == "padded":
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, models):
    """A working folder with prompts, rewards and a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("the film\na quiet story\ntwo friends\n")
    (tmp_path / "rewards.py").write_text(REWARDS)
    write(tmp_path / "recipe.yaml", settings(models))
    return tmp_path


def settings(models, **changes):
    return {
        "model": str(models / "chat"),
        "prompts": "prompts.txt",
        "reward": "rewards.py:good",
        "beta": 0.25,
        "bounds": [0, 1],
        "max_new_tokens": 6,
        "samples": 16,
        "exact_budget": 32,
        "steps": 3,
        "group": 3,
        "batch": 2,
        "lora_r": 2,
        "out": "run",
        **changes,
    }


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


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
