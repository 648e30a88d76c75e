"""What calling functions cost, counted where it happens.

`with counting() as tally:` counts every call of a user's function inside, however deep in a target it sits.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from tiltlm.errors import TiltWarning

What = Literal["calls", "completions", "cached", "retried", "timed_out", "died", "failed"]
COUNTED: tuple[What, ...] = ("calls", "completions", "cached", "retried", "timed_out", "died", "failed")

SLOW_SHARE, SLOW_SECONDS = 0.5, 5.0
"""A reward is slow that took more than this share of the time, once it has taken this many seconds."""


@dataclass
class Tally:
    """Counts of what happened while it was open.

    Attributes:
        counts: `calls` of functions, with the ones that were repeated; `completions` in them; `cached` ones that needed no call;
            `retried` ones, once for each time; calls that `timed_out`, and that `died` with their process; completions that
            `failed`: they have no value because the function raised, took too long or died.
        seconds: spent in each function, by its label; by the clock, waiting included.
        beside: how many of these seconds nobody waited for, because something else was done meanwhile.
    """

    counts: Counter[What] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    beside: float = 0.0

    def metrics(self) -> dict[str, float]:
        """As a training run logs them."""
        counts = {f"reward_calls/{what}": self.counts[what] for what in COUNTED}
        waited = float(sum(self.seconds.values())) - self.beside
        return {"seconds_reward": waited, "seconds_reward_beside": self.beside, **counts}

    def sent(self) -> tuple[dict[What, int], dict[str, float]]:
        """Plain values, for another process."""
        return dict(self.counts), dict(self.seconds)


def merged(tallies: Sequence[tuple[Mapping[What, int], Mapping[str, float]]]) -> Tally:
    """What several processes counted at the same time: all of their calls, and the seconds of the slowest in each function."""
    whole = Tally()
    for counts, seconds in tallies:
        whole.counts.update(counts)
        for label, taken in seconds.items():
            whole.seconds[label] = max(whole.seconds[label], taken)
    return whole


_open: ContextVar[tuple[Tally, ...]] = ContextVar("open tallies", default=())


@contextmanager
def counting() -> Iterator[Tally]:
    """Count the calls inside; tallies nest."""
    tally = Tally()
    token = _open.set((*_open.get(), tally))
    try:
        yield tally
    finally:
        _open.reset(token)


def count(what: What, number: int = 1) -> None:
    """Add to every open tally."""
    for tally in _open.get():
        tally.counts[what] += number


def report(tally: Tally) -> None:
    """Add what another thread counted to every tally that is open here."""
    for mine in _open.get():
        mine.counts.update(tally.counts)
        for label, taken in tally.seconds.items():
            mine.seconds[label] += taken
        mine.beside += tally.beside


@contextmanager
def timed(label: str) -> Iterator[None]:
    """Add the time spent inside to every open tally."""
    began = time.perf_counter()
    try:
        yield
    finally:
        taken = time.perf_counter() - began
        for tally in _open.get():
            tally.seconds[label] += taken


class SlowRewardWatch:
    """Warns once if the reward is what a run waits for."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._all, self._beside, self._said = 0.0, 0.0, False

    def look(self, tally: Tally, seconds: float) -> None:
        """One step's tally, and the seconds that the step took."""
        for label, taken in tally.seconds.items():
            self._seconds[label] += taken
        self._all += seconds
        self._beside += tally.beside
        spent = sum(self._seconds.values()) - self._beside
        if self._said or spent < SLOW_SECONDS or spent < SLOW_SHARE * self._all:
            return
        self._said = True
        slowest = max(self._seconds, key=self._seconds.__getitem__)
        warnings.warn(
            f"the reward took {spent / self._all:.0%} of the time so far, most of it {slowest!r}; judge completions side by side "
            f"with reward_workers, or keep what is deterministic with reward_cache",
            TiltWarning,
            stacklevel=2,
        )
