"""Where a reward of 0 or 1 and a KL penalty come to rest: one equation in the success probability p.

A prompt whose completions either succeed (reward 1, prior probability p0) or fail is a bandit of two arms. With an advantage
that is normalised by the group's standard deviation the rest points depend on the group, and there may be two or none
(Mroueh 2025 for very many draws; the finite groups by listing the number of successes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from tiltlm.errors import InputError

GRID = np.concatenate([-np.geomspace(600, 40, 300)[:-1], np.linspace(-40, 40, 4001), np.geomspace(40, 600, 300)[1:]])
"""Values of logit p between which rest points are looked for."""


@dataclass(frozen=True)
class RestPoints:
    """Success probabilities at which the expected update vanishes, in ascending order.

    Attributes:
        stable: the update pushes back towards them.
        unstable: it pushes away; above the largest of these, p runs to 1.
        posterior: p*'s success probability at the same beta, for comparison.
    """

    stable: tuple[float, ...]
    unstable: tuple[float, ...]
    posterior: float

    def __str__(self) -> str:
        if not self.stable:
            return f"p runs to 1, no rest point inside (p* has {_shown(self.posterior)})"
        text = "p = " + ", ".join(map(_shown, self.stable)) + " stable"
        if self.unstable:
            text += "; p = " + ", ".join(map(_shown, self.unstable)) + " UNSTABLE"
            if self.unstable[-1] > self.stable[-1]:
                text += ", above it p runs to 1"
        return f"{text} (p* has {_shown(self.posterior)})"

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {"stable": list(self.stable), "unstable": list(self.unstable), "posterior": self.posterior}


def rest_points(
    beta: float,
    *,
    p0: float = 0.2,
    group: int | None = None,
    ddof: int = 0,
    eps: float = 0.0,
    scale: str = "group std",
    shrink: float = 1.0,
    forward: bool = False,
) -> RestPoints:
    """All rest points in the open interval.

    Args:
        group: draws a prompt; None for very many.
        scale: "group std", or "none" for an advantage that is `shrink` times the reward minus its mean.
        forward: the KL's gradient is that of KL(pi0 || pi) (k3 in the loss), not of KL(pi || pi0).

    Raises:
        InputError: for a beta that is not positive, or a p0 outside (0, 1).
    """
    if not beta > 0:
        raise InputError(f"beta is {beta:g}; it must be positive for a rest point to exist")
    if not 0 < p0 < 1:
        raise InputError(f"p0 is {p0:g}; it is the prior's success probability and must lie between 0 and 1")
    prior = math.log(p0 / (1 - p0))

    def drift(logit: float) -> float:
        p, q = _sigmoid(logit), _sigmoid(-logit)
        gap = shrink if scale == "none" else advantage_gap(p, q, group, ddof, eps)
        if forward:
            return gap + beta * (p0 / p - (1 - p0) / q)
        return gap - beta * (logit - prior)

    stable, unstable = _roots(drift)
    posterior = _sigmoid(prior + 1 / beta)
    return RestPoints(tuple(map(_sigmoid, stable)), tuple(map(_sigmoid, unstable)), posterior)


def advantage_gap(p: float, q: float, group: int | None, ddof: int = 0, eps: float = 0.0) -> float:
    """Expected normalised advantage of a success minus that of a failure, success probability p = 1 - q.

    Args:
        group: draws a prompt; None for very many, where it is 1 / (sqrt(p q) + eps).
    """
    if group is None:
        return 1 / (math.sqrt(p * q) + eps)
    total = 0.0
    for successes in range(1, group):  # a success and a failure both present; else every advantage is 0
        share = successes / group
        std = math.sqrt(share * (1 - share) * group / (group - ddof))
        # Seen from one draw that succeeded, successes - 1 of the others did; from one that failed, all of them are others.
        of_success = math.comb(group - 1, successes - 1) * p ** (successes - 1) * q ** (group - successes)
        of_failure = math.comb(group - 1, successes) * p**successes * q ** (group - 1 - successes)
        total += (of_success * (1 - share) + of_failure * share) / (std + eps)
    return total


def _roots(drift: Callable[[float], float]) -> tuple[list[float], list[float]]:
    values = [drift(float(x)) for x in GRID]
    stable, unstable = [], []
    for left, right, low, high in zip(GRID, GRID[1:], values, values[1:], strict=False):
        if low == 0 or low * high < 0:
            root = float(brentq(drift, float(left), float(right), xtol=1e-14))  # pyright: ignore[reportArgumentType]
            (stable if low > high else unstable).append(root)
    return stable, unstable


def _shown(p: float) -> str:
    return f"{p:.6f}" if p < 1 - 1e-6 else f"1 − {1 - p:.1e}" if p < 1 else "1"


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
