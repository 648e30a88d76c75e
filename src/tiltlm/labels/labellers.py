"""Who answers: a reward function, with Bradley–Terry noise if wanted, or a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.function import TextFunction, label_of, number_fault, values_of
from tiltlm.labels.session import Question, Session
from tiltlm.seeds import generator

Labeller = Callable[[Question], str]
"""Answers a question: "first", "second", "tie" or "skip"."""


@dataclass(frozen=True)
class Oracle:
    """Answers by a reward function: all completions are judged once, when the oracle is made.

    Attributes:
        session: whose questions it answers.
        fn: the reward, as in `tiltlm.Reward`.
        temperature: of Bradley–Terry noise, in the reward's units: P(first) = sigma((r1 - r2) / temperature). 0 is no noise:
            the better text wins, and equal rewards are a tie. With noise, the same seed and question give the same answer.
        seed: of the noise.
    """

    session: Session
    fn: TextFunction
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (no noise) or positive")
        draws = self.session.candidates.as_draws()
        reward, _ = values_of(self.fn, draws, "reward", label_of(self.fn), number_fault(None))
        object.__setattr__(self, "_reward", reward)

    def __call__(self, question: Question) -> str:
        """The answer, about the order shown."""
        i, j = self.session.candidates.pairs[question.pair].tolist()
        i, j = (j, i) if question.swapped else (i, j)
        reward: Tensor = self.__dict__["_reward"]
        gap = float(reward[i] - reward[j])
        if self.temperature:
            chance = generator(self.seed, "oracle", question.number)
            wins = torch.rand((), generator=chance, dtype=torch.float64) < torch.sigmoid(
                torch.tensor(gap / self.temperature)
            )
            return "first" if wins else "second"
        return "tie" if gap == 0 else "first" if gap > 0 else "second"


@dataclass(frozen=True)
class AnswerFile:
    """Answers from a file of JSON lines, each with `question` (its number) and `answer`.

    The lines may be the questions as `tiltlm reward ask` wrote them, with an `answer` put in; lines without one are open.
    """

    file: Path

    def read(self) -> dict[int, str]:
        """Answers by question.

        Raises:
            InputError: naming the line and what is wrong with it.
        """
        try:
            lines = self.file.read_text(encoding="utf-8").split("\n")  # texts may have other breaks
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"answers {str(self.file)!r} cannot be read ({error}); give a file of JSON lines"
            ) from error
        found: dict[int, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                question, answer = row["question"], row.get("answer")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f'{self.file} line {number} is {line!r:.60}; write {{"question": 0, "answer": "first"}}'
                ) from error
            if not isinstance(question, int) or isinstance(question, bool):
                raise InputError(f"{self.file} line {number} has question {question!r}; give its number")
            if answer is None:
                continue
            if question in found:
                raise InputError(f"{self.file} line {number} answers question {question} again; leave one answer")
            found[question] = str(answer)
        return found

    def into(self, session: Session) -> int:
        """Give the file's answers to the session, all or none; answers that it has already, and that agree, are passed over.

        Returns:
            How many were new.

        Raises:
            InputError: for a question that was never asked, an answer that is none, or one that contradicts what is kept.
        """
        known, new = session.answers, {}
        for number, answer in self.read().items():
            said = session.checked(number, answer)
            if number not in known:
                new[number] = said
            elif known[number] != said:
                raise InputError(
                    f"{self.file} says {said!r} to question {number}, which has the answer {known[number]!r}; take it out of the file"
                )
        for number, said in new.items():
            session.answer(number, said)
        return len(new)
