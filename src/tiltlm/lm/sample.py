"""The sampling loop.

It is our own because engines need what `generate` hides: the log-probability of the law that was sampled,
a prompt's cache shared by its completions, rows that leave when they end, and one uniform number per
(row, position), so that a draw depends on the seed and not on how rows were batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tiltlm.lm.backbone import Backbone, Prefix
from tiltlm.lm.head import Head, apply_law, cached
from tiltlm.lm.stops import StopStrings
from tiltlm.protocols import Law
from tiltlm.records import Prompts

BLOCK = 256


@dataclass(frozen=True)
class Sampled:
    """Raw output of the loop, rows in order: n completions of the first prompt, then of the next."""

    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    ended: Bool[Tensor, " B"]
    log_q: Float[Tensor, "B T"]


def pick(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, " N"], *, overwrite: bool = False
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Invert the distribution function of softmax(logits) at `uniform`; returns tokens and log-probabilities.

    Sums over blocks of the vocabulary first and looks inside one block only, so that the vocabulary is
    passed over once. Sums are in double precision.

    Args:
        overwrite: the logits may be destroyed, so that no second tensor of their size has to go through the cache.
    """
    n, vocabulary = logits.shape
    peak = logits.amax(-1, keepdim=True)
    weight = (logits.sub_(peak) if overwrite else logits - peak).exp_()
    size = min(BLOCK, vocabulary)
    short = -vocabulary % size
    if short:
        weight = torch.nn.functional.pad(weight, (0, short))
    blocks = weight.view(n, -1, size)
    cumulative = blocks.sum(-1).double().cumsum(-1)
    total = cumulative[:, -1]
    threshold = uniform.double() * total
    block = (cumulative <= threshold[:, None]).sum(-1).clamp(max=cumulative.shape[-1] - 1)
    rows = torch.arange(n, device=logits.device)
    before = torch.where(block > 0, cumulative[rows, (block - 1).clamp(min=0)], 0.0)
    inside = blocks[rows, block].double().cumsum(-1)
    offset = (inside <= (threshold - before)[:, None]).sum(-1).clamp(max=size - 1)
    token = block * size + offset
    # Rounding at the very end of a block can point at a token of no mass; take the likeliest one instead.
    impossible = weight[rows, token] <= 0
    if impossible.any():
        token = torch.where(impossible, weight.argmax(-1), token)
    log_q = weight[rows, token].log() - total.log().to(logits.dtype)
    return token, log_q


def next_token(
    features: Float[Tensor, "N D"], head: Head, law: Law, uniform: Float[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Tokens drawn at `uniform` from the law that the features predict, and their log-probabilities."""
    product = head.product(features)
    ours = head.weight is not None  # else the logits are the features, which the caller has
    parts = [
        pick(apply_law(head.finish(product[rows]), law), uniform[rows], overwrite=ours) for rows in cached(product)
    ]
    tokens, log_q = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(log_q)


def sample(
    backbone: Backbone,
    prompts: Prompts,
    n: int,
    law: Law,
    eos: tuple[int, ...],
    rng: Generator,
    *,
    rows: int = 256,
    stops: StopStrings | None = None,
    progress: Callable[[int], None] | None = None,
    part: range | None = None,
) -> Sampled:
    """Draw `n` completions of each prompt.

    Args:
        eos: ids that end a completion.
        rows: most completions that are in the model at a time.
        stops: texts that end a completion too.
        progress: called with the number of completions that have just left the model.
        part: draw those of these prompts only, and get what a draw of all prompts would have given for them.
    """
    uniform = torch.rand(len(prompts) * n, law.max_new_tokens, generator=rng, dtype=torch.float64)
    if part is not None:
        prompts, uniform = prompts.select(part), uniform[part.start * n : part.stop * n]
    with torch.inference_mode():
        drawn = _decode(backbone, _Waiting(backbone, prompts, n), uniform, law, eos, rows, stops, progress)
    # copied out of inference mode: an inference tensor could not be saved for a backward pass
    return Sampled(*(getattr(drawn, name).clone() for name in ("tokens", "mask", "ended", "log_q")))


class _Waiting:
    """Completions that have not begun, in order; their prompts are read when their turn comes."""

    def __init__(self, backbone: Backbone, prompts: Prompts, n: int) -> None:
        self._backbone, self._prompts = backbone, prompts
        self._owner = torch.arange(len(prompts)).repeat_interleave(n)
        self._begun, self._read, self._prefix = 0, range(0), None

    def __len__(self) -> int:
        return len(self._owner) - self._begun

    def take(self, count: int) -> Prefix:
        """The next `count` completions, or all that are left."""
        owner = self._owner[self._begun : self._begun + count]
        self._begun += len(owner)
        asked = range(int(owner[0]), int(owner[-1]) + 1)
        if self._prefix is None or asked.start not in self._read or asked[-1] not in self._read:
            self._prefix, self._read = self._backbone.prefill(self._prompts.select(asked)), asked
        return self._prefix.rows(owner - self._read.start)


def _decode(
    backbone: Backbone,
    waiting: _Waiting,
    uniform: Float[Tensor, "B T"],
    law: Law,
    eos: tuple[int, ...],
    rows: int,
    stops: StopStrings | None,
    progress: Callable[[int], None] | None,
) -> Sampled:
    """Decode all that waits, at most `rows` at a time: what has ended leaves, and what waits takes its place if the model can."""
    (count, limit), device = uniform.shape, backbone.device
    uniform = uniform.to(device)
    ends = torch.tensor(eos, dtype=torch.long, device=device)
    tokens = torch.zeros(count, limit, dtype=torch.long, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    log_q: Tensor | None = None
    inside: Prefix | None = None
    which = torch.zeros(0, dtype=torch.long, device=device)  # the completion that each row in the model is
    while len(waiting) or inside is not None:
        if len(waiting) and (inside is None or (inside.takes_more and len(which) <= _few(rows))):
            first, new = count - len(waiting), waiting.take(rows - len(which))
            inside = new if inside is None else inside.beside(new)
            inside = inside if len(waiting) else inside.apart()
            which = torch.cat([which, torch.arange(first, count - len(waiting), device=device)])
        assert inside is not None
        place = lengths[which]
        number = uniform[which, place.clamp(max=limit - 1)]
        token, log_prob = next_token(inside.last, backbone.drawing_head, law, number)
        if log_q is None:
            log_q = torch.zeros(count, limit, dtype=log_prob.dtype, device=device)
        open_ = ~ended[which] & (place < limit)
        live, place = which[open_], place[open_]
        tokens[live, place], log_q[live, place] = token[open_], log_prob[open_]
        lengths[live] = place + 1
        ended[live] = torch.isin(token[open_], ends)
        if stops is not None:
            ended[live] |= stops.completed(
                token[open_], lambda n, live=live: tokens[live[n], : lengths[live[n]]].tolist()
            ).to(device)
        going = (~ended[which] & (lengths[which] < limit)).nonzero().flatten()
        if len(going) <= _few(len(which)):
            if progress is not None:
                progress(len(which) - len(going))
            inside, which, token = inside.rows(going) if len(going) else None, which[going], token[going]
        if inside is not None:
            seen = torch.cat([inside.mask, inside.mask.new_ones(len(which), 1)], dim=-1)
            inside = Prefix(inside.memory, seen, backbone.features(token[:, None], seen, inside.memory)[:, -1])
    assert log_q is not None
    width = max(1, int(lengths.max()))
    mask = torch.arange(width, device=device) < lengths[:, None]
    return Sampled(*(x.cpu() for x in (tokens[:, :width], mask, ended, log_q[:, :width])))


def _few(rows: int) -> int:
    """So many are few enough of `rows` for the others to leave: moving the rest costs less than carrying them along."""
    return math.floor(0.875 * rows)
