"""Named parts of rewards: what `tiltlm.rewards` is made of, and how anybody's function becomes one."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds, Formula, Values, bounds_of
from tiltlm.evidence.function import TextFunction, label_of
from tiltlm.names import name_of


@dataclass(frozen=True)
class Part(Formula):
    """One named reward. A subclass says in `score` what a text is worth, and in `reads` which columns it needs for that.

    Attributes:
        name: how it is called in logs; the class's name by default, as recipes write it.
        extent: smallest and largest value of every instance; None where there are none, or where settings decide (`bounds`).
        on_prefixes: whether the value of an unfinished text says something of the finished one, so that SMC may steer by it.
    """

    extent: ClassVar[Bounds | None] = None
    on_prefixes: ClassVar[bool] = False
    name: str = field(default="", kw_only=True)

    @property
    def label(self) -> str:
        return self.name or name_of(type(self))

    @property
    def identity(self) -> str:
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        plain = (f"{name}={value!r}" for name, value in settings.items() if _is_plain(value))
        return f"{self.label}({', '.join(plain)})"

    @property
    def bounds(self) -> Bounds | None:
        return self.extent

    @property
    def reads(self) -> tuple[str, ...]:
        """What it needs besides the completions: `prompts`, `completion_ids`, or columns of the data."""
        return ()

    def parts(self) -> tuple[TextFunction, ...]:
        return (self,)

    def combine(self, values: Values) -> Float[Tensor, " B"]:
        return values[id(self)]

    def signature(self) -> inspect.Signature:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind) for name in ("completions", *self.reads)])

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """One value a completion; completions are texts, or conversations as lists of messages.

        Raises:
            InputError: if a column that it reads is not given.
        """
        missing = [name for name in self.reads if name not in columns]
        if missing:
            raise InputError(f"reward {self.label!r} reads {missing[0]!r}; give it, one value a completion")
        return self.score([text_of(c) for c in completions], **{name: columns[name] for name in self.reads})

    @abstractmethod
    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """The value of each text.

        Args:
            columns: those of `reads`, one value a text.
        """


@dataclass(frozen=True)
class Function(Part):
    """Anybody's reward function as a part, with what is known of it."""

    fn: TextFunction
    known: Bounds | None = None

    @property
    def label(self) -> str:
        return self.name or label_of(self.fn)

    @property
    def identity(self) -> str:
        return self.label

    @property
    def bounds(self) -> Bounds | None:
        return self.known or bounds_of(self.fn)

    def signature(self) -> inspect.Signature:
        return inspect.signature(self.fn)

    def __call__(self, *args: Any, **columns: Any) -> list[float]:
        return list(self.fn(*args, **columns))

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return self(completions=texts, **columns)


@dataclass(frozen=True)
class Column(Part):
    """A column of the data, as numbers: the same for all completions of a prompt, so that alone it changes no p*."""

    column: str

    @property
    def label(self) -> str:
        return self.name or self.column

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [self._number(value) for value in columns[self.column]]

    def _number(self, value: Any) -> float:
        try:
            return float(value)  # of a CSV it is a text
        except (TypeError, ValueError) as error:
            raise InputError(f"column {self.column!r} holds {value!r:.60}, which is not a number; mend it") from error


def named_parts(reward: TextFunction) -> list[Part]:
    """The named parts in a reward; functions are none."""
    found = reward.parts() if isinstance(reward, Formula) else ()
    return [part for part in found if isinstance(part, Part) and not isinstance(part, Function | Column)]


def text_of(completion: Any) -> str:
    """The text of a completion: of a conversation, what its messages say, one under the other."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and all(isinstance(m, Mapping) and "content" in m for m in completion):
        return "\n".join(str(message["content"] or "") for message in completion)
    raise InputError(f"a completion is {completion!r:.80}; it must be a text, or a list of messages with 'content'")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)
