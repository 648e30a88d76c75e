"""Where the policy was to land, where it landed, and how far that is under the predicted frontier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tiltlm.estimates import Z95
from tiltlm.report.folder import Json, Run, finite


@dataclass(frozen=True)
class Shortfall:
    """The policy's reward against the frontier at the policy's own KL.

    Attributes:
        expected: reward that the frontier predicts at that KL.
        gap: expected minus the policy's reward.
        error: half the 95% interval of the gap, from the prediction, the policy's reward, and its KL times the slope.
        reliable: whether the plan trusts the frontier there.
    """

    expected: float
    gap: float
    error: float
    reliable: bool

    @property
    def place(self) -> Literal["on", "below", "above"]:
        if abs(self.gap) <= self.error:
            return "on"
        return "below" if self.gap > 0 else "above"


def beta_of(run: Run) -> float | None:
    """The temperature of the run: as certified, else as planned, else as asked for."""
    for source, key in ((run.certificate, "beta"), (run.plan["chosen"], "beta"), (run.recipe, "beta")):
        beta = finite(source.get(key)) if source else None
        if beta is not None:
            return beta
    return None


def frontier_of(plan: Json) -> list[Json]:
    """The frontier's points that have numbers, from the prior outwards."""
    points = [p for p in plan["frontier"] if finite(p["kl"]["value"]) is not None]
    points = [p for p in points if finite(p["reward"]["value"]) is not None]
    return sorted(points, key=lambda p: p["kl"]["value"])


def predicted(run: Run) -> Json | None:
    """The frontier's point at the run's beta; None if there is no beta, or it is off the grid."""
    beta, chosen = beta_of(run), run.plan["chosen"]
    if beta is None or (chosen and math.isclose(chosen["beta"], beta, rel_tol=0.01)):
        return chosen
    return at_beta(frontier_of(run.plan), beta)


def at_beta(frontier: list[Json], beta: float) -> Json | None:
    """The frontier between two of its points, linear in log beta; None outside."""
    ordered = sorted(frontier, key=lambda p: p["beta"])
    for left, right in pairwise(ordered):
        if left["beta"] <= beta <= right["beta"]:
            width = math.log(right["beta"] / left["beta"])
            share = math.log(beta / left["beta"]) / width if width else 0.0
            return {
                "beta": beta,
                "reward": _between(left["reward"], right["reward"], share),
                "kl": _between(left["kl"], right["kl"], share),
                "ess": (1 - share) * left["ess"] + share * right["ess"],
                "reliable": left["reliable"] and right["reliable"],
            }
    return None


def _between(left: Json, right: Json, share: float) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for key in ("value", "low", "high"):
        a, b = finite(left[key]), finite(right[key])
        values[key] = None if a is None or b is None else (1 - share) * a + share * b
    return values


def shortfall(run: Run) -> Shortfall | None:
    """How far the policy is under the predicted frontier; None without a certificate, or beyond the frontier's end."""
    if run.certificate is None:
        return None
    reward, kl = run.certificate["reward"], run.certificate["kl_prior"]
    at, got = finite(kl["value"]), finite(reward["value"])
    if at is None or got is None:
        return None
    origin: dict[str, Any] = {"kl": {"value": 0.0}, "reward": run.plan["prior_reward"], "reliable": True}
    for left, right in pairwise([origin, *frontier_of(run.plan)]):
        start, stop = left["kl"]["value"], right["kl"]["value"]
        if max(start, min(at, 0.0)) <= max(at, 0.0) <= stop and stop > start:
            share = (max(at, 0.0) - start) / (stop - start)
            band = _between(left["reward"], right["reward"], share)
            expected = band["value"]
            if expected is None:
                return None
            slope = (right["reward"]["value"] - left["reward"]["value"]) / (stop - start)
            half = 0.0 if band["low"] is None or band["high"] is None else (band["high"] - band["low"]) / 2
            error = math.hypot(
                half, Z95 * (finite(reward["stderr"]) or 0.0), slope * Z95 * (finite(kl["stderr"]) or 0.0)
            )
            return Shortfall(expected, expected - got, error, left["reliable"] and right["reliable"])
    return None
