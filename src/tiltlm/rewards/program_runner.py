"""Run a program and its tests under limits, and say how many passed. A script: `RunsCode` starts it in a fresh interpreter.

Its input names the word that makes the answer believed; it is read before anything else runs.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress

FILE_SIZE = 16 << 20


def limit(memory: int, seconds: int) -> None:
    """Limits of address space, processor time, file size and core dumps, where the system has them."""
    try:
        import resource
    except ImportError:
        return
    for name, amount in (
        ("RLIMIT_AS", memory),
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_FSIZE", FILE_SIZE),
        ("RLIMIT_CORE", 0),
    ):
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (amount, amount))


def main() -> None:
    """Arguments: descriptor to answer on, bytes of memory, seconds of processor time. The program comes as JSON, all before it runs."""
    answer, memory, seconds = map(int, sys.argv[1:4])
    job = json.load(sys.stdin)
    sys.argv = ["code.py"]
    limit(memory, seconds)
    space: dict[str, object] = {"__name__": "__main__"}
    passed = 0
    try:
        exec(compile(job["code"], "code.py", "exec"), space)
        for number, test in enumerate(job["tests"]):
            with suppress(Exception):
                exec(compile(test, f"test{number}.py", "exec"), space)
                passed += 1
    except BaseException:  # SystemExit too: whoever leaves before the end of the tests has not passed them
        os._exit(1)
    os.write(answer, f"{job['word']} {passed}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
