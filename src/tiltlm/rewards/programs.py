"""Code that runs: the completion's Python against given tests, in a process of its own."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part
from tiltlm.evidence.running.processes import end
from tiltlm.evidence.running.worker import MARK

RUNNER = Path(__file__).with_name("program_runner.py")
POLL = 0.01
"""Seconds between looks at a running program's processes."""


@dataclass(frozen=True)
class RunsCode(Part):
    """1 where the completion's Python code passes its tests, else 0.

    The code is the first block fenced by three backticks, or the whole completion. It runs in a fresh interpreter (isolated
    mode, empty environment, a temporary folder, no input, no output), followed by the tests; a program counts as passing
    only if it got to the end of the tests, so that leaving early with exit code 0 is a failure. Time, memory, size of
    files and number of processes are limited, and what it started is killed at the end: its process group, its descendants, and
    whoever carries its mark in the environment.

    That stops accidents and no attacker: network and files are those of your user. Run models that you do not trust in a container.

    Attributes:
        column: holds the tests of each prompt: Python code, or a list of pieces of code, each a test.
        timeout: seconds that code and tests together may take.
        memory: mebibytes of address space for each process (where the system has such a limit).
        processes: most processes at a time, the first included.
        partial: of a list of tests, the share that passes, instead of 1 for all and else 0. Each is tried.
        workers: programs at a time.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    column: str = "tests"
    timeout: float = 5.0
    memory: int = 512
    processes: int = 8
    partial: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        if self.timeout <= 0 or min(self.memory, self.processes, self.workers) < 1:
            raise InputError("timeout, memory, processes and workers of runs-code must be positive")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        jobs = [(code_of(text), self._tests(tests)) for text, tests in zip(texts, columns[self.column], strict=True)]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._passed, jobs))

    def _tests(self, value: Any) -> list[str]:
        tests = [value] if isinstance(value, str) else list(value or [])
        if not tests or not all(isinstance(test, str) and test.strip() for test in tests):
            raise InputError(
                f"column {self.column!r} of reward {self.label!r} holds {value!r:.60}; give code that tests"
            )
        return tests

    def _passed(self, job: tuple[str, list[str]]) -> float:
        code, tests = job
        nonce = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="tiltlm-code-", ignore_cleanup_errors=True) as folder:
            said = self._run(folder, json.dumps({"word": nonce, "code": code, "tests": tests}))
        # what counts is what the runner says at its end, with a word that it was told before the code ran
        match = re.fullmatch(rf"{nonce} (\d+)\n", said)
        passed = int(match[1]) if match else 0
        return passed / len(tests) if self.partial else float(passed == len(tests))

    def _run(self, folder: str, job: str) -> str:
        (read, write), mark = os.pipe(), uuid.uuid4().hex
        limits = [str(number) for number in (write, self.memory << 20, math.ceil(self.timeout))]
        process = subprocess.Popen(
            [sys.executable, "-I", str(RUNNER), *limits],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", MARK: mark},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(job.encode())
            in_time = self._watched(process)
        finally:
            end(process, mark)
            # everything that held the other end is gone, or has left the group and must not be waited for
            os.set_blocking(read, False)
            with os.fdopen(read, "rb") as answer:
                said = answer.read() or b""
        return said.decode(errors="replace") if in_time else ""

    def _watched(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait for the end; False if it took too long or too many processes."""
        deadline = time.monotonic() + self.timeout
        watched = psutil.Process(process.pid)
        strays: set[psutil.Process] = set()
        try:
            while process.poll() is None:
                with suppress(psutil.Error):
                    children = watched.children(recursive=True)
                    strays |= set(children)  # those that leave the process group are killed by name
                    if len(children) >= self.processes:
                        return False
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL)
            return True
        finally:
            for stray in strays:
                with suppress(psutil.Error):
                    stray.kill()


def code_of(text: str) -> str:
    """The first fenced block of a text, or all of it."""
    fenced = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return fenced[1] if fenced else text
