"""Completions from a generator as draws of a view: ended by our rule, scored by our model, corrected for the mismatch.

There are two corrections, for two uses (`tiltlm.mismatch` has the formulas).

- `weighted`, for training: every completion counts with its weight q(x) / mu(x), truncated. No draw is wasted, and the loop
  multiplies each completion's derivative by it (`inference.accumulate`). On the draws stand our own log-probabilities, so that an
  engine's KL, ratios and log-weights are those of the policy. For a loss sum_i f(x_i) log q(x_i) with leave-one-out baselines, or
  none, the expected gradient is the on-policy one, exactly but for truncation: E_mu[w_i grad log q_i] = 0 takes the baseline along.
  For an engine that corrects for the law that drew, the product of its own p*/q and this q/mu is p*/mu.
- `exact`, for everything else (plan, certify, sample, pools): rejection makes the draws independent draws of q, as if our sampler
  had made them. What they are used for need not know who drew; it costs some further draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Generator as RandomNumbers

from tiltlm.errors import InputError
from tiltlm.lm.generators.protocol import Continuation, Generator, Request, Terms
from tiltlm.mismatch import LEAST_CEILING, TRUNCATE, accept, ceilings, log_ratio
from tiltlm.protocols import Law
from tiltlm.records import Draws, Prompts
from tiltlm.weights import group_count

if TYPE_CHECKING:
    from tiltlm.lm.view import View

LEAST_TEMPERATURE = 0.01
"""vLLM raises lower ones to it."""
LARGEST_SEED = 2**62


def weighted(view: View, generator: Generator, prompts: Prompts, n: int, rng: RandomNumbers) -> Draws:
    """`n` completions of every prompt that the generator drew, with `log_mu`, as draws that count for the view by weights.

    Raises:
        InputError: for what the generator cannot draw exactly, for one that does not work, and for too large a mismatch.
    """
    return _asked(view, generator, prompts, [n] * len(prompts), rng)


def exact(view: View, generator: Generator, prompts: Prompts, n: int, rng: RandomNumbers) -> Draws:
    """`n` independent draws of the view's law for every prompt, made from the generator's by rejection.

    Raises:
        InputError: as `weighted`.
    """
    kept: list[Draws] = []
    seen = torch.zeros(0, dtype=torch.float64)
    found = torch.zeros(len(prompts), dtype=torch.long)
    surplus = LEAST_CEILING  # in the first round; what is then missing is little, and had better come at once
    while any(missing := [max(0, n - count) for count in found.tolist()]):
        draws = _asked(view, generator, prompts, [math.ceil(surplus * count) for count in missing], rng)
        seen, surplus = torch.cat([seen, log_ratio(draws)]), TRUNCATE
        uniform = torch.rand(len(draws), generator=rng, dtype=torch.float64)
        rows = accept(seen[-len(draws) :], ceilings(seen)[-len(draws) :], uniform).nonzero().flatten()
        kept.append(replace(draws.select(rows), log_mu=None))
        found += group_count(kept[-1].prompt_index, len(prompts))
    everything = Draws.concatenate(kept)
    order = everything.prompt_index.argsort(stable=True)  # a prompt's first n, in the order of drawing
    place = torch.cat([torch.arange(count) for count in found.tolist()])
    return everything.select(order[place < n])


def _asked(view: View, generator: Generator, prompts: Prompts, counts: Sequence[int], rng: RandomNumbers) -> Draws:
    """`counts` completions of each prompt from the generator, scored by the view."""
    _require_possible(view, prompts)
    law = replace(view.law, stop=() if view.stops is None else view.stops.texts)  # the others are among the ids
    terms = Terms(law, view.eos, generator.serve(view))
    *seeds, seed = torch.randint(LARGEST_SEED, (len(prompts) + 1,), generator=rng).tolist()
    contexts = [tuple(row[mask].tolist()) for row, mask in zip(prompts.tokens, prompts.mask, strict=True)]
    first = [
        Request(tokens, n, view.law.max_new_tokens, seed)
        for tokens, n, seed in zip(contexts, counts, seeds, strict=True)
        if n
    ]
    index = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))
    rows = [c for continuations in generator.generate(first, terms) for c in continuations]
    whole = _finished(view, generator, terms, [contexts[i] for i in index.tolist()], rows, seed)
    draws = view.complete(prompts, index, [row.tokens for row in whole])
    log_mu = torch.zeros(draws.log_q.shape, dtype=torch.float64)
    for row, completion in enumerate(whole):
        log_mu[row, : len(completion.tokens)] = torch.tensor(completion.log_mu, dtype=torch.float64)
    draws = replace(draws, log_mu=log_mu)
    generator.tolerance.require(draws, str(generator))
    return draws


def _finished(
    view: View,
    generator: Generator,
    terms: Terms,
    contexts: Sequence[tuple[int, ...]],
    rows: Sequence[Continuation],
    seed: int,
) -> list[Continuation]:
    """Every completion up to where our law ends it; one that stopped before is sent again, with what it has.

    A law over tokens may be cut at any stopping time, and taken up again, without changing.
    """
    limit = view.law.max_new_tokens
    whole = [_ended(view, row, 0) for row in rows]
    while unfinished := [i for i, row in enumerate(whole) if len(row.tokens) < limit and not view.ends(row.tokens)]:
        seed += len(rows)
        requests = [
            Request((*contexts[i], *whole[i].tokens), 1, limit - len(whole[i].tokens), (seed + i) % LARGEST_SEED)
            for i in unfinished
        ]
        for i, (more,) in zip(unfinished, generator.generate(requests, terms), strict=True):
            if not more.tokens:
                raise InputError(
                    f"{generator} stopped a completion after {len(whole[i].tokens)} of {limit} tokens and does not go on; give it a "
                    f"longer context (max-model-len), or lower max_new_tokens"
                )
            joined = Continuation((*whole[i].tokens, *more.tokens), (*whole[i].log_mu, *more.log_mu))
            whole[i] = _ended(view, joined, len(whole[i].tokens))
    return whole


def _ended(view: View, row: Continuation, known: int) -> Continuation:
    """Up to the token that ends it by our rule: what came after belongs to no completion.

    Args:
        known: tokens at its beginning that have been looked at, and do not end it.
    """
    limit, eos = min(len(row.tokens), view.law.max_new_tokens), view.eos
    is_over = view.ends if view.stops else lambda ids: ids[-1] in eos  # without stop strings the last token tells
    end = next((length for length in range(known + 1, limit + 1) if is_over(row.tokens[:length])), limit)
    return Continuation(row.tokens[:end], row.log_mu[:end])


def _require_possible(view: View, prompts: Prompts) -> None:
    """Refuse what a generator would draw from another law than ours."""
    if prompts.inputs or view.body.backbone.has_encoder:
        raise InputError(
            f"generator cannot draw for {view.body.name}, which reads images or has an encoder: only prompts of tokens are sent; leave "
            f"generator out"
        )
    _require_law(view.law)


def _require_law(law: Law) -> None:
    if law.temperature < LEAST_TEMPERATURE:
        raise InputError(
            f"temperature is {law.temperature}, and vLLM draws at no less than {LEAST_TEMPERATURE}; raise it, or leave generator out"
        )
