"""The gradient of a loss in passes that fit into memory, without the engine knowing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.inference.optimise import Optimiser
from tiltlm.lm.score import batches
from tiltlm.mismatch import row_weights
from tiltlm.protocols import Policy, TrainingEngine
from tiltlm.records import Forward, Info, Scored


def accumulate(
    policy: Policy,
    engine: TrainingEngine[Any],
    scored: Scored,
    state: Any,
    micro_tokens: int,
    optimiser: Optimiser,
    *,
    fresh: bool,
) -> tuple[Tensor, Info]:
    """Put the loss's gradient into the optimiser, in passes of at most about `micro_tokens` completion tokens.

    The loss sees the policy only through `Forward`. So first it is evaluated on the values alone, which gives its
    derivative with respect to every log-probability; then each micro-batch is run once with gradient and delivers its part.
    The engine sees the whole batch, whatever the memory.

    Of draws that another program made for the sampler, each completion's derivative counts by its weight (`tiltlm.mismatch`).

    Args:
        fresh: all of the draws are of the policy as it is, so the values are known from drawing.
    """
    needs, draws = engine.claim.needs, scored.draws
    parts, weights = list(batches(draws, micro_tokens)), row_weights(draws)
    if len(parts) == 1 and weights is None:
        loss, info = engine.loss(policy.forward(draws, needs), scored, state)
        loss.backward()
        optimiser.gather()
        return loss.detach(), info
    if fresh and needs == {"log_q"}:
        values = Forward(draws.log_q)
    else:
        with torch.no_grad():
            values = _join([policy.forward(draws.select(rows), needs) for rows in parts])
    leaves = _map(values, lambda t: t.detach().clone().requires_grad_())
    loss, info = engine.loss(leaves, scored, state)
    loss.backward()
    if weights is not None:
        for leaf in leaves.leaves():
            if leaf.grad is not None:
                leaf.grad *= weights[:, None].to(leaf.grad)
    for rows in parts:
        forward = policy.forward(draws.select(rows), needs)
        pairs = [
            (out, leaf.grad[rows])
            for out, leaf in zip(forward.leaves(), leaves.leaves(), strict=True)
            if leaf.grad is not None
        ]
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        optimiser.gather()
    return loss.detach(), info


def _map(forward: Forward, change: Callable[[Tensor], Tensor]) -> Forward:
    return replace(forward, **{name: change(t) for name, t in vars(forward).items() if t is not None})


def _join(parts: Sequence[Forward]) -> Forward:
    filled = [name for name, t in vars(parts[0]).items() if t is not None]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in filled})
