"""What this machine can do: its rate of matrix products at the shapes that matter, and its memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

LARGE = 2048
MEGABYTES = 256
LONG_ENOUGH = 0.15
"""Seconds of one measurement."""
TRIES = 3


@dataclass(frozen=True)
class Machine:
    """Measured rates.

    Attributes:
        rates: operations a second by precision and shape (rows, in, out).
        bandwidth: bytes a second, the best of reading and copying.
    """

    rates: dict[str, dict[tuple[int, int, int], float]]
    bandwidth: float
    copies: dict[str, float] = field(default_factory=dict)

    def best(self, dtype: str) -> float:
        """The highest rate of any shape."""
        return max(self.rates[dtype].values())


def measure(device: str, dtypes: Iterable[str], shapes: Iterable[tuple[int, int, int]]) -> Machine:
    """Measure a machine.

    Args:
        shapes: (rows, in, out) of products beside a large square one.
    """
    wanted = [(LARGE, LARGE, LARGE), *dict.fromkeys(shapes)]
    rates = {dtype: {shape: product_rate(device, dtype, shape) for shape in wanted} for dtype in dtypes}
    copies = bandwidths(device)
    return Machine(rates, max(copies.values()), copies)


def product_rate(device: str, dtype: str, shape: tuple[int, int, int]) -> float:
    """Operations a second of x @ W.T, as linear layers do it."""
    rows, into, out = shape
    kind = getattr(torch, dtype)
    x, weight = torch.randn(rows, into, device=device, dtype=kind), torch.randn(out, into, device=device, dtype=kind)
    with torch.inference_mode():
        return 2.0 * rows * into * out / fastest(lambda: torch.nn.functional.linear(x, weight), device)


def bandwidths(device: str) -> dict[str, float]:
    """Bytes a second of copying (read and written ones count) and of adding up."""
    size = MEGABYTES * 2**20
    source = torch.ones(size // 4, device=device)
    other = torch.empty_like(source)
    with torch.inference_mode():
        return {
            "copy": 2 * size / fastest(lambda: other.copy_(source), device),
            "read": size / fastest(source.sum, device),
        }


def fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of one call: the best of some tries, each of as many calls as are long enough to time."""
    work()
    began = now(device)
    work()
    calls = max(1, int(LONG_ENOUGH / max(now(device) - began, 1e-6)))
    best = float("inf")
    for _ in range(TRIES):
        began = now(device)
        for _ in range(calls):
            work()
        best = min(best, (now(device) - began) / calls)
    return best


def now(device: str) -> float:
    """The clock, once the device has done all that it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
