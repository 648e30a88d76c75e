"""The alarm for reward hacking: the proxy rises while the held-out reward falls.

Both slopes are tested by least squares against time in windows of 8, 16, 32, … measurements, each window tested twice per
length, so that a fall is found soon if it is steep and later if it is slow. (Against time and not against KL: a step's KL and
rewards are means over the same draws, so their errors go together, and would make a slope by themselves.) By the union bound over
all windows of the run, a run in which the gold's mean never falls, or in which the proxy's never rises, gives an alarm with
probability at most `LEVEL`. A mean that never falls has a slope that is not negative in every window, whatever its shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr

LEVEL = 0.05
"""The chance of a false alarm in a whole run."""
SHORTEST = 8
"""Measurements in the shortest window: Student's t with 6 degrees of freedom."""


@dataclass(frozen=True)
class Alarm:
    """A window in which the proxy rose and gold fell.

    Attributes:
        first, last: steps of the window.
        proxy_slope, gold_slope: reward units a step.
        p_proxy, p_gold: one-sided p-values of the slopes, before the union bound.
        level: the chance of a false alarm in the whole run.
    """

    first: int
    last: int
    proxy_slope: float
    gold_slope: float
    p_proxy: float
    p_gold: float
    level: float = LEVEL

    def __str__(self) -> str:
        span = self.last - self.first
        return (
            f"reward hacking: from step {self.first} to {self.last} the trained reward rose by {self.proxy_slope * span:.3g} and "
            f"the held-out one fell by {-self.gold_slope * span:.3g} (false alarms: at most {self.level:.0%} of runs)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def window_lengths(count: int, total: int) -> Iterator[int]:
    """Lengths of the windows that are tested when `count` measurements are there, of `total` planned."""
    length = SHORTEST
    while length <= total:
        if count >= length and count % (length // 2) == 0:
            yield length
        length *= 2


def planned_tests(total: int) -> int:
    """Windows that a run of so many measurements tests."""
    lengths = [SHORTEST * 2**i for i in range(max(0, (total // SHORTEST).bit_length()))]
    return sum(total // (length // 2) - 1 for length in lengths)


def look(
    steps: Sequence[int], proxy: Sequence[float], gold: Sequence[float], total: int, level: float = LEVEL
) -> Alarm | None:
    """Test the windows that end at the newest measurement.

    Args:
        steps, proxy, gold: of all measurements so far, oldest first.
        total: measurements planned for the run; what comes after them is not tested.
    """
    if len(gold) > total:
        return None
    threshold = level / max(1, planned_tests(total))
    for length in window_lengths(len(gold), total):
        at = np.asarray(steps[-length:], dtype=float)
        up, p_up = _slope(at, np.asarray(proxy[-length:], dtype=float))
        down, p_down = _slope(at, -np.asarray(gold[-length:], dtype=float))
        if max(p_up, p_down) < threshold:
            return Alarm(int(at[0]), int(at[-1]), up, -down, p_up, p_down, level)
    return None


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The least-squares slope, and the one-sided p-value of its being positive."""
    centred = x - x.mean()
    if np.ptp(y) <= 1e-12 * np.abs(y).max():  # constant but for rounding
        return 0.0, 1.0
    slope = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - slope * centred
    error = math.sqrt(float(residual @ residual) / (len(x) - 2) / float(centred @ centred))
    if error <= 1e-12 * abs(slope):  # an exact line
        return slope, 0.0 if slope > 0 else 1.0
    return slope, float(stdtr(len(x) - 2, -slope / error))
