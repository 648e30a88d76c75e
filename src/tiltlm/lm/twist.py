"""A critic's values along completions that are extended token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiltlm.records import Prompts

if TYPE_CHECKING:
    from tiltlm.lm.critic import Look, ModelCritic


class Stream:
    """The features of rows under one adapter, on a cache; the model runs when they are asked for."""

    def __init__(self, critic: ModelCritic, adapter: str | None, prompts: Prompts, index: Int[Tensor, " B"]) -> None:
        self._adapters, self._backbone, self._adapter = critic.body.adapters, critic.prior.body.backbone, adapter
        with torch.no_grad(), self._adapters.on(adapter):
            prefix = self._backbone.prefill(prompts).rows(index)
        self._memory, self._seen, self._features = prefix.memory, prefix.mask, prefix.last
        self._pending: Tensor | None = None

    @torch.no_grad()
    def features(self) -> Float[Tensor, "B D"]:
        """Those that predict the next token; of no meaning for a row that has ended."""
        if self._pending is not None:
            with self._adapters.on(self._adapter):
                self._features = self._backbone.features(self._pending, self._seen, self._memory)[:, -1]
            self._pending = None
        return self._features

    def extend(self, tokens: Int[Tensor, " B"], live: Bool[Tensor, " B"]) -> None:
        self.features()
        self._seen = torch.cat([self._seen, live[:, None].to(self._seen.device)], dim=-1)
        self._pending = tokens[:, None]

    def select(self, rows: Int[Tensor, " B"]) -> None:
        there = rows.to(self._seen.device)
        self._memory, self._seen = self._memory.rows(there), self._seen[there]
        self._features = self._features[there]
        self._pending = None if self._pending is None else self._pending[rows]


class CriticTwist:
    """log psi(s + a) = Q(s, a), known as soon as the token is; before the first token the soft value of the prompt.

    Costs one pass of the model a token, beside the walk that the twist is for, and one of the vocabulary a prompt.
    """

    def __init__(self, critic: ModelCritic, prompts: Prompts, n: int) -> None:
        index = torch.arange(len(prompts)).repeat_interleave(n)
        self._critic = critic
        self._prior = Stream(critic, critic.prior.adapter, prompts, index)
        self._own = Stream(critic, critic.adapter, prompts, index) if critic.has_adapter else self._prior
        self._log_twist = critic.soft_value(self._look()).cpu()

    def log_twist(self) -> Float[Tensor, " B"]:
        """log psi of every row so far, in nats; what an ended row had at its last token."""
        return self._log_twist

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, " B"], live: Bool[Tensor, " B"]) -> None:
        """Append a token to the rows that are `live`; the others stay as they are."""
        look = self._look()
        q = self._critic.q_of(look, tokens.to(look.value.device)).cpu()
        self._log_twist = torch.where(live.cpu(), q, self._log_twist)
        for stream in self._streams:
            stream.extend(tokens, live)

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Replace the rows by copies of those at `rows`."""
        self._log_twist = self._log_twist[rows.cpu()]
        for stream in self._streams:
            stream.select(rows)

    @property
    def _streams(self) -> tuple[Stream, ...]:
        return (self._prior,) if self._own is self._prior else (self._prior, self._own)

    @torch.no_grad()
    def _look(self) -> Look:
        prior = self._prior.features()
        own = prior if self._own is self._prior else self._own.features()
        return self._critic.look(own, prior, self._critic.head)
