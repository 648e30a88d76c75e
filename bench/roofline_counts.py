"""How many operations and bytes a step needs, phase by phase, from the model's config and the step's size.

The least that the arithmetic asks for: prompts once a group, logits only where a token is predicted, weights read once a pass,
attention over the causal half. A multiplication with an addition is two operations. No activation traffic is counted, nor the
operations that are not matrix products (norms, softmax): what they cost shows as a gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ADAM_BYTES = 2 + 3 * 8 + 2
"""A trained bfloat16 number in an update: its gradient read, master and two moments read and written, the weight written."""


@dataclass(frozen=True)
class Model:
    """A Llama-like decoder.

    Attributes:
        width: of the residual stream.
        inner: of the feed-forward layer, which has a gate.
        head: dimension of an attention head.
        bytes: of a weight.
    """

    layers: int
    width: int
    inner: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    bytes: int

    @staticmethod
    def of(config: Any, weight_bytes: int) -> Model:
        """From a config of transformers."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Model(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            head=head,
            vocabulary=config.vocab_size,
            bytes=weight_bytes,
        )

    def linears(self) -> Iterator[tuple[int, int]]:
        """(in, out) of the linear layers of one block."""
        queries, keys = self.heads * self.head, self.groups * self.head
        yield from ((self.width, queries), (self.width, keys), (self.width, keys), (queries, self.width))
        yield from ((self.width, self.inner), (self.width, self.inner), (self.inner, self.width))

    @property
    def block_weights(self) -> int:
        """Weights of all blocks' linear layers."""
        return self.layers * sum(a * b for a, b in self.linears())

    def lora_weights(self, rank: int) -> int:
        """Weights of adapters on all of them."""
        return self.layers * rank * sum(a + b for a, b in self.linears())

    def attention(self, pairs: int) -> int:
        """Operations of scores and sums over `pairs` of a query and a key, all heads and layers."""
        return 4 * pairs * self.heads * self.head * self.layers

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of `tokens`."""
        return 2 * tokens * self.groups * self.head * self.layers * self.bytes


@dataclass(frozen=True)
class Size:
    """A step's size.

    Attributes:
        read: tokens of a prompt.
        tokens: new tokens of a completion.
        rank: LoRA's; 0 where all weights are trained.
        passes: micro-batches of the pass with gradient.
    """

    prompts: int
    read: int
    group: int
    tokens: int
    rank: int
    passes: int = 1

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def fed(self) -> int:
        """Tokens that a scoring pass reads: prompts once, and of completions all but the last."""
        return self.prompts * self.read + self.rows * (self.tokens - 1)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key in a scoring pass."""
        return self.prompts * triangle(self.read) + self.rows * (
            triangle(self.tokens - 1) + self.read * (self.tokens - 1)
        )


def triangle(length: int) -> int:
    """Pairs of a token with itself or one before it."""
    return length * (length + 1) // 2


@dataclass(frozen=True)
class Cost:
    """What a phase needs at least.

    Attributes:
        blocks, head: operations of the blocks' products and of the output layer's, which run at rates of their own.
        other: operations of adapters and attention.
        bytes: to and from memory.
        rows: rows of each product, which its rate depends on.
    """

    blocks: float = 0.0
    head: float = 0.0
    other: float = 0.0
    bytes: float = 0.0
    rows: int = 0

    @property
    def operations(self) -> float:
        return self.blocks + self.head + self.other


def phases(model: Model, size: Size) -> dict[str, Cost]:
    """The phases of a step in their order."""
    block, out = 2 * model.block_weights, 2 * model.width * model.vocabulary
    lora = 2 * model.lora_weights(size.rank)
    weights = (model.block_weights + model.width * model.vocabulary) * model.bytes
    steps, decoded, prompt_tokens = size.tokens - 1, size.rows * (size.tokens - 1), size.prompts * size.read
    attended = size.rows * (triangle(steps) + size.read * steps)
    kept = sum(size.prompts * size.read + size.rows * t for t in range(1, size.tokens))
    scored, attention = size.rows * size.tokens, model.attention(size.pairs)
    logits = size.rows * model.vocabulary * 4
    rows = size.fed // size.passes
    trained = model.lora_weights(size.rank) if size.rank else model.block_weights + model.width * model.vocabulary
    twice = 1 if size.rank else 2  # the weights' own gradient beside that of what goes into them
    return {
        "prefill": Cost(
            block * prompt_tokens,
            out * size.prompts,
            lora * prompt_tokens + model.attention(size.prompts * triangle(size.read)),
            weights,
            prompt_tokens,
        ),
        "decode": Cost(
            block * decoded,
            out * decoded,
            lora * decoded + model.attention(attended),
            weights * steps + model.cache_bytes(kept),
            size.rows,
        ),
        "sampling from logits": Cost(bytes=logits * size.tokens),
        "prior scoring": Cost(block * size.fed, out * scored, attention, weights, size.fed),
        "forward": Cost(block * size.fed, out * scored, lora * size.fed + attention, weights * size.passes, rows),
        "backward": Cost(
            twice * block * size.fed,
            twice * out * scored,
            2 * lora * size.fed + 2 * attention,
            weights * size.passes,
            rows,
        ),
        "update": Cost(bytes=ADAM_BYTES * trained),
    }
