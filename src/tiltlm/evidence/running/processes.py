"""Ending a process with everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress

import psutil

from tiltlm.evidence.running.worker import MARK

SWEEPS = 5
"""How often to look again for what was started while the last look was under way."""


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a worker is dead; it stays a zombie, so that its process group's number is not given to anybody else."""
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    with suppress(ChildProcessError):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return True


def end(process: subprocess.Popen[bytes], mark: str) -> int:
    """Kill a process, its process group, its descendants and whoever carries its mark; returns its exit status.

    The group has what was forked plainly, the descendants what left the group, and the mark (the way of Jenkins' ProcessTreeKiller)
    what was orphaned besides.
    """
    strays = _descendants(process.pid)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for _ in range(SWEEPS):
        for stray in strays:
            with suppress(psutil.Error):
                stray.kill()
        strays = _marked(mark)
        if not strays:
            break
    return process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _marked(mark: str) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # others' processes do not show theirs
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
