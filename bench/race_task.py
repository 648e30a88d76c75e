"""The task of the race: a small trained transformer whose completions can be listed, and two rewards on them.

Both sides import this file; it needs torch and transformers only. The prior is a two-layer Llama, trained on the strings of
a Markov chain. A completion has at most five of five letters, so that each of the four prompts has 3,906 of them and every
divergence can be computed instead of estimated.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = 5
EOS = LETTERS
VOCABULARY = LETTERS + 1
LONGEST = 5
PROMPTS = ("a", "b", "c", "d")
NAMES = "abcde"


def reachable(ids: list[int]) -> float:
    """What the prior's own features can say: which letters and which neighbours, wherever they are."""
    letters = [i for i in ids if i < LETTERS]
    taste = sum((0.5, -0.4, 0.7, -0.2, -0.6)[i] for i in letters)
    neighbours = sum(0.4 * math.cos(1 + 2 * a + 3 * b) for a, b in itertools.pairwise(letters))
    return taste + neighbours


def by_position(ids: list[int]) -> float:
    """What the prior never needed: a checksum of letters and places, and a liking for length."""
    letters = [i for i in ids if i < LETTERS]
    return math.cos(sum(t * (i + 1) for t, i in enumerate(letters, 1))) + 0.3 * len(letters)


REWARDS: dict[str, Callable[[list[int]], float]] = {"reachable": reachable, "by-position": by_position}
BETA = {"reachable": 0.5, "by-position": 0.28}


def reward_function(name: str) -> Callable[..., list[float]]:
    """The reward as both sides call it. A completion that was cut has no EOS; TRL pads nothing into `completion_ids`."""
    reward = REWARDS[name]

    def score(completion_ids: list[list[int]], **columns: object) -> list[float]:
        return [reward(list(ids)) for ids in completion_ids]

    return score


def tokenizer() -> PreTrainedTokenizerFast:
    """Letters with spaces between; the prompt is a letter."""
    words = {letter: i for i, letter in enumerate(NAMES)} | {"</s>": EOS}
    inner = Tokenizer(models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>", padding_side="left")


def build(folder: Path, seed: int = 0, steps: int = 800) -> Path:
    """Train the prior by maximum likelihood on the chain's strings and save it, unless it is there."""
    if (folder / "done").is_file():
        return folder
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    chain = (1.5 * torch.randn(VOCABULARY, VOCABULARY)).softmax(-1)
    chain[:, EOS] = chain[:, :LETTERS].sum(-1) / 4
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        ids = _strings(chain, 128)
        labels = torch.where(_after_eos(ids), -100, ids)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "done").write_text(f"{loss.item():.4f}\n")
    return folder


def _strings(chain: torch.Tensor, count: int) -> torch.Tensor:
    ids = torch.randint(LETTERS, (count, 1))
    for _ in range(LONGEST + 1):
        ids = torch.cat([ids, torch.multinomial(chain[ids[:, -1]], 1)], dim=-1)
    return ids


def _after_eos(ids: torch.Tensor) -> torch.Tensor:
    return ((ids == EOS).cumsum(-1) - (ids == EOS).long()) > 0
