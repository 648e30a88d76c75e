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
from tiltlm.lm.head import Head, apply_law, at_least_float32, cached
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


def pick(logits: Float[Tensor, "N V"], uniform: Float[Tensor, " N"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Invert the distribution function of softmax(logits) at `uniform`; returns tokens and log-probabilities.

    Sums over blocks of the vocabulary first and looks inside one block only, so that the vocabulary is
    passed over once. Sums are in double precision.
    """
    n, vocabulary = logits.shape
    peak = logits.amax(-1, keepdim=True)
    weight = (logits - peak).exp_()
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
        token = torch.where(impossible, logits.argmax(-1), token)
    log_q = logits[rows, token] - peak.squeeze(-1) - total.log().to(logits.dtype)
    return token, log_q


def next_token(
    features: Float[Tensor, "N D"], head: Head, law: Law, uniform: Float[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Tokens drawn at `uniform` from the law that the features predict, and their log-probabilities."""
    product = head.product(features)
    parts = [pick(apply_law(head.finish(product[rows]), law), uniform[rows]) for rows in cached(product)]
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
        progress: called with the number of completions that a wave has finished.
        part: draw those of these prompts only, and get what a draw of all prompts would have given for them.
    """
    uniform = torch.rand(len(prompts) * n, law.max_new_tokens, generator=rng, dtype=torch.float64)
    if part is not None:
        prompts, uniform = prompts.select(part), uniform[part.start * n : part.stop * n]
    count = len(prompts)
    waves: list[Sampled] = []
    together = max(1, rows // n)
    with torch.inference_mode():
        for first in range(0, count, together):
            some = range(first, min(first + together, count))
            prefix = backbone.prefill(prompts.select(some))
            owner = torch.arange(len(some)).repeat_interleave(n)
            for start in range(0, len(owner), rows):
                wave = owner[start : start + rows]
                numbers = uniform[some.start * n + start :][: len(wave)]
                waves.append(_wave(backbone, prefix.rows(wave), numbers, law, eos, stops))
                if progress is not None:
                    progress(len(wave))
    join = [torch.cat([getattr(wave, name) for wave in waves]) for name in ("tokens", "mask", "ended", "log_q")]
    width = max(1, int(join[1].sum(-1).max()))
    # cloned out of inference mode: an inference tensor could not be saved for a backward pass
    return Sampled(join[0][:, :width].clone(), join[1][:, :width].clone(), join[2].clone(), join[3][:, :width].clone())


def _wave(
    backbone: Backbone,
    prefix: Prefix,
    uniform: Float[Tensor, "B T"],
    law: Law,
    eos: tuple[int, ...],
    stops: StopStrings | None,
) -> Sampled:
    """Decode one batch of rows to the end."""
    count, limit = len(prefix.mask), law.max_new_tokens
    head, memory = backbone.drawing_head, prefix.memory
    device = prefix.last.device
    uniform = uniform.to(device)
    ends = torch.tensor(eos, dtype=torch.long, device=device)
    tokens = torch.zeros(count, limit, dtype=torch.long, device=device)
    mask = torch.zeros(count, limit, dtype=torch.bool, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    features, seen = prefix.last, prefix.mask
    log_q = torch.zeros(count, limit, dtype=at_least_float32(features[:0]).dtype, device=device)
    alive = torch.arange(count, device=device)  # the completion that each row in the model belongs to
    for step in range(limit):
        token, log_prob = next_token(features, head, law, uniform[alive, step])
        open_ = ~ended[alive]
        live = alive[open_]
        tokens[live, step], log_q[live, step], mask[live, step] = token[open_], log_prob[open_], True
        ended[live] = torch.isin(token[open_], ends)
        if stops is not None:
            so_far = tokens[:, : step + 1]
            ended[live] |= stops.completed(
                token[open_], lambda n, live=live, so_far=so_far: so_far[live[n]].tolist()
            ).to(device)
        going = ~ended[alive]
        if step + 1 == limit or not going.any():
            break
        if going.sum() <= math.floor(0.875 * len(alive)):
            rows = going.nonzero().flatten()
            memory, seen, token, alive = memory.rows(rows), seen[rows], token[rows], alive[rows]
        seen = torch.cat([seen, seen.new_ones(len(alive), 1)], dim=-1)
        features = backbone.features(token[:, None], seen, memory)[:, -1]
    return Sampled(tokens.cpu(), mask.cpu(), ended.cpu(), log_q.cpu())
