"""Asynchronous rewards: `async def` functions as they stand, and one coroutine a completion with bounded concurrency."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any

from tiltlm.errors import InputError

SINGULAR = {"prompts": "prompt", "completions": "completion"}


def finished(returned: Any) -> Any:
    """What a function returned; if that is a coroutine, what comes of it.

    Coroutines run on one event loop of our own, in a thread of its own: so that connections which a client keeps open are
    there for the next batch, and so that it works where a loop is running already, as in a notebook.
    """
    if not inspect.isawaitable(returned):
        return returned
    future = asyncio.run_coroutine_threadsafe(_finish(returned), _loop())
    try:
        value, left = future.result()
    except BaseException:  # Ctrl-C among them: what is still under way is cancelled
        future.cancel()
        raise
    if left is not None:
        raise left
    return value


async def _finish(awaitable: Any) -> tuple[Any, SystemExit | None]:
    """What comes of it; `sys.exit` is handed over, because raised here it would end the loop, and whoever waits would wait for ever."""
    try:
        return await awaitable, None
    except SystemExit as error:
        return None, error


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="tiltlm rewards", daemon=True)
    thread.start()

    def close() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=1)

    atexit.register(close)
    return loop


def concurrently(one: Callable[..., Awaitable[float]], limit: int = 8) -> Callable[..., Any]:
    """A reward from a coroutine for one completion: `async def one(prompt, completion, **columns) -> float`.

    Args:
        one: gets those of `prompt`, `completion`, `completion_ids` and the columns that it names, of one completion.
        limit: most coroutines under way at a time.

    Returns:
        A reward function that judges a batch; a completion whose coroutine raises is at fault alone.

    Raises:
        InputError: if the limit is not positive or `one` is no coroutine function.
    """
    if limit < 1:
        raise InputError(f"limit is {limit}; it is how many completions are judged at a time, and at least 1")
    if not inspect.iscoroutinefunction(one) and not inspect.iscoroutinefunction(type(one).__call__):
        raise InputError(f"{one!r} is no coroutine function; write it as: async def one(prompt, completion) -> float")

    async def judged(**arguments: Sequence[Any]) -> list[Any]:
        free = asyncio.Semaphore(limit)
        names = [SINGULAR.get(name, name) for name in arguments]

        async def judge(values: Sequence[Any]) -> Any:
            async with free:
                try:
                    return await one(**dict(zip(names, values, strict=True)))
                except SystemExit as error:  # see `_finish`
                    raise RuntimeError(f"sys.exit: {error}") from error

        rows = zip(*arguments.values(), strict=True)
        found = await asyncio.gather(*(judge(row) for row in rows), return_exceptions=True)
        stop = next((f for f in found if isinstance(f, BaseException) and not isinstance(f, Exception)), None)
        if stop is not None:
            raise stop
        return found

    plural = {single: many for many, single in SINGULAR.items()}
    own = inspect.signature(one)
    parameters = [p.replace(name=plural.get(p.name, p.name)) for p in own.parameters.values()]
    judged.__name__ = getattr(one, "__name__", type(one).__name__)
    judged.__signature__ = own.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return judged
