"""What a reward is learned from: rows of comparisons, scores or labels, as tasks over answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.lm.given import answer_of, comparison, field_of, is_conversation
from tiltlm.lm.trunk import Answer
from tiltlm.reward_models.glm import Categorical, Gaussian, Logistic, Loss
from tiltlm.reward_models.posterior import bootstrap_rows

Kind = Literal["preference", "regression", "classification"]
COLUMNS: Mapping[Kind, str] = {"preference": "chosen", "regression": "score", "classification": "label"}
"""The column by which a kind of rows is told."""


@dataclass(frozen=True)
class Task:
    """Rows of one kind, for one head.

    Attributes:
        answers: every (prompt, completion) once.
        rows: for each row its answer's place; of a comparison, the chosen one's and the rejected one's.
        target: score, or the class's place in `classes`; 1 for comparisons.
        margin: by how much the chosen one has to win, in reward units; 0 where nothing is said.
        smoothing: probability that a label is wrong, whatever the text.
        classes: names of the classes.
    """

    kind: Kind
    answers: tuple[Answer, ...]
    rows: Int[Tensor, "N S"]
    target: Float[Tensor, " N"]
    margin: Float[Tensor, " N"]
    smoothing: float = 0.0
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def biased(self) -> bool:
        """Whether the head has a bias: of a difference there is none."""
        return self.kind != "preference"

    def loss(self, noise: float = 1.0) -> Loss:
        """The negative log-likelihood of all rows."""
        if self.kind == "regression":
            return Gaussian(self.target, noise)
        if self.kind == "preference":
            return Logistic(self.target - self.smoothing, self.margin)
        if len(self.classes) == 2:
            return Logistic((1 - 2 * self.smoothing) * self.target + self.smoothing, self.margin)
        return Categorical(self.target.long(), len(self.classes), self.smoothing)

    def select(self, rows: Int[Tensor, " M"]) -> Task:
        """Some of the rows, which may repeat; the answers stay."""
        return replace(self, rows=self.rows[rows], target=self.target[rows], margin=self.margin[rows])

    def bootstrapped(self, rng: Generator) -> Task:
        """As many rows, drawn with replacement."""
        return self.select(bootstrap_rows(len(self), rng))


def task_of(
    rows: Sequence[Mapping[str, Any]],
    kind: Kind | None = None,
    *,
    column: str = "prompt",
    label_smoothing: float = 0.0,
    classes: Sequence[str] = (),
) -> Task:
    """Rows as a task.

    Args:
        rows: with `chosen` and `rejected` (TRL's columns, plain or conversational, and `margin` if there is one), or with
            `completion` (or `text`) and `score` or `label`. `column` holds the prompt; without it the prompt is empty.
        kind: of the rows; by default it is told by their columns.
        label_smoothing: probability that a label is wrong, below a half.
        classes: names of the classes in order; those that occur, sorted, by default.

    Raises:
        InputError: naming the row and what is wrong with it.
    """
    if not rows:
        raise InputError("there are no rows: the list is empty; give at least one")
    if not 0 <= label_smoothing < 0.5:
        raise InputError(
            f"label_smoothing is {label_smoothing}; it is the share of wrong labels, at least 0 and below 0.5"
        )
    kind = kind or next((k for k, name in COLUMNS.items() if name in rows[0]), None)
    if kind is None:
        raise InputError(
            f"rows have the columns {', '.join(map(repr, rows[0]))}; they need chosen and rejected, or completion (or text) with "
            f"score or label"
        )
    if kind == "preference":
        task = _comparisons(rows, column)
    else:
        task = _judged(rows, kind, column, tuple(map(str, classes)))
    return replace(task, smoothing=label_smoothing if kind != "regression" else 0.0)


def _comparisons(rows: Sequence[Mapping[str, Any]], column: str) -> Task:
    places: dict[str, int] = {}
    answers: list[Answer] = []
    index, margins = [], []
    for number, row in enumerate(rows, 1):
        whole = row if column in row or is_conversation(row.get("chosen")) else {column: "", **row}
        written = comparison(whole, number, column)
        pair = [_place(_prompt(written.prompt), answer_of(c, number), places, answers) for c in written.completions]
        if pair[0] == pair[1]:
            raise InputError(
                f"row {number}: chosen and rejected are the same, {answers[pair[0]][1]!r:.60}; leave the row out"
            )
        index.append(pair)
        margins.append(_number(row.get("margin") or 0.0, "margin", number))
    count = len(rows)
    margin = torch.tensor(margins, dtype=torch.float64)
    return Task("preference", tuple(answers), torch.tensor(index), torch.ones(count, dtype=torch.float64), margin)


def _judged(rows: Sequence[Mapping[str, Any]], kind: Kind, column: str, classes: tuple[str, ...]) -> Task:
    places: dict[str, int] = {}
    answers: list[Answer] = []
    index, values = [], []
    for number, row in enumerate(rows, 1):
        text = row["text"] if "completion" not in row and "text" in row else field_of(row, "completion", number)
        index.append([_place(_prompt(row.get(column) or ""), answer_of(text, number), places, answers)])
        values.append(field_of(row, COLUMNS[kind], number))
    if kind == "regression":
        target = [_number(value, "score", number) for number, value in enumerate(values, 1)]
    else:
        names = [str(value) for value in values]
        blank = next((n for n, name in enumerate(names, 1) if not name.strip()), None)  # an empty cell of a CSV
        if blank is not None:
            raise InputError(f"row {blank} has no label ({names[blank - 1]!r}); give one, or leave the row out")
        classes = classes or tuple(sorted(set(names)))  # in the order of their names
        if len(classes) < 2:
            raise InputError(f"all {len(rows)} rows have the label {names[0]!r}; a classifier needs at least two")
        unknown = next((n for n, name in enumerate(names, 1) if name not in classes), None)
        if unknown is not None:
            raise InputError(
                f"row {unknown} has label {names[unknown - 1]!r}, which is not one of {', '.join(classes)}"
            )
        target = [float(classes.index(name)) for name in names]
    zero = torch.zeros(len(rows), dtype=torch.float64)
    return Task(
        kind, tuple(answers), torch.tensor(index), torch.tensor(target, dtype=torch.float64), zero, classes=classes
    )


def answers_of(prompts: Sequence[Any], completions: Sequence[Any]) -> list[Answer]:
    """Prompts and completions as a reward function gets them, texts or messages, as answers."""
    pairs = enumerate(zip(prompts, completions, strict=True), 1)
    return [(_prompt(prompt), answer_of(completion, number)) for number, (prompt, completion) in pairs]


def _prompt(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(dict(message) for message in value)


def _place(prompt: Any, completion: str, places: dict[str, int], answers: list[Answer]) -> int:
    key = repr((prompt, completion))
    if key not in places:
        places[key] = len(answers)
        answers.append((prompt, completion))
    return places[key]


def _number(value: Any, name: str, number: int) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"row {number} has {name} {value!r:.60}, which is not a number; mend it") from error
    if not math.isfinite(found):
        raise InputError(f"row {number} has {name} {found}; give finite numbers")
    return found
