"""`Isolated`: a user's function in worker processes, where it may hang, crash or eat memory and the run goes on."""

from __future__ import annotations

import inspect
import math
import os
import pickle
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tiltlm.errors import InputError
from tiltlm.evidence.running.calls import Failure, Layer, NotAsked, Request, TextFunction, label_of
from tiltlm.evidence.running.pool import Pool, Reply
from tiltlm.evidence.running.tally import count
from tiltlm.evidence.running.worker import Unusable


class Isolated(Layer):
    """A function that runs in worker processes. Needs POSIX (Linux, macOS).

    The workers are fresh interpreters (not forks: a fork of a process with torch's threads can deadlock), each with a process group
    of its own, started when first needed and kept. The completions of a batch are shared out among them. A call that takes
    too long is killed with everything that it started, a worker that dies is replaced, and in both cases the batch is judged again
    one by one, so that only the completions at fault are lost; `Reward`'s `on_error` says what happens to those. What the
    function prints goes where this process prints. All ends with `close`, with the object, or with the interpreter, even if it is
    killed.

    Args:
        fn: a function that pickle finds by its module and name, or "file.py:function" or "package.module:function", which only the
            workers import.
        workers: processes, at most.
        timeout: seconds that one call may take, with all the completions in it (see `Batched`); None for any number.
        memory: MiB by which a worker's address space may grow once the function is loaded; None for any number. It holds
            for each process. (RLIMIT_AS: Linux; macOS does not enforce it.)
        startup: seconds in which a worker must have loaded the function.

    Raises:
        InputError: for settings that make no sense, and for functions that a worker cannot find: lambdas, functions in functions,
            those of `__main__` and of notebooks.
    """

    def __init__(
        self,
        fn: TextFunction | str,
        *,
        workers: int = 1,
        timeout: float | None = None,
        memory: float | None = None,
        startup: float = 120.0,
    ) -> None:
        if os.name != "posix":
            raise InputError("worker processes need Linux or macOS; leave workers, timeout and memory away")
        if workers < 1:
            raise InputError(f"workers is {workers}; give the number of processes, at least 1")
        for name, value in (("timeout", timeout), ("memory", memory), ("startup", startup)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; give a positive number, or leave it away")
        self.settings = {"workers": workers, "timeout": timeout, "memory": memory, "startup": startup}
        self.given = fn
        where = _named(fn) if isinstance(fn, str) else _pickled(fn)
        in_bytes = None if memory is None else int(memory * 2**20)
        self._pool = Pool(where, workers, timeout, in_bytes, startup)
        self._end = weakref.finalize(self, self._pool.close)  # at the interpreter's exit too

    def attempt(self, request: Request) -> list[Any]:
        """Share the completions out among the workers."""
        even = math.ceil(request.count / self._pool.workers)
        parts = list(request.calls(min(even, request.most or even)))
        self._pool.load()
        replies = self._pool.run([_message(part) for part in parts], stop=request.stop)
        answers: list[Any] = []
        for part, reply in zip(parts, replies, strict=True):
            if not isinstance(reply, NotAsked):
                count("calls")
                count("completions", part.count)
            answers += _answers(part.count, reply)
        return answers

    def once(self, count: int, **arguments: Any) -> list[Any]:
        """One call with all arguments as they are, for a function that returns `count` values, or lists of them.

        Raises:
            Failure: if it raises, ends its process or takes too long.
            Unusable: if it does not return as many.
        """
        reply = self._pool.run([_pickled_call(arguments, count)], stop=True)[0]
        answers = list(_answers(count, reply))
        failed = next((answer for answer in answers if isinstance(answer, Exception)), None)
        if failed is not None:
            raise failed
        return answers

    def load(self) -> None:
        """Load the function in a worker.

        Raises:
            InputError: if it cannot be loaded.
        """
        self._pool.load()

    def close(self) -> None:
        """End the workers; a later call starts new ones."""
        self._pool.close()

    def __enter__(self) -> Isolated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return _again, (self.given, self.settings)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)
        return f"Isolated({self._label()}, {settings})"

    def _label(self) -> str:
        return self.given.rpartition(":")[2] if isinstance(self.given, str) else label_of(self.given)

    @property
    def bounds(self) -> tuple[float, float] | None:
        return getattr(self.given, "bounds", None)

    def _signature(self) -> inspect.Signature:
        if not isinstance(self.given, str):
            return inspect.signature(self.given)
        known = [(name, getattr(inspect.Parameter, kind), default) for name, kind, default in self._pool.load()]
        return inspect.Signature(
            [inspect.Parameter(n, k, default=None if d else inspect.Parameter.empty) for n, k, d in known]
        )


def _again(fn: TextFunction | str, settings: dict[str, Any]) -> Isolated:
    return Isolated(fn, **settings)


def _named(source: str) -> tuple[Any, ...]:
    place, colon, name = source.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"reward is {source!r}; write it as file.py:function")
    if not place.endswith(".py"):
        return "module", place, name
    if not Path(place).is_file():
        raise InputError(f"reward: there is no file {place!r}; give file.py:function")
    return "file", str(Path(place).resolve()), name


def _pickled(fn: TextFunction) -> tuple[Any, ...]:
    remedy = "put it into a file and give Isolated('file.py:function')"
    try:
        content = pickle.dumps(fn)
    except Exception as error:  # pickle raises whatever the object's own methods raise
        raise InputError(f"reward {label_of(fn)!r} cannot be sent to a worker process ({error}); {remedy}") from error
    if b"__main__" in content:
        raise InputError(f"reward {label_of(fn)!r} is defined in __main__, where a worker cannot find it; {remedy}")
    return "pickle", content


def _message(request: Request) -> bytes:
    return _pickled_call(request.arguments, request.count)


def _pickled_call(arguments: Mapping[str, Any], count: int) -> bytes:
    try:
        return pickle.dumps({"arguments": dict(arguments), "count": count})
    except Exception as error:
        raise InputError(
            f"the columns {', '.join(arguments)} cannot be sent to a worker process ({error}); let the reward ask for plain "
            f"values only, or run it without workers"
        ) from error


def _answers(size: int, reply: Reply) -> Sequence[Any]:
    if isinstance(reply, Failure):
        return [reply] * size
    if "unusable" in reply:
        raise Unusable(reply["unusable"])
    if "raised" in reply:
        return [_raised(reply["raised"])] * size
    return [_raised(v["raised"]) if isinstance(v, dict) else v for v in reply["values"]]


def _raised(error: dict[str, Any]) -> Failure:
    name, message = error["names"][0], error["message"]
    if "InputError" in error["names"]:
        raise InputError(message)
    failure = Failure((f"raised {name} ({message})" if message else f"raised {name}") + error["place"])
    failure.names, failure.status = tuple(error["names"]), error.get("status")
    return failure
