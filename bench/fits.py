"""Exponents of cost curves."""

from __future__ import annotations

import math
from collections.abc import Sequence


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size by least squares: 1 is linear, below 1 a fixed part is left to be paid off."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - middle) ** 2 for value in x)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / spread if spread else math.nan


def last_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The same between the two largest sizes, where a superlinear part shows first."""
    return exponent(sizes[-2:], costs[-2:])
