"""What a generator is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tiltlm.mismatch import Tolerance
from tiltlm.protocols import Law

if TYPE_CHECKING:
    from tiltlm.lm.view import View


@dataclass(frozen=True)
class Request:
    """Continue a text `n` times.

    Attributes:
        tokens: the text: a prompt, or a prompt and what was drawn so far.
        max_tokens: longest continuation.
        seed: of its random numbers; the n continuations have different ones.
    """

    tokens: tuple[int, ...]
    n: int
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Continuation:
    """What was drawn after a text, and the log-probability of each token under the law that was sampled."""

    tokens: tuple[int, ...]
    log_mu: tuple[float, ...]


@dataclass(frozen=True)
class Terms:
    """What all requests of a draw have in common.

    Attributes:
        law: temperature, top-k and stop strings; its length is in the requests.
        eos: ids that end a completion, and no others do.
        weights: the name of the weights to draw from, as `serve` gave it.
    """

    law: Law
    eos: tuple[int, ...]
    weights: str


class Generator(Protocol):
    """A program that runs a view's model and draws whole completions of it, faster than our sampler does.

    Whatever it returns is only what it says; `tiltlm.lm.generators.drawing` ends each completion where our law ends it, scores it
    with our own model, and refuses what differs too much.
    """

    @property
    def tolerance(self) -> Tolerance: ...

    def serve(self, view: View) -> str:
        """Make the view's weights, as they are now, those that are drawn from; returns their name.

        Raises:
            InputError: if it cannot.
        """
        ...

    def generate(self, requests: Sequence[Request], terms: Terms) -> list[tuple[Continuation, ...]]:
        """`n` continuations of each request. Any may stop early, for whatever reason; then it is asked to go on."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...
