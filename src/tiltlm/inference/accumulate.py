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

    Args:
        fresh: all of the draws are of the policy as it is, so the values are known from drawing.
    """
    needs, draws = engine.claim.needs, scored.draws
    parts = list(batches(draws, micro_tokens))
    if len(parts) == 1 and draws.log_mu is None:
        loss, info = engine.loss(policy.forward(draws, needs), scored, state)
        loss.backward()
        optimiser.gather()
        return loss.detach(), info
    if fresh and needs == {"log_q"}:
        values = Forward(draws.log_q)
    else:
        with torch.no_grad():
            values = joined([policy.forward(draws.select(rows), needs) for rows in parts])
    loss, info, leaves = derivatives(engine, values, scored, state)
    for rows in parts:
        deliver(policy.forward(draws.select(rows), needs), leaves, rows)
        optimiser.gather()
    return loss, info


def derivatives(
    engine: TrainingEngine[Any], values: Forward, scored: Scored, state: Any
) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    """The loss of these values; and leaves, in the order of `Forward.leaves`, that hold its derivatives (None: there is none).

    Of draws that another program made for the sampler, each completion's derivative counts by its weight (`tiltlm.mismatch`).
    """
    watched = _map(values, lambda t: t.detach().clone().requires_grad_())
    loss, info = engine.loss(watched, scored, state)
    loss.backward()
    weights = row_weights(scored.draws)
    if weights is not None:
        for leaf in watched.leaves():
            if leaf.grad is not None:
                leaf.grad *= weights[:, None].to(leaf.grad)
    # what a target network says has no gradient in a pass, and so an engine need not detach it; here all leaves are watched
    return loss.detach(), {name: value.detach() for name, value in info.items()}, watched.leaves()


def deliver(forward: Forward, leaves: Sequence[Tensor], rows: Tensor, ballast: int = 0) -> None:
    """Send the derivatives of these rows back through a pass that was run for them.

    Args:
        ballast: rows at the end of the pass that are not in `rows` and count for nothing.
    """
    pairs = [
        (out, torch.nn.functional.pad(leaf.grad[rows], (0, 0, 0, ballast)) if ballast else leaf.grad[rows])
        for out, leaf in zip(forward.leaves(), leaves, strict=True)
        if leaf.grad is not None
    ]
    torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])


def _map(forward: Forward, change: Callable[[Tensor], Tensor]) -> Forward:
    return replace(forward, **{name: change(t) for name, t in vars(forward).items() if t is not None})


def joined(parts: Sequence[Forward]) -> Forward:
    """Passes over some rows each, one after the other."""
    filled = [name for name, t in vars(parts[0]).items() if t is not None]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in filled})
