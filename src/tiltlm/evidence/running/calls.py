"""One function, many completions: what is asked, in which calls, and what came of each completion.

An answer is a value, or the exception that stands for it. Completions of one call that failed hold one and the same exception,
and `answers_of` then asks for each of them alone, to find which are at fault.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tiltlm.errors import InputError, TiltWarning
from tiltlm.evidence.running.coroutines import finished
from tiltlm.evidence.running.tally import count
from tiltlm.evidence.running.worker import Unusable, listed, place_of

TextFunction = Callable[..., Sequence[float]]
"""`fn(prompts=…, completions=…, completion_ids=…, **columns)`, by name, any of them -> one value a completion."""


class Failure(Exception):
    """A call that came to nothing. The message is the end of a sentence about the function.

    Attributes:
        names: of the exception's classes, its own first, where it was raised in another process.
        status: the HTTP status that it carried there.
    """

    names: tuple[str, ...] = ()
    status: int | None = None


class NotAsked(Failure):
    """Nothing was asked of this completion, because an earlier one had failed."""


@dataclass(frozen=True)
class Request:
    """What is asked of a function.

    Attributes:
        arguments: by name, one entry a completion in each.
        count: completions.
        most: most completions in a call; None for any number.
        stop: whether to ask nothing further once a call has failed.
    """

    arguments: Mapping[str, Sequence[Any]]
    count: int
    most: int | None = None
    stop: bool = False

    def rows(self, index: Sequence[int], **changes: Any) -> Request:
        """The same for the completions at `index`."""
        arguments = {name: [values[i] for i in index] for name, values in self.arguments.items()}
        return replace(self, arguments=arguments, count=len(index), **changes)

    def calls(self, most: int | None = None) -> Iterator[Request]:
        """The request in pieces of at most `most` completions, by default its own `most`."""
        size = most or self.most or self.count
        for first in range(0, self.count, size):
            yield self.rows(range(first, min(first + size, self.count)))

    def fresh(self) -> dict[str, Any]:
        """The arguments for one call, which may do to them what it likes."""
        return {name: _copied(list(values)) for name, values in self.arguments.items()}


class Layer(ABC):
    """A function around a function: same arguments, same name, same bounds.

    Called like the function it wraps, it returns the values or raises what the first completion at fault raised.
    """

    def __init__(self, fn: TextFunction) -> None:
        self.fn = fn

    @abstractmethod
    def attempt(self, request: Request) -> list[Any]:
        """An answer for each completion; nothing is searched for."""

    def load(self) -> None:
        """Do now what could fail before the first call, such as loading the function in a worker."""
        if isinstance(self.fn, Layer):
            self.fn.load()

    def close(self) -> None:
        """Give back what is held: processes, files. A later call takes it anew."""
        if isinstance(self.fn, Layer):
            self.fn.close()

    def __call__(self, **arguments: Sequence[Any]) -> list[Any]:
        first = next(iter(arguments.values()), ())
        answers = answers_of(self, Request(arguments, len(first), stop=True))
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, NotAsked):
                raise answer
        return answers

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # both are the instance's; the class has its own
            return self._label()
        if name == "__signature__":
            return self._signature()
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _label(self) -> str:
        return label_of(self.fn)

    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.fn)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The wrapped function's own bounds, if it declares any."""
        return getattr(self.fn, "bounds", None)


def label_of(fn: TextFunction) -> str:
    """What a function is called where the user gave it no name: its `label` if it has one, as named parts do."""
    label = getattr(fn, "label", None)
    return label if isinstance(label, str) else getattr(fn, "__name__", type(fn).__name__)


def attempt(fn: TextFunction, request: Request) -> list[Any]:
    """Ask once: an answer for each completion.

    Raises:
        Unusable: if the function does not return one value a completion.
    """
    if isinstance(fn, Layer):
        return fn.attempt(request)
    answers: list[Any] = []
    for part in request.calls():
        if request.stop and any(isinstance(answer, Exception) for answer in answers):
            answers += [NotAsked()] * part.count
            continue
        count("calls")
        count("completions", part.count)
        try:
            answers += listed(finished(fn(**part.fresh())), part.count)
        except (InputError, Unusable):
            raise
        except SystemExit as error:  # no exception of the function's may end the run without a word
            answers += [_left(error)] * part.count
        except Exception as error:
            answers += [error] * part.count
    return answers


def answers_of(fn: TextFunction, request: Request) -> list[Any]:
    """Ask, and find the completions at fault: those whose call failed are asked for one by one.

    Raises:
        Unusable: if the function does not return one value a completion, or raises for several together and for none alone.
    """
    answers: list[Any] = [NotAsked()] * request.count
    todo = list(range(request.count))
    while todo:
        _fill(answers, todo, attempt(fn, request.rows(todo)))
        for error, rows in _together(answers, todo):
            _fill(answers, rows, attempt(fn, request.rows(rows, most=1)))
            if not any(isinstance(answers[row], Exception) for row in rows):
                _none_alone(fn, error, len(rows))
        todo = [row for row in todo if isinstance(answers[row], NotAsked)]
        if any(isinstance(a, Exception) and not isinstance(a, NotAsked) for a in answers):
            break
    return answers


def _fill(answers: list[Any], rows: Sequence[int], found: Sequence[Any]) -> None:
    for row, answer in zip(rows, found, strict=True):
        answers[row] = answer


def _together(answers: Sequence[Any], rows: Sequence[int]) -> list[tuple[Exception, list[int]]]:
    """The calls that failed for more than one completion: their exception, and the completions."""
    calls: dict[int, tuple[Exception, list[int]]] = {}
    for row in rows:
        answer = answers[row]
        if isinstance(answer, Exception) and not isinstance(answer, NotAsked):
            calls.setdefault(id(answer), (answer, []))[1].append(row)
    return [(error, found) for error, found in calls.values() if len(found) > 1]


def _none_alone(fn: TextFunction, error: Exception, size: int) -> None:
    if not isinstance(error, Failure) or error.names:
        raise Unusable(
            f"{told(error)} for {size} completions together, though for none of them alone; mend it"
        ) from error
    warnings.warn(
        f"{label_of(fn)!r} {error} for {size} completions together, though for none of them alone; they were judged one by one: "
        f"set batch to fewer, or allow a call more",
        TiltWarning,
        stacklevel=2,
    )


def told(error: BaseException) -> str:
    """An exception as the end of a sentence about the function."""
    message = " ".join(str(error).split())
    if isinstance(error, Failure | Unusable):
        return message
    what = f"raised {type(error).__name__} ({message})" if message else f"raised {type(error).__name__}"
    return what + place_of(error)


def _left(error: SystemExit) -> Failure:
    """`sys.exit` in a function that runs here, as a worker process tells of it."""
    failure = Failure(f"raised SystemExit ({error})")
    failure.names = ("SystemExit",)
    return failure


def _copied(value: Any) -> Any:
    """Lists and dictionaries anew, what is in them as it is."""
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value
