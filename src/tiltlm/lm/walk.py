"""Completions extended token by token on a cache, for engines that look at prefixes; and redrawn from any token on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tiltlm.lm.backbone import Prefix
from tiltlm.lm.sample import pick
from tiltlm.records import Draws, Prompts

if TYPE_CHECKING:
    from tiltlm.lm.view import View


class ModelWalk:
    """Rows of a view, each a completion so far. All stay in the batch; those that have ended are masked.

    The model runs when its answer is asked for, so that the last token of a completion costs nothing.

    Args:
        prefix: what the model remembers of each row.
        so_far: the rows; a completion that has not ended goes on.
    """

    def __init__(self, view: View, prefix: Prefix, so_far: Draws) -> None:
        self._view, self._prompts, self._index = view, so_far.prompts, so_far.prompt_index
        self._memory, self._seen, self._features = prefix.memory, prefix.mask, prefix.last
        self._pending: Tensor | None = None
        self._known: Tensor | None = None
        room = view.law.max_new_tokens - so_far.tokens.shape[1]
        self._tokens = torch.nn.functional.pad(so_far.tokens * so_far.mask, (0, room))
        self._log_q = torch.nn.functional.pad(so_far.log_q, (0, room))
        self._lengths, self._ended = so_far.lengths, so_far.ended.clone()

    @staticmethod
    def start(view: View, prompts: Prompts, n: int) -> ModelWalk:
        """`n` empty rows of every prompt."""
        index = torch.arange(len(prompts)).repeat_interleave(n)
        empty = torch.zeros(len(index), 0)
        with torch.no_grad(), view.body.adapters.on(view.adapter):
            prefix = view.body.backbone.prefill(prompts).rows(index)
        so_far = Draws(
            prompts=prompts,
            tokens=empty.long(),
            mask=empty.bool(),
            ended=torch.zeros(len(index), dtype=torch.bool),
            prompt_index=index,
            log_q=empty.to(view._next(prefix.last[:1]).dtype),
            texts=("",) * len(index),
        )
        return ModelWalk(view, prefix, so_far)

    @staticmethod
    def resume(view: View, draws: Draws) -> ModelWalk:
        """The rows of `draws` as far as they go, of one length unless the model takes several (`Backbone.takes_ragged`)."""
        unique, owner = draws.prompt_index.unique(return_inverse=True)
        with torch.no_grad(), view.body.adapters.on(view.adapter):
            prompts = draws.prompts.select(unique.tolist())
            prefix = view.body.backbone.resume(prompts, owner, draws.tokens, draws.mask)
        return ModelWalk(view, prefix, draws)

    @property
    def live(self) -> Bool[Tensor, " B"]:
        """The rows that go on: neither ended nor cut."""
        return ~self._ended & (self._lengths < self._tokens.shape[1])

    def log_probs(self) -> Float[Tensor, "B V"]:
        """Normalised log-probabilities of every row's next token under the view's law; of no meaning for a row that is over."""
        if self._known is None:
            with torch.no_grad(), self._view.body.adapters.on(self._view.adapter):
                if self._pending is not None:
                    self._features = self._view.body.backbone.features(self._pending, self._seen, self._memory)[:, -1]
                    self._pending = None
                self._known = self._view._next(self._features)
        return self._known

    def extend(self, tokens: Int[Tensor, " B"], live: Bool[Tensor, " B"]) -> None:
        """Append a token to the rows that are `live`; the others stay as they are."""
        log_probs = self.log_probs()
        tokens, rows = tokens.cpu(), live.nonzero().flatten()
        new, place = tokens[rows], self._lengths[rows]
        self._tokens[rows, place] = new
        self._log_q[rows, place] = log_probs[rows.to(log_probs.device), new.to(log_probs.device)].cpu()
        self._lengths = self._lengths + live.long()
        self._ended[rows] = torch.isin(new, torch.tensor(self._view.eos, dtype=torch.long)) | self._stopped(rows)
        self._seen = torch.cat([self._seen, live[:, None].to(self._seen.device)], dim=-1)
        self._pending, self._known = tokens[:, None], None

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Replace the rows by copies of those at `rows`, their caches included."""
        there = rows.to(self._seen.device)
        self._memory, self._seen = self._memory.rows(there), self._seen[there]
        self._features = self._features[there]
        self._pending = None if self._pending is None else self._pending[rows]
        self._known = None if self._known is None else self._known[there]
        self._index, self._lengths, self._ended = self._index[rows], self._lengths[rows], self._ended[rows]
        self._tokens, self._log_q = self._tokens[rows], self._log_q[rows]

    def draws(self, rows: Int[Tensor, " B"] | None = None) -> Draws:
        """The rows so far (or those at `rows`) as draws of the view's law; one that is still live has neither ended nor been cut."""
        chosen = torch.arange(len(self._lengths)) if rows is None else rows
        lengths = self._lengths[chosen]
        width = max(1, int(lengths.max())) if len(chosen) else 1
        tokens, mask = self._tokens[chosen, :width], torch.arange(width) < lengths[:, None]
        return Draws(
            prompts=self._prompts,
            tokens=tokens,
            mask=mask,
            ended=self._ended[chosen],
            prompt_index=self._index[chosen],
            log_q=self._log_q[chosen, :width],
            texts=self._view.body.texts(tokens, mask),
            sampler=self._view.identity,
        )

    def _stopped(self, rows: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
        stops = self._view.stops
        if stops is None:
            return torch.zeros(len(rows), dtype=torch.bool)
        last = self._tokens[rows, self._lengths[rows] - 1]
        return stops.completed(last, lambda n: self._tokens[rows[n], : self._lengths[rows[n]]].tolist())


def redraw(view: View, draws: Draws, keep: Int[Tensor, " B"], rng: Generator) -> Draws:
    """Draw each completion anew from its token `keep` on, from the view's law given what is before.

    One uniform number a row and position; rows that are over leave the batch.
    """
    uniform = torch.rand(len(draws), view.law.max_new_tokens, generator=rng, dtype=torch.float64)
    kept = _prefixes(view, draws, keep)
    finished: list[Draws] = []
    order: list[Tensor] = []
    for group in _together(view, kept):
        rows = group
        walk = ModelWalk.resume(view, kept.select(rows))
        step = 0
        while (live := walk.live).any():
            if live.sum() <= math.floor(0.875 * len(rows)):
                finished.append(walk.draws((~live).nonzero().flatten()))
                order.append(rows[~live])
                rows = rows[live]
                walk.select(live.nonzero().flatten())
                continue
            log_probs = walk.log_probs()
            walk.extend(pick(log_probs, uniform[rows, step].to(log_probs.device))[0], live)
            step += 1
        finished.append(walk.draws())
        order.append(rows)
    return Draws.concatenate(finished).select(torch.cat(order).argsort())


def _together(view: View, kept: Draws) -> Iterator[Int[Tensor, " N"]]:
    """The rows that are redrawn together: as many as the view takes, and of one length where the model asks for that."""
    groups = [torch.arange(len(kept))]
    if not view.body.backbone.takes_ragged(kept.prompts):
        groups = [(kept.lengths == length).nonzero().flatten() for length in kept.lengths.unique()]
    for group in groups:
        yield from group.split(view.rows)


def _prefixes(view: View, draws: Draws, keep: Int[Tensor, " B"]) -> Draws:
    """The first `keep` tokens of each completion with their log-probabilities under the view's law."""
    mask = draws.mask & (torch.arange(draws.tokens.shape[1]) < keep[:, None])
    whole = keep >= draws.lengths
    return Draws(
        prompts=draws.prompts,
        tokens=draws.tokens,
        mask=mask,
        ended=draws.ended & whole,
        prompt_index=draws.prompt_index,
        log_q=torch.where(mask, view.log_prob(draws), 0.0),
        texts=draws.texts,
        sampler=view.identity,
    )
