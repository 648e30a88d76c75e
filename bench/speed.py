"""All speed benchmarks one after the other, and `RESULTS.md` from what they found: what `make bench` runs.

A part that is done is kept under bench/.work; after a crash the same command goes on, and after a whole run the next
one starts anew. A part that fails does not stop the others.

python bench/speed.py
python bench/speed.py --rounds 5 --device cuda
python bench/speed.py --only step generation --trl-python PATH/bin/python
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from environments import PEERS
from harness import HERE, WORK
from results_page import PARTS

ALONE = {"roofline"}
"""Parts without peers and rounds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="runs of each side; each case has its own default")
    parser.add_argument("--device", default="auto", help="auto takes the GPU if there is one; cpu, cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    parser.add_argument("--quick", action="store_true", help="tiny models and the smallest sizes: does it run at all")
    parser.add_argument("--sides", nargs="+", help="only sides with these names, such as TiltLM")
    for peer in PEERS:
        parser.add_argument(f"--{peer}-python", type=Path, help=f"python of an environment with {peer}")
    options = parser.parse_args()
    failed = [name for name in options.only if not done(name, options)]
    if not options.quick:
        subprocess.run([sys.executable, HERE / "results_page.py"], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same command goes on from here")
    for file in [*folder(options).rglob("*.json"), *folder(options).rglob("*.done")]:
        file.unlink()  # what is left says why a side failed


def folder(options: argparse.Namespace) -> Path:
    """Where runs are kept until all of them are done."""
    return WORK / "quick" if options.quick else WORK


def done(name: str, options: argparse.Namespace) -> bool:
    """Run one part, unless it is done; whether it succeeded."""
    mark = folder(options) / f"{name}.done"
    command = [name, *flags(name, options)]
    if mark.is_file() and mark.read_text() == repr(command):
        print(f"{name} is done already", file=sys.stderr)
        return True
    print(f"— {name} —", file=sys.stderr)
    if subprocess.run([sys.executable, HERE / f"{name}.py", *command[1:]], check=False).returncode:
        return False
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(repr(command))
    return True


def flags(name: str, options: argparse.Namespace) -> list[str]:
    """What a part is told."""
    words = ["--device", options.device, "--dtype", options.dtype, "--threads", str(options.threads)]
    words += ["--quick", "--out", str(folder(options) / f"{name}.json")] if options.quick else []
    if name in ALONE:
        return words
    words += ["--work", str(folder(options) / name)]
    words += ["--rounds", str(options.rounds)] if options.rounds else []
    words += ["--sides", *options.sides] if options.sides else []
    for peer in PEERS:
        python = getattr(options, f"{peer}_python")
        words += [f"--{peer}-python", str(python)] if python else []
    return words


if __name__ == "__main__":
    main()
