"""Temporal differences: what the value of a token is compared with, from what comes after it.

The token MDP has certain transitions and one reward, the evidence r / beta at the end, so that Q(s_t, a_t) is the value of
the state s_{t+1}, and of a whole completion the evidence itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.records import Scored


def lambda_return(
    values: Float[Tensor, "B T"], taken: Float[Tensor, "B T"], scored: Scored, trace: float
) -> Float[Tensor, "B T"]:
    """G_t = V(s_{t+1}) + trace (G_{t+1} - Q(s_{t+1}, a_{t+1})), and r / beta after the last token; without gradient.

    With trace 0 it looks one token ahead; with 1 the evidence reaches every token at once, corrected on its way by what each
    later token was better or worse than its state. Where every Q(s, a) is the value of s + a, the bracket is zero and any
    trace gives the same; nothing is corrected for who drew (Q(λ) of Harutyunyan et al. 2016).

    Args:
        values: V(s_t), the method's own backup.
        taken: Q(s_t, a_t).

    Raises:
        InputError: for completions whose evidence is infinite; a difference from it teaches nothing.
    """
    evidence = scored.log_evidence.to(values.dtype)
    if not evidence.isfinite().all():
        raise InputError(
            f"log_evidence is {float(evidence[~evidence.isfinite()][0])} for a completion, which no value can be compared with; "
            f"give hard constraints a penalty, or learn by SoftValueRegression, which takes a weight of zero"
        )
    values, taken = values.detach(), taken.detach()
    last = scored.draws.lengths - 1
    columns = [evidence]
    for t in reversed(range(values.shape[1] - 1)):
        ahead = values[:, t + 1] + trace * (columns[-1] - taken[:, t + 1])
        columns.append(torch.where(t >= last, evidence, ahead))
    return torch.stack(columns[::-1], -1)


def squared(difference: Tensor) -> Tensor:
    """Half the square."""
    return difference.square() / 2


def huber(difference: Tensor) -> Tensor:
    """Half the square, and linear beyond one nat (Mnih et al. 2015)."""
    return torch.nn.functional.huber_loss(difference, torch.zeros_like(difference), reduction="none")


def per_completion(loss: Float[Tensor, "B T"], scored: Scored) -> Tensor:
    """Sum over a completion's tokens, mean over completions: every visit of a state counts the same."""
    return torch.where(scored.draws.mask, loss, 0.0).sum(-1).mean()


def require_rates(trace: float, target_rate: float) -> None:
    """The ranges of the settings that all methods with temporal differences share."""
    if not 0 <= trace <= 1:
        raise InputError(f"trace is {trace}; it must be between 0 (one token ahead) and 1 (all of them)")
    if not 0 < target_rate <= 1:
        raise InputError(f"target_rate is {target_rate}; it must be above 0, and at most 1 (no target network)")
