"""The loop of active learning: learn from the answers so far, ask, wait for the answers, learn again."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.labels.acquisition import Acquisition
from tiltlm.labels.candidates import Candidates
from tiltlm.labels.session import Question, Session
from tiltlm.seeds import generator


class RewardPosterior(Protocol):
    """A learned Bayesian reward, as far as acquisition looks at it."""

    def members(self, features: Float[Tensor, "B D"], k: int, rng: torch.Generator) -> Float[Tensor, "K B"]:
        """Rewards of B completions under `k` draws of the reward."""
        ...


class Learner(Protocol):
    """Learns a reward from comparisons and returns draws of its posterior."""

    def __call__(
        self, candidates: Candidates, comparisons: Int[Tensor, "N 2"], rng: torch.Generator
    ) -> Float[Tensor, "K B"]:
        """Rewards of all completions under K draws of the posterior given (preferred, other) pairs; N may be 0."""
        ...


def active_learning(
    session: Session, learner: Learner | None, *, by: Acquisition, questions: int, batch: int = 8
) -> Generator[Question, str | None, None]:
    """Questions one after the other; the reward is learned anew before each batch is chosen.

    Answer with `session.answer(question, …)` in the loop's body, or by `send`:

        for question in active_learning(session, learner, by=BALD(), questions=100):
            session.answer(question, labeller(question))

    Open questions of an earlier process come first. Killed and called again, it asks what it would have asked.

    Args:
        learner: None for a rule that needs no members.
        questions: stop when the session has so many, those asked before included.
        batch: questions between one learning and the next.

    Raises:
        InputError: if a question is passed without an answer.
    """
    if batch < 1:
        raise InputError(f"batch is {batch}; ask at least one question at a time")
    while True:
        for question in session:
            said = yield question
            if said is not None:
                session.answer(question, said)
        n = min(batch, questions - session.asked)
        if n < 1 or not session.free.any():
            return
        members = None
        if learner is not None and by.least_members:
            rng = generator(session.seed, "learn", session.asked)
            members = learner(session.candidates, session.comparisons, rng)
        session.ask(n, by, members)
