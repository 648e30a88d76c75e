"""`safely`: all layers around a function, in the order that makes sense."""

from __future__ import annotations

from pathlib import Path

from tiltlm.errors import InputError
from tiltlm.evidence.running.cache import Cached
from tiltlm.evidence.running.calls import TextFunction
from tiltlm.evidence.running.isolated import Isolated
from tiltlm.evidence.running.layers import Batched, Retried


def safely(
    fn: TextFunction | str,
    *,
    workers: int = 0,
    timeout: float | None = None,
    memory: float | None = None,
    batch: int | None = None,
    retries: int = 0,
    cache: bool | str | Path = False,
    version: str = "",
) -> TextFunction:
    """A function with what its settings ask for around it: kept values first, then small calls, tries, worker processes.

    Args:
        fn: a function, or "file.py:function" where worker processes are asked for.
        workers: worker processes; 0 calls the function in this process, unless `timeout` or `memory` ask for one.
        timeout: seconds that a call may take; see `Isolated`.
        memory: MiB by which a worker may grow; see `Isolated`.
        batch: most completions in a call; see `Batched`.
        retries: further tries where a remote service fails; see `Retried`.
        cache: keep values, for a function that is deterministic; a path keeps them in a file too. See `Cached`.
        version: tells the function's values in that file from others'.

    Returns:
        A function with the same arguments, name and bounds.
    """
    isolate = bool(workers) or timeout is not None or memory is not None
    if workers < 0:
        raise InputError(f"workers is {workers}; give the number of processes, or 0 for none")
    if isinstance(fn, str) and not isolate:
        raise InputError(f"reward is {fn!r}, which is for worker processes; set workers, or give the function itself")
    if isolate and (isinstance(fn, str) or not isinstance(fn, Isolated)):
        fn = Isolated(fn, workers=workers or 1, timeout=timeout, memory=memory)
    wrapped: TextFunction = fn  # pyright: ignore[reportAssignmentType]
    if retries:
        wrapped = Retried(wrapped, retries)
    if batch is not None:
        wrapped = Batched(wrapped, batch)
    if cache:
        wrapped = Cached(wrapped, path=None if cache is True else cache, version=version)
    return wrapped
