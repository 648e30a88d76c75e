"""The part of a reward model below its heads: a text to one vector of features, by a causal LM or a BERT-like encoder.

The features are the model's last hidden states, pooled: the last token's for a causal LM, which alone has seen the whole text, the
mean over tokens for an encoder. What of the model is trained is an `Adaptation`: nothing, low-rank adapters, or its top layers.
Several trunks with weights of their own may share one copy of the base.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiltlm.errors import InputError, TiltWarning
from tiltlm.lm.adapters import PEFT_PREFIX, AdapterSwitch, LoRA
from tiltlm.lm.batching import padded
from tiltlm.lm.layers import TopLayers, layers_of, top_parameters
from tiltlm.lm.pooled import PooledModel, load_pooled
from tiltlm.records import Text

Answer = tuple[Text, str]
"""A prompt and what was answered."""
RECENT = 4096
"""Texts whose features a trunk remembers, unless it is told another number."""


Adaptation = LoRA | TopLayers | None
"""What of a trunk is trained; None trains heads only."""


@dataclass(eq=False)
class _Base:
    """One copy of a model, and whose weights are in it at the moment."""

    body: PooledModel
    max_tokens: int
    switch: AdapterSwitch
    adaptation: Adaptation = None
    live: dict[str, nn.Parameter] = field(default_factory=dict)
    original: dict[str, Tensor] = field(default_factory=dict)
    inside: Mapping[str, Tensor] | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.body.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.body.tokenizer

    @property
    def name(self) -> str:
        return self.body.name

    def prepare(self, adaptation: LoRA | TopLayers) -> None:
        """Make the weights of an adaptation, once."""
        if self.adaptation == adaptation:
            return
        if self.adaptation is not None:
            raise InputError(
                f"this trunk's base is adapted as {self.adaptation} already; load the model anew to adapt it as {adaptation}"
            )
        if isinstance(adaptation, LoRA):
            adapter = self.switch.new(adaptation, self.name, 0)
            self.switch.train(adapter)
            self.switch.activate(adapter)
            self.live = dict(self.switch.parameters(adapter))
        else:
            self.live = top_parameters(self.model, adaptation.count)
            for weight in self.live.values():
                weight.requires_grad_(True)
        self.adaptation = adaptation
        self.original = {name: value.detach().clone() for name, value in self.live.items()}
        if isinstance(adaptation, LoRA):  # off is an adapter whose second factor is zero
            self.original |= {n: torch.zeros_like(v) for n, v in self.original.items() if "lora_B" in n}

    def fresh(self, seed: int) -> dict[str, Tensor]:
        """An adaptation's first weights: of a LoRA, its own random ones; of layers, the model's."""
        if not isinstance(self.adaptation, LoRA):
            return {name: value.clone() for name, value in self.original.items()}
        adapter = self.switch.names[-1]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for module in self.model.modules():
                if isinstance(module, LoraLayer) and adapter in module.lora_A:
                    module.reset_lora_parameters(adapter, True)
        self.inside = {}
        return {name: value.detach().clone() for name, value in self.live.items()}

    def put(self, weights: Mapping[str, Tensor] | None) -> None:
        """Have these weights in the model; None for the base's own."""
        if not self.live or weights is self.inside:
            return
        with torch.no_grad():
            for name, value in self.live.items():
                value.copy_((weights or self.original)[name])
        self.inside = weights


@dataclass(frozen=True, eq=False)
class Trunk:
    """Features of texts, by a base with weights of its own on it.

    Attributes:
        weights: of the adaptation, by name; None for the base as it is.
        remember: the most texts whose features are kept; those used longest ago go first.
    """

    base: _Base
    weights: Mapping[str, Tensor] | None = None
    remember: int = RECENT
    recent: OrderedDict[str, Tensor] = field(default_factory=OrderedDict, repr=False)

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def width(self) -> int:
        """D, the dimension of the features."""
        return int(self.base.model.config.get_text_config().hidden_size)

    @property
    def layers(self) -> int:
        """How many layers there are to unfreeze."""
        return len(layers_of(self.base.model))

    def settings(self) -> dict[str, Any]:
        """What `load_trunk` needs to make the base again, and to know that it is the same."""
        base = self.base
        return {
            "model": base.name,
            "pooling": base.body.pooling,
            "max_tokens": base.max_tokens,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Identifies the frozen base, by its configuration and a little of every weight that is not trained."""
        base, digest = self.base, hashlib.sha256()
        live = {id(value) for value in base.live.values()}
        for name, value in base.model.named_parameters():
            if "lora_" not in name and id(value) not in live:
                digest.update(str(tuple(value.shape)).encode())
                digest.update(value.detach().flatten()[:16].float().cpu().numpy().tobytes())
        if isinstance(base.adaptation, TopLayers):
            digest.update(str(base.adaptation).encode())
        return digest.hexdigest()[:16]

    def adapted(self, adaptation: LoRA | TopLayers, seed: int) -> Trunk:
        """A trunk on the same base with new weights to train; before training its features are the base's."""
        self.base.prepare(adaptation)
        return Trunk(self.base, self.base.fresh(seed), self.remember)

    def with_weights(self, adaptation: LoRA | TopLayers, weights: Mapping[str, Tensor]) -> Trunk:
        """A trunk on the same base with weights that were trained before.

        Raises:
            InputError: if they do not fit the adaptation.
        """
        self.base.prepare(adaptation)
        if {n: v.shape for n, v in weights.items()} != {n: v.shape for n, v in self.base.live.items()}:
            raise InputError(
                f"the saved weights do not fit {adaptation} on {self.name}; load them on the model they were trained on"
            )
        return Trunk(self.base, dict(weights), self.remember)

    def save_adapter(self, folder: Path) -> None:
        """Write a LoRA's weights in PEFT's format, for the model without its head: `AutoModel` and `PeftModel` load them."""
        self.base.put(self.weights)
        self.base.switch.save(self.base.switch.names[-1], folder, task="FEATURE_EXTRACTION")

    @staticmethod
    def read_adapter(folder: Path) -> dict[str, Tensor]:
        """The weights that `save_adapter` wrote, for `with_weights`."""
        saved = load_file(folder / "adapter_model.safetensors")
        return {name.removeprefix(PEFT_PREFIX): value for name, value in saved.items()}

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The adaptation's live weights, set to this trunk's."""
        self.base.put(self.weights)
        return self.base.live

    def trained(self) -> Trunk:
        """This trunk with what the live weights have become."""
        weights = {name: value.detach().clone() for name, value in self.base.live.items()}
        self.base.inside = weights
        return replace(self, weights=weights, recent=OrderedDict())

    def texts(self, answers: Sequence[Answer]) -> list[str]:
        """Each prompt and answer as one text: as the chat template writes it, or one after the other."""
        return [self._text(prompt, completion) for prompt, completion in answers]

    def features(
        self, answers: Sequence[Answer], *, rows: int = 32, progress: Callable[[int], None] | None = None
    ) -> Float[Tensor, "B D"]:
        """Features of each answer, in single precision on the CPU, without gradient. Recent texts are not run again."""
        texts = self.texts(answers)
        new = list(dict.fromkeys(text for text in texts if text not in self.recent))
        found: dict[str, Tensor] = {text: self.recent[text] for text in texts if text in self.recent}
        self.base.put(self.weights)
        found.update(zip(new, self.base.body.vectors(self.tokens(new), rows, progress), strict=True))
        for text in texts:
            self.recent[text] = found[text]
            self.recent.move_to_end(text)
        while len(self.recent) > self.remember:
            self.recent.popitem(last=False)
        return torch.stack([found[text] for text in texts]) if texts else torch.zeros(0, self.width)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; of one that is too long, the end, where the answer is.

        Warns:
            TiltWarning: how many texts lost their beginning.
        """
        tokenizer, limit = cast(Any, self.base.tokenizer), self.base.max_tokens
        if not texts:
            return []
        first = str(tokenizer.bos_token) if tokenizer.chat_template is not None and tokenizer.bos_token else None
        marks = [first is None or not text.startswith(first) for text in texts]  # a template writes its own BOS
        ids = [
            list(tokenizer(text, add_special_tokens=mark)["input_ids"]) for text, mark in zip(texts, marks, strict=True)
        ]
        long = sum(len(some) > limit for some in ids)
        if long:
            warnings.warn(
                f"{long} of {len(texts)} texts are longer than max_tokens = {limit} and lost their beginning; raise it if that "
                f"matters, as far as the model's context allows",
                TiltWarning,
                stacklevel=3,
            )
        opening = _opening(tokenizer)
        return [some if len(some) <= limit else [*some[:opening], *some[len(some) - limit + opening :]] for some in ids]

    def pooled(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "B D"]:
        """Pooled hidden states of texts as ids; carries gradient to the live weights."""
        return self.base.body.pooled(*padded(ids, 0))

    def _text(self, prompt: Text, completion: str) -> str:
        tokenizer = cast(Any, self.base.tokenizer)
        if isinstance(prompt, str):
            text = prompt + completion
        else:
            messages = [*(dict(m) for m in prompt), {"role": "assistant", "content": completion}]
            if tokenizer.chat_template is not None:
                text = str(tokenizer.apply_chat_template(messages, tokenize=False)).rstrip()
            else:
                text = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
        end = tokenizer.eos_token
        if self.base.body.pooling == "last" and end and not text.endswith(end):
            text += end  # the token that is read must not be one of the answer's own
        if not text.strip():
            raise InputError("an answer and its prompt are both empty; leave such rows out")
        return text


def load_trunk(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    pooling: str = "auto",
    max_tokens: int = 512,
    dtype: str = "auto",
    device: str = "auto",
    name: str | None = None,
    remember: int = RECENT,
) -> Trunk:
    """A trunk from a hub id, a folder, an embedded model, or a model in memory (which is taken over and frozen).

    Args:
        model: "smollm2-135m-instruct" and "all-minilm-l6-v2" ship inside packages.
        tokenizer: needed with a model in memory.
        pooling: "mean", "first", "last"; "auto" takes what a folder of sentence-transformers says, else the last token's state of
            a causal LM and the mean of an encoder.
        max_tokens: of a text; of a longer one the end is read. At most the model's context.
        name: what to load a model in memory from, later.
        remember: the most texts whose features are kept in memory; several rewards on one set of draws want them all.

    Raises:
        InputError: if there is nothing to load under that name, or it is of another kind.
    """
    if max_tokens < 8:
        raise InputError(f"max_tokens is {max_tokens}; a text needs at least 8")
    if remember < 0:
        raise InputError(f"remember is {remember}; give a number of texts, or 0 to keep none")
    how: Any = None if pooling == "auto" else pooling
    body = load_pooled(model, tokenizer, pooling=how, dtype=dtype, device=device, name=name)
    limit = max_tokens if body.longest is None else min(max_tokens, body.longest)
    switch = AdapterSwitch.of(body.model)
    switch.freeze()
    return Trunk(_Base(body, limit, switch), remember=remember)


def _opening(tokenizer: Any) -> int:
    """How many tokens the tokenizer puts before every text."""
    bare, marked = (list(tokenizer("a", add_special_tokens=mark)["input_ids"]) for mark in (False, True))
    return next((i for i in range(len(marked)) if marked[i : i + len(bare)] == bare), 0)


__all__ = ["Adaptation", "Answer", "TopLayers", "Trunk", "load_trunk"]
