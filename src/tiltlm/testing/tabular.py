"""Tiny languages as ordinary models: every next-token logit is an entry of a table.

A `TabularLM` is a `PreTrainedModel` like any other, with a tokenizer, a cache and trainable weights, so every
function of TiltLM (and of other libraries) runs on it unchanged, while all of its completions can be listed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

Logit = Callable[[tuple[int, ...], tuple[int, ...]], Sequence[float]]
"""(prompt, prefix) -> the logits of the next token."""


class TabularConfig(PreTrainedConfig):
    """Configuration of a `TabularLM`.

    Args:
        vocab_size: tokens; every token may appear in prompts and completions.
        depth: longest completion that the table knows.
        prompt_length: tokens of a prompt; each of the vocab_size ** prompt_length prompts has its own table.
        eos_token_id: the token that ends a completion, or None for completions of fixed length.
    """

    model_type = "tiltlm-tabular"

    def __init__(
        self,
        vocab_size: int = 3,
        depth: int = 4,
        prompt_length: int = 1,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.depth, self.prompt_length = vocab_size, depth, prompt_length
        self.max_position_embeddings = prompt_length + depth
        self.num_hidden_layers, self.hidden_size = 1, 1
        super().__init__(**{"eos_token_id": eos_token_id, "tie_word_embeddings": False} | kwargs)

    @property
    def prefixes(self) -> int:
        """Prefixes of length 0 to depth - 1."""
        return sum(self.vocab_size**length for length in range(self.depth))


class TabularLM(PreTrainedModel, GenerationMixin):
    """A language model whose logits are a table over (prompt, prefix); the table is its only weight.

    The completion's prefix of length l with tokens h has the index sum_{m<l} V^m + (h as a number in base V).
    The cache holds the token ids seen so far, so that rows can be selected and repeated as in any model.
    """

    config_class = TabularConfig
    config: TabularConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        tables = config.vocab_size**config.prompt_length
        self.table = nn.Parameter(torch.zeros(tables, config.prefixes, config.vocab_size, dtype=torch.float64))
        self.post_init()

    @classmethod
    def from_function(cls, logits: Logit, **config: Any) -> TabularLM:
        """Fill the table from a function of (prompt, prefix)."""
        model = cls(TabularConfig(**config))
        c = model.config
        tokens = range(c.vocab_size)
        with torch.no_grad():
            for number, prompt in enumerate(itertools.product(tokens, repeat=c.prompt_length)):
                prefixes = itertools.chain.from_iterable(itertools.product(tokens, repeat=n) for n in range(c.depth))
                for row, prefix in enumerate(prefixes):
                    model.table[number, row] = torch.tensor(list(logits(prompt, prefix)), dtype=torch.float64)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """The table is filled by whoever made the model."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits after each of `input_ids`; padding is wherever `attention_mask` is 0, on either side."""
        config, count = self.config, input_ids.shape[1]
        seen = input_ids
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None:
            as_keys = input_ids.double()[:, None, :, None]
            seen = past_key_values.update(as_keys, as_keys, 0)[0][:, 0, :, 0].long()
        mask = torch.ones_like(seen) if attention_mask is None else attention_mask[:, : seen.shape[1]].long()
        length = torch.zeros(len(seen), dtype=torch.long, device=seen.device)
        prompt, code = torch.zeros_like(length), torch.zeros_like(length)
        rows, valid = [], []
        for column in range(seen.shape[1]):
            token, real = seen[:, column], mask[:, column] > 0
            in_prompt = real & (length < config.prompt_length)
            in_completion = real & (length >= config.prompt_length)
            prompt = torch.where(in_prompt, prompt * config.vocab_size + token, prompt)
            code = torch.where(in_completion, code * config.vocab_size + token, code)
            length = length + real.long()
            done = length - config.prompt_length
            known = (done >= 0) & (done < config.depth)
            offset = (config.vocab_size ** done.clamp(min=0) - 1) // max(1, config.vocab_size - 1)
            rows.append(torch.where(known, offset + code, 0))
            valid.append(known)
        keep = slice(-count, None)
        index, known = torch.stack(rows, -1)[:, keep], torch.stack(valid, -1)[:, keep]
        logits = self.table[prompt[:, None].expand_as(index), index]
        logits = torch.where(known[..., None], logits, torch.zeros_like(logits))
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,  # pyright: ignore[reportArgumentType]
            past_key_values=past_key_values,
        )

    def get_output_embeddings(self) -> None:
        """There is no matrix behind the logits."""
        return

    def get_input_embeddings(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """There are no embeddings."""
        return


def tabular_tokenizer(vocab_size: int, eos: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer for tabular models: token i is written as the number i, with spaces between; EOS as </s>."""
    words = {str(i): i for i in range(vocab_size)}
    if eos is not None:
        del words[str(eos)]
        words["</s>"] = eos
    inner = Tokenizer(models.WordLevel(words, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"eos_token": "</s>"} if eos is not None else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


AutoConfig.register(TabularConfig.model_type, TabularConfig)
AutoModelForCausalLM.register(TabularConfig, TabularLM)
