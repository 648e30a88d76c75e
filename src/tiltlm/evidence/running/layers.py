"""Few completions a call, and another try when a remote service fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator

from tiltlm.errors import InputError
from tiltlm.evidence.running.calls import Failure, Layer, NotAsked, Request, TextFunction, attempt
from tiltlm.evidence.running.tally import count
from tiltlm.evidence.running.worker import status_of

TRANSIENT = (
    "ConnectionError",
    "TimeoutError",
    "Timeout",  # requests
    "TransportError",  # httpx
    "APIConnectionError",  # openai and what follows it; its timeouts too
    "RateLimitError",
    "InternalServerError",
)
"""Classes of exceptions, by name, that another try may cure: so no client needs to be imported to be known."""
TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that another try may cure: those of httpx and requests are told by these alone, a 404 has the same class."""


class Batched(Layer):
    """A function that gets at most `size` completions in a call."""

    def __init__(self, fn: TextFunction, size: int) -> None:
        if size < 1:
            raise InputError(f"batch is {size}; give the most completions in a call, at least 1")
        super().__init__(fn)
        self.size = size

    def attempt(self, request: Request) -> list[Any]:
        """The same, in smaller calls."""
        return attempt(self.fn, replace(request, most=min(self.size, request.most or self.size)))

    def __repr__(self) -> str:
        return f"Batched({self.fn!r}, {self.size})"


class Retried(Layer):
    """A function that is asked again where it raised something that may pass, after a pause that grows.

    The pause before the k-th further try is uniform on [0, min(longest, first·2^(k-1))] seconds ("full jitter": Brooker, "Exponential
    Backoff and Jitter", AWS Architecture Blog, 2015), so that many clients do not come back at the same moment. Only the completions
    that failed are asked for again.

    Args:
        fn: the function.
        times: further tries.
        on: exceptions to try again for, as classes or names of classes; their subclasses are meant too. By default also those that
            carry one of `TRANSIENT_STATUS`.
        first, longest: bounds of the pause, in seconds.
        rng: for the pauses; they are not reproducible without it.
        sleep: how to wait.
    """

    def __init__(
        self,
        fn: TextFunction,
        times: int = 3,
        *,
        on: Sequence[type[Exception] | str] = TRANSIENT,
        first: float = 0.5,
        longest: float = 30.0,
        rng: Generator | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if times < 0:
            raise InputError(f"retries is {times}; give the number of further tries, 0 for none")
        if not 0 <= first <= longest:
            raise InputError(f"the pause goes from {first} to {longest} s; give 0 <= first <= longest")
        super().__init__(fn)
        self.times, self.first, self.longest, self.rng, self.sleep = times, first, longest, rng, sleep
        self.statuses = TRANSIENT_STATUS if on is TRANSIENT else frozenset()
        self.on = frozenset(kind if isinstance(kind, str) else kind.__name__ for kind in on)

    def attempt(self, request: Request) -> list[Any]:
        """Ask, and ask again for what failed in passing."""
        answers = attempt(self.fn, request)
        for further in range(self.times):
            rows = [row for row, answer in enumerate(answers) if self._may_pass(answer)]
            if not rows:
                break
            rows += [row for row, answer in enumerate(answers) if isinstance(answer, NotAsked)]
            self.sleep(self._pause(further))
            count("retried", len(rows))
            for row, answer in zip(rows, attempt(self.fn, request.rows(rows)), strict=True):
                answers[row] = answer
        return answers

    def _pause(self, further: int) -> float:
        return min(self.longest, self.first * 2**further) * float(torch.rand((), generator=self.rng))

    def _may_pass(self, answer: Any) -> bool:
        if not isinstance(answer, Exception):
            return False
        names = answer.names if isinstance(answer, Failure) else [kind.__name__ for kind in type(answer).__mro__]
        return not self.on.isdisjoint(names) or status_of(answer) in self.statuses

    def __repr__(self) -> str:
        return f"Retried({self.fn!r}, {self.times})"
