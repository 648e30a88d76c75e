"""Held-out rewards: judged, never trained on.

The reward that is trained on is a proxy of what one wants. A second judge of the same texts, called gold as in Gao et al.
(2023, "Scaling laws for reward model overoptimization"), shows when the proxy rises at its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.reward import Reward
from tiltlm.protocols import Evidence
from tiltlm.records import Draws

Gold = Evidence | Callable[..., Any]
"""What may be held out: evidence, or a function that is called as `Reward` calls its own."""


def as_gold(gold: Gold) -> Evidence:
    """Evidence as it is; a function as a `Reward` in its own units.

    Raises:
        InputError: if it is neither.
    """
    if hasattr(gold, "log_likelihood"):
        return gold  # pyright: ignore[reportReturnType]
    if not callable(gold):
        raise InputError(f"gold is {gold!r:.60}; give evidence, or a function as Reward takes it")
    return Reward(gold)


def gold_name(gold: Evidence) -> str:
    """How the held-out reward is called in logs."""
    return str(getattr(gold, "label", type(gold).__name__))


def gold_values(gold: Evidence, draws: Draws) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """The held-out reward of each completion in its own units, NaN where it could not judge; and where it could.

    Raises:
        InputError: if it is infinite: a mean over such completions says nothing.
    """
    found = gold.log_likelihood(draws)
    values = gold.beta * found.log.double()
    wrong = (values.isinf() & found.kept).nonzero().flatten().tolist()
    if wrong:
        raise InputError(
            f"gold {gold_name(gold)!r} is {float(values[wrong[0]])} for completion {draws.texts[wrong[0]]!r:.120}; a held-out "
            f"reward must be finite: give a constraint's function itself, as 1 and 0"
        )
    return torch.where(found.kept, values, torch.nan), found.kept
