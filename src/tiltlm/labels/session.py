"""A labelling session: a folder with candidates, questions and answers that survives whatever happens to the process."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.labels.acquisition import Acquisition
from tiltlm.labels.candidates import Candidates
from tiltlm.labels.journal import Journal
from tiltlm.records import Text
from tiltlm.seeds import generator

Answer = Literal["first", "second", "tie", "skip"]
"""Which text is better; neither; or no answer, and the pair is not asked about again."""

KEYS: dict[str, Answer] = {"1": "first", "2": "second", "=": "tie", "s": "skip"}
"""Short forms of the answers, for keyboards and files."""


@dataclass(frozen=True)
class Question:
    """Which of two completions of a prompt is better?

    Attributes:
        number: of the question in its session, from 0.
        pair: the row of the candidates' `pairs`.
        first, second: the texts in the order in which they are shown, which a seeded coin decides.
        swapped: whether that is the other order than the pair's.
        score: what the rule that chose it thinks of it.
    """

    number: int
    pair: int
    prompt: Text
    first: str
    second: str
    swapped: bool
    score: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: what somebody needs who answers from a file."""
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        return {"question": self.number, "prompt": prompt, "first": self.first, "second": self.second}


class Session:
    """What was asked and answered, in a folder; `create` makes one and `open` goes on with it.

    The folder holds `session.json` (seed and candidates, written once) and `log.jsonl`, to which every batch of questions and
    every answer is added and flushed to the disk at once. What is asked next depends on the seed and on the log alone, so that
    a session that was killed goes on as if nothing had happened.

    Iterating gives the open questions until none is left:

        for question in session:
            session.answer(question, "first")
    """

    def __init__(self, folder: Path, candidates: Candidates, seed: int) -> None:
        self.folder, self.candidates, self.seed = folder, candidates, seed
        self._journal = Journal(folder / "log.jsonl")
        self._asked: list[dict[str, Any]] = []
        self._answers: dict[int, Answer] = {}
        self._rules: Counter[str] = Counter()
        for event in self._journal.events:
            self._take(event)

    @classmethod
    def create(cls, folder: str | Path, candidates: Candidates, *, seed: int = 0) -> Session:
        """A new session.

        Raises:
            InputError: if the folder holds one already, or cannot be written.
        """
        folder = Path(folder)
        if (folder / "session.json").exists():
            raise InputError(f"{folder} holds a session already; go on with it (Session.open), or give another folder")
        partial = folder / ".session.json.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as handle:
                json.dump({"seed": seed, "candidates": candidates.as_dict()}, handle, ensure_ascii=False, default=str)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, folder / "session.json")
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error
        return cls(folder, candidates, seed)

    @classmethod
    def open(cls, folder: str | Path) -> Session:
        """The session in a folder, as its last whole line left it.

        Raises:
            InputError: if there is none, or its files were tampered with.
        """
        folder = Path(folder)
        try:
            values = json.loads((folder / "session.json").read_text(encoding="utf-8"))
            candidates, seed = Candidates.from_dict(values["candidates"]), int(values["seed"])
        except OSError as error:
            raise InputError(
                f"{folder} holds no session ({error.strerror}); make one with tiltlm reward ask"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / 'session.json'} is no session's ({error}); give another folder") from error
        return cls(folder, candidates, seed)

    # --- asking ---

    def ask(self, n: int, by: Acquisition, members: Float[Tensor, "K B"] | None = None) -> list[Question]:
        """Choose `n` pairs that were not asked about yet (fewer if fewer are left), and keep them as questions.

        Args:
            by: the rule.
            members: rewards of every completion of the candidates under draws of the reward's posterior.

        Raises:
            InputError: if the rule needs more members than there are.
        """
        if n < 1:
            raise InputError(f"n is {n}; ask at least one question")
        count = 0 if members is None else len(members)
        if count < by.least_members:
            raise InputError(
                f"by is {by.name!r}, which compares at least {by.least_members} members of the reward's posterior, and there "
                f"are {count}; give members, or ask by random"
            )
        given = torch.zeros(0, len(self.candidates.completions)) if members is None else members
        rng = generator(self.seed, f"ask/{by.name}", len(self._asked))
        chosen = by.choose(self.candidates, given, self.free, n, rng)
        if chosen:
            start = len(self._asked)
            coin = torch.rand(len(chosen), generator=generator(self.seed, "order", start)) < 0.5
            asked = [
                {"question": start + place, "pair": pair, "swapped": bool(coin[place]), "score": score}
                for place, (pair, score) in enumerate(chosen)
            ]
            self._add({"event": "asked", "by": by.name, "questions": asked})
        return [self.question(len(self._asked) - len(chosen) + place) for place in range(len(chosen))]

    def question(self, number: int) -> Question:
        """A question by its number.

        Raises:
            InputError: if it was never asked.
        """
        if not 0 <= number < len(self._asked):
            raise InputError(f"question {number} was never asked; this session has {len(self._asked)}, counted from 0")
        asked, world = self._asked[number], self.candidates
        i, j = (int(place) for place in world.pairs[asked["pair"]])
        i, j = (j, i) if asked["swapped"] else (i, j)
        return Question(
            number,
            asked["pair"],
            world.prompts[int(world.prompt_index[i])],
            world.completions[i],
            world.completions[j],
            asked["swapped"],
            asked["score"],
        )

    @property
    def free(self) -> Bool[Tensor, " M"]:
        """The pairs that were never asked about."""
        free = torch.ones(len(self.candidates), dtype=torch.bool)
        free[[asked["pair"] for asked in self._asked]] = False
        return free

    @property
    def asked(self) -> int:
        """How many questions there are, answered ones included."""
        return len(self._asked)

    @property
    def open_questions(self) -> list[Question]:
        """The questions without an answer, oldest first."""
        return [self.question(number) for number in range(len(self._asked)) if number not in self._answers]

    def __iter__(self) -> Iterator[Question]:
        """The open questions, until all are answered; an answer that is taken back is asked for again."""
        while waiting := self.open_questions:
            events = len(self._journal.events)
            yield waiting[0]
            if len(self._journal.events) == events:
                raise InputError(
                    f"question {waiting[0].number} was passed without an answer; answer it, if only by skip"
                )

    # --- answering ---

    def answer(self, question: Question | int, answer: str) -> None:
        """Keep the answer to a question; it is on the disk when this returns.

        Args:
            answer: "first", "second", "tie" or "skip", or their keys 1, 2, = and s. It is about the order shown.

        Raises:
            InputError: if the question was never asked, has an answer, or this is none.
        """
        number = question if isinstance(question, int) else question.number
        said = self.checked(number, answer)
        if number in self._answers:
            raise InputError(
                f"question {number} has the answer {self._answers[number]!r}; undo it before you change it"
            )
        self._add({"event": "answered", "question": number, "answer": said})

    def checked(self, number: int, answer: str) -> Answer:
        """The answer in its long form.

        Raises:
            InputError: if there is no such question, or no such answer.
        """
        self.question(number)
        said = KEYS.get(answer, answer)
        if said not in get_args(Answer):
            raise InputError(
                f"answer to question {number} is {answer!r}; use {', '.join(get_args(Answer))} or {' '.join(KEYS)}"
            )
        return cast(Answer, said)

    def undo(self) -> Question | None:
        """Take the latest answer back; None if there is no answer. The log keeps both the answer and the undoing."""
        if not self._answers:
            return None
        number = next(reversed(self._answers))
        self._add({"event": "undone", "question": number})
        return self.question(number)

    @property
    def answers(self) -> Mapping[int, Answer]:
        """Answers by the question's number, in the order in which they were given."""
        return dict(self._answers)

    @property
    def comparisons(self) -> Int[Tensor, "N 2"]:
        """(preferred, other) completions of every decided question, in the order of the answers; ties and skips left out."""
        rows = []
        for number, answer in self._answers.items():
            i, j = (int(place) for place in self.candidates.pairs[self._asked[number]["pair"]])
            if answer in ("first", "second"):
                rows.append((i, j) if (answer == "first") != self._asked[number]["swapped"] else (j, i))
        return torch.tensor(rows, dtype=torch.long).view(-1, 2)

    def rows(self) -> list[dict[str, Any]]:
        """The decided questions in TRL's columns, `prompt`, `chosen` and `rejected`, with the prompts' further columns.

        In a conversation, chosen and rejected are lists with the assistant's message.
        """
        world, found = self.candidates, []
        for better, worse in self.comparisons.tolist():
            owner = int(world.prompt_index[better])
            prompt = world.prompts[owner]
            chat = not isinstance(prompt, str)
            found.append({
                **{name: values[owner] for name, values in world.columns.items()},
                "prompt": list(prompt) if chat else prompt,
                **{
                    name: [{"role": "assistant", "content": world.completions[row]}] if chat else world.completions[row]
                    for name, row in (("chosen", better), ("rejected", worse))
                },
            })  # fmt: skip
        return found

    def status(self) -> dict[str, Any]:
        """How far the session is: pairs, questions by rule, answers by kind, and how often the text shown first won."""
        said = Counter(self._answers.values())
        decided = said["first"] + said["second"]
        return {
            "pairs": len(self.candidates),
            "asked": dict(self._rules),
            "open": len(self._asked) - len(self._answers),
            **{kind: said[kind] for kind in get_args(Answer)},
            "first_won": said["first"] / decided if decided else None,
        }

    # --- the log ---

    def _whole(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A question as the log keeps it, about a pair that there is."""
        if not isinstance(asked["pair"], int) or not 0 <= asked["pair"] < len(self.candidates):
            raise KeyError(asked["pair"])
        return {"pair": asked["pair"], "swapped": bool(asked["swapped"]), "score": asked["score"]}

    def _add(self, event: Mapping[str, Any]) -> None:
        self._journal.append(event)
        self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        """What an event changes."""
        try:
            match event["event"]:
                case "asked":
                    self._asked += [self._whole(asked) for asked in event["questions"]]
                    self._rules[event["by"]] += len(event["questions"])
                case "answered":
                    self._answers[event["question"]] = self.checked(event["question"], event["answer"])
                case "undone":
                    del self._answers[event["question"]]
                case kind:
                    raise KeyError(kind)
        except (KeyError, TypeError, InputError) as error:
            raise InputError(
                f"{self.folder / 'log.jsonl'} has the event {event!r:.120}, which cannot be; take it out"
            ) from error
