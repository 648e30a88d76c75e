"""The peers' environments: one each under bench/, pinned by a constraints file, made when it is first needed.

Their requirements are not ours. Python's standard library only; `python bench/environments.py` makes all of them, `… vllm` that one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Unavailable(Exception):
    """A peer's environment cannot be made here."""


@dataclass(frozen=True)
class Peer:
    """A library in an environment of its own.

    Attributes:
        packages: what pip is asked for.
        alone: whether pip leaves out what they require, because the list is whole.
    """

    name: str
    packages: tuple[str, ...]
    alone: bool = False

    @property
    def folder(self) -> Path:
        return HERE / f".venv-{self.name}"

    @property
    def constraints(self) -> Path:
        return HERE / f"constraints-{self.name}.txt"

    def python(self) -> Path:
        """The environment's python; the environment is made if it is not there, or was made from other constraints.

        Raises:
            Unavailable: if pip fails.
        """
        python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        wanted = f"{self.constraints.read_text()}\n{self.packages}"
        done = self.folder / "installed.txt"  # written last, so that an environment cut short is completed
        if done.is_file() and done.read_text() == wanted:
            return python
        print(f"making {self.name}'s environment in bench/{self.folder.name} …", file=sys.stderr)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch comes first and alone, so that nothing else chooses its build
        steps = (["torch"], [*(["--no-deps"] if self.alone else []), *self.packages])
        try:
            subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
            for step in steps:
                subprocess.run([*pip, "-c", self.constraints.name, *step], check=True, stdout=sys.stderr, cwd=HERE)
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"{self.name}'s environment cannot be made: {error}") from error
        done.write_text(wanted)
        return python


PEERS = {
    "trl": Peer("trl", ("trl", "peft", "vaderSentiment")),
    "vllm": Peer("vllm", ("-r", "constraints-vllm.txt"), alone=True),
    "genlm": Peer("genlm", ("genlm-control", "transformers", "accelerate", "vaderSentiment")),
}


def main() -> None:
    chosen = sys.argv[1:] or list(PEERS)
    if unknown := set(chosen) - set(PEERS):
        raise SystemExit(f"no peer is called {', '.join(sorted(unknown))}; choose {', '.join(PEERS)}")
    missing = []
    for peer in map(PEERS.__getitem__, chosen):
        try:
            print(peer.python())
        except Unavailable as error:
            missing.append(str(error))
    if missing:
        raise SystemExit("\n".join(missing))


if __name__ == "__main__":
    main()
