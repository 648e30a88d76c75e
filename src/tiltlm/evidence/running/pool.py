"""A few worker processes, and one loop that gives them calls, waits, and ends those that take too long."""

from __future__ import annotations

import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiltlm.errors import InputError
from tiltlm.evidence.running import worker as program
from tiltlm.evidence.running.calls import Failure, NotAsked
from tiltlm.evidence.running.processes import end, has_ended
from tiltlm.evidence.running.tally import count
from tiltlm.evidence.running.worker import HEADER, MARK

LONGEST_WAIT = 0.05
"""Seconds after which the loop looks whether a silent worker is dead: a fork may hold its socket open."""
GRACE = 1.0
"""Seconds that an idle worker has to leave by itself, so that its own clean-up runs."""

Reply = Mapping[str, Any] | Failure


@dataclass(eq=False)
class Worker:
    """One process, from its start to its end.

    Attributes:
        job: the number of the call it is at; None while it is idle or starting.
        deadline: when it must have replied, by the monotonic clock.
    """

    first: bytes
    startup: float
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    ready: bool = False
    job: int | None = None
    deadline: float = 0.0
    _received: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # -P: the folder of the program must not come before the user's modules
                [sys.executable, "-P", str(Path(program.__file__)), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a process group of its own, which Ctrl-C does not reach and which can be killed
                env={**os.environ, MARK: self.mark},
            )
        self.send(self.first, self.startup)

    def send(self, message: bytes, seconds: float | None) -> None:
        """Send a message, to be answered within some seconds. A worker that is gone shows when its answer is waited for."""
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds
        self.channel.settimeout(seconds)
        try:
            self.channel.sendall(HEADER.pack(len(message)) + message)
        except OSError:  # it died, or it does not read, and has no time left
            return

    def receive(self) -> Mapping[str, Any] | None:
        """What has come of an answer; None while it is not whole."""
        try:
            part = self.channel.recv(1 << 20)
        except OSError:
            return None
        if not part:
            return None
        self._received += part
        size = HEADER.unpack(self._received[: HEADER.size])[0] if len(self._received) >= HEADER.size else None
        if size is None or len(self._received) < HEADER.size + size:
            return None
        body = bytes(self._received[HEADER.size : HEADER.size + size])
        self._received.clear()
        return json.loads(body)

    def kill(self) -> int:
        """End it with all its children; returns its exit status."""
        status = end(self.process, self.mark)
        self.channel.close()
        return status

    def leave(self) -> None:
        """Ask it to go, and see to it that it does."""
        self.channel.close()
        limit = time.monotonic() + GRACE
        while not has_ended(self.process) and time.monotonic() < limit:
            time.sleep(0.005)
        end(self.process, self.mark)


@dataclass(eq=False)
class Pool:
    """Workers that serve one function.

    Args:
        function: where the worker finds it: ("file", path, name), ("module", name, name) or ("pickle", bytes).
        workers: most processes.
        timeout: seconds a call may take; None for any number.
        memory: bytes by which a worker may grow once it has loaded the function; None for any number.
        startup: seconds a worker may take to load the function.
    """

    function: tuple[Any, ...]
    workers: int
    timeout: float | None
    memory: int | None
    startup: float
    parameters: list[tuple[str, str, bool]] | None = None

    def __post_init__(self) -> None:
        self._workers: list[Worker] = []
        self._owner = os.getpid()

    def load(self) -> list[tuple[str, str, bool]]:
        """The function's parameters: name, kind, whether there is a default.

        Raises:
            InputError: if no worker can load the function.
        """
        if self.parameters is None:
            self.run([], stop=False, at_least=1)
            assert self.parameters is not None
        return self.parameters

    def run(self, jobs: Sequence[bytes], *, stop: bool, at_least: int = 0) -> list[Reply]:
        """The reply to each job, or its failure. `stop` asks nothing further after the first failure.

        Raises:
            InputError: if a worker cannot load the function.
        """
        replies: list[Reply] = [NotAsked()] * len(jobs)
        waiting = deque(range(len(jobs)))
        self._workers = [w for w in self._workers if not self._gone(w)]
        try:
            while waiting or self._busy() or (at_least and not any(w.ready for w in self._workers)):
                self._assign(waiting, jobs, at_least)
                for worker in self._wait():
                    found = self._heard(worker)
                    if found is not None:
                        job, reply = found
                        replies[job] = reply
                        if stop and (isinstance(reply, Failure) or "raised" in reply):
                            waiting.clear()
        except BaseException:  # Ctrl-C among them: nothing goes on for a result that nobody waits for
            self.close()
            raise
        return replies

    def close(self) -> None:
        """End every worker, with all that it started: the idle ones are asked to go, the others killed."""
        if os.getpid() != self._owner:  # a fork of this process: the workers are not its own
            return
        workers, self._workers = self._workers, []
        for worker in workers:
            if worker.ready and worker.job is None:
                worker.leave()
            else:
                worker.kill()

    def _busy(self) -> list[Worker]:
        return [w for w in self._workers if w.job is not None]

    def _gone(self, worker: Worker) -> bool:
        """Whether an idle worker has died since; if so it is put away."""
        if not has_ended(worker.process):
            return False
        worker.kill()
        return True

    def _assign(self, waiting: deque[int], jobs: Sequence[bytes], at_least: int) -> None:
        for worker in self._workers:
            if waiting and worker.ready and worker.job is None:
                worker.job = waiting.popleft()
                worker.send(jobs[worker.job], self.timeout)
        starting = sum(not w.ready for w in self._workers)
        missing = min(self.workers - len(self._workers), max(len(waiting), at_least) - starting)
        if waiting or not self._workers:
            first = {"path": sys.path, "function": self.function, "memory": self.memory}
            for _ in range(missing):
                self._workers.append(Worker(pickle.dumps(first), self.startup))

    def _wait(self) -> list[Worker]:
        """The workers that must be looked at: all that are at something, once one has spoken or a little time has passed."""
        active = [w for w in self._workers if w.job is not None or not w.ready]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.channel, selectors.EVENT_READ, worker)
            spoke = {key.data for key, _ in selector.select(LONGEST_WAIT)}
        return [w for w in active if w in spoke or has_ended(w.process) or time.monotonic() > w.deadline]

    def _heard(self, worker: Worker) -> tuple[int, Reply] | None:
        """What a worker's silence or message means: its job and the reply to it; None if there is no reply yet."""
        ended = has_ended(worker.process)  # before reading: what it wrote before its end is then there
        message = worker.receive() if _readable(worker) else None
        if message is not None:
            return self._took(worker, message)
        late = time.monotonic() > worker.deadline
        if not ended and not late:
            return None
        self._workers.remove(worker)
        status = worker.kill()
        if not worker.ready:
            self._refuse(
                f"was not loaded within {self.startup:g} s" if not ended else f"ended its process{_how(status)}"
            )
        if worker.job is None:
            return None
        count("died" if ended else "timed_out")
        return worker.job, Failure(
            f"ended its process{_how(status)}" if ended else f"took more than {self.timeout:g} s"
        )

    def _took(self, worker: Worker, message: Mapping[str, Any]) -> tuple[int, Reply] | None:
        if "refused" in message:
            self._workers.remove(worker)
            worker.kill()
            error = message["refused"]
            self._refuse(error["message"] if error["names"][0] == "LookupError" else _on_import(error))
        if not worker.ready:
            worker.ready = True
            self.parameters = [(name, kind, default) for name, kind, default in message["ready"]]
            return None
        job, worker.job = worker.job, None
        assert job is not None
        if "MemoryError" in message.get("raised", {}).get("names", ()):
            self._workers.remove(worker)  # what is left of it may be in any state
            worker.kill()
            count("died")
            limit = "" if self.memory is None else f" of {self.memory / 2**20:g} MiB"
            return job, Failure(f"used up its memory{limit}")
        return job, message

    def _refuse(self, why: str) -> None:
        kind, *where = self.function
        name = "the function" if kind == "pickle" else repr(":".join(where))
        remedy = "mend it, or give it as file.py:function" if kind == "pickle" else "mend it"
        raise InputError(f"reward {name} in a worker process: {why}; {remedy}")


def _readable(worker: Worker) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(worker.channel, selectors.EVENT_READ)
        return bool(selector.select(0))


def _on_import(error: Mapping[str, Any]) -> str:
    return f"raised {error['names'][0]} on import ({error['message']})"


def _how(status: int) -> str:
    if status >= 0:
        return f" with exit code {status}"
    name = signal.Signals(-status).name
    return f" by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
