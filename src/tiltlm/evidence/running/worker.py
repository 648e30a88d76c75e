"""The program of a worker process: load one function, then answer calls of it until the socket closes.

It runs as a script, by its path, and imports nothing but the standard library, so that a worker is up in a fraction of a second
and holds no copy of torch unless the function brings one. Requests are pickled; replies are JSON, so that nothing of what
the function makes is unpickled by the parent. The socket is not stdin or stdout: the function may print what it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import signal
import socket
import struct
import sys
import sysconfig
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "TILTLM_WORKER"
"""Environment variable that a worker and all its descendants carry; its value tells one worker's from another's."""
HEADER = struct.Struct(">Q")
ORPHAN_POLL = 0.5
"""Seconds between two looks at whether the parent is still there."""
LONGEST_TEXT = 200


class Unusable(Exception):
    """What a function returned is not one value a completion; the message is the end of a sentence."""


def listed(returned: Any, count: int) -> list[Any]:
    """What a function returned, as a list with one entry a completion.

    Raises:
        Unusable: if it is no such thing.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(returned, torch.Tensor):
        raise Unusable(
            f"returned a tensor of shape {tuple(returned.shape)}; return a list with one number a completion, for "
            f"example rewards.tolist()"
        )
    if hasattr(returned, "tolist"):  # arrays and series
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise Unusable(f"returned {type(returned).__name__}; return a list with one number a completion")
    if len(returned) != count:
        raise Unusable(f"returned {len(returned)} values for {count} completions; return one a completion")
    return list(returned)


def place_of(error: BaseException) -> str:
    """Where in a user's own file an exception was raised, as the end of a sentence; "" where no such file had a part in it."""
    others = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")] + [str(Path(__file__).parents[2])]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<") and not any(f.filename.startswith(o) for o in others)]
    return f" in {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""


def load_file(path: str) -> Any:
    """The module of a user's file, known by a name of its own so that dataclasses and pickling inside it work."""
    name = f"tiltlm_reward_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(descriptor: int) -> None:
    """Answer the parent until it closes the socket."""
    me, parent = os.getpid(), os.getppid()
    channel = socket.socket(fileno=descriptor)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    # from Python 3.12 a fork beside that thread warns; the function may fork, and what it forks is ended with it
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork.*", category=DeprecationWarning)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    first = _receive(channel)
    if first is None:
        return
    try:
        fn = _load(first)
        _limit(first["memory"])
        _send(channel, {"ready": _parameters(fn)})
    except BaseException as error:  # whatever the user's file does on import
        _send(channel, {"refused": _described(error)})
        return
    with asyncio.Runner() as runner:
        while (arguments := _receive(channel)) is not None:
            reply = _answer(fn, arguments, runner)
            if os.getpid() != me:  # the function forked, and this is the child, come back from it
                os._exit(0)
            _send(channel, reply)


def _answer(fn: Callable[..., Any], request: Mapping[str, Any], runner: asyncio.Runner) -> dict[str, Any]:
    try:
        returned = fn(**request["arguments"])
        if inspect.isawaitable(returned):
            returned = runner.run(_finish(returned))
        return {"values": [_plain(value) for value in listed(returned, request["count"])]}
    except Unusable as error:
        return {"unusable": str(error)}
    except BaseException as error:  # SystemExit too: the function is done, the worker is not
        return {"raised": _described(error)}


async def _finish(awaitable: Any) -> Any:
    return await awaitable


def _plain(value: Any) -> Any:
    """A value as JSON can carry it; numbers of any library become floats, lists stay, the rest is its own description."""
    if isinstance(value, BaseException):
        return {"raised": _described(value)}
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value[:LONGEST_TEXT]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    try:
        return float(value)
    except Exception:  # a user's class may raise anything here
        return repr(value)[:LONGEST_TEXT]


def _described(error: BaseException) -> dict[str, Any]:
    names = [kind.__name__ for kind in type(error).__mro__]
    message = " ".join(str(error).split())
    return {"names": names, "message": message, "status": status_of(error), "place": place_of(error)}


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception carries: openai's and aiohttp's itself, those of httpx and requests in their response."""
    response = getattr(error, "response", None)
    found = (
        getattr(error, "status_code", None),
        getattr(error, "status", None),
        getattr(response, "status_code", None),
    )
    return next((status for status in found if isinstance(status, int)), None)


def _load(first: Mapping[str, Any]) -> Callable[..., Any]:
    sys.path[:] = first["path"]
    kind, *where = first["function"]
    if kind == "pickle":
        return pickle.loads(where[0])
    place, name = where
    module = load_file(place) if kind == "file" else importlib.import_module(place)
    fn = getattr(module, name, None)
    if not callable(fn):
        found = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise LookupError(f"{place} has no function {name!r}; it has {', '.join(found) or 'none'}")
    return fn


def _parameters(fn: Callable[..., Any]) -> list[tuple[str, str, bool]]:
    """Name, kind, and whether there is a default: what the parent must know to call the function by name."""
    parameters = inspect.signature(fn).parameters.values()
    return [(p.name, p.kind.name, p.default is not p.empty) for p in parameters]


def _limit(memory: int | None) -> None:
    """Let the process grow by so many bytes from here, where the system can; and no core files of crashes."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is None or not hasattr(resource, "RLIMIT_AS"):
        return
    used, statm = 0, Path("/proc/self/statm")
    if statm.exists():  # what is mapped already, torch's libraries for example, is not the function's doing
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + memory if hard == resource.RLIM_INFINITY else min(hard, used + memory)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _die_with(parent: int) -> None:
    """End everything once the parent is gone without a word, as after SIGKILL: what fled, where /proc shows it, and the group."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_POLL)
    own = f"{MARK}={os.environ.get(MARK)}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and own in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _receive(channel: socket.socket) -> Any:
    header = _exactly(channel, HEADER.size)
    body = None if header is None else _exactly(channel, HEADER.unpack(header)[0])
    return None if body is None else pickle.loads(body)


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _send(channel: socket.socket, reply: Mapping[str, Any]) -> None:
    body = json.dumps(reply).encode()
    channel.sendall(HEADER.pack(len(body)) + body)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent has ended this one
        main(int(sys.argv[1]))
