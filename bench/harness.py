"""Runs the sides of a comparison in alternation, each in a process of its own, and keeps every finished run.

Who goes first alternates from round to round, because the speed of a machine drifts from minute to minute: what counts is
the ratio within a round. This process imports no torch, so that its own memory does not show in the sides' peaks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from environments import PEERS, Unavailable

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MODELS = HERE / ".models"
WORK = HERE / ".work"
OURS = "TiltLM"

LONGEST = 1800
"""Seconds after which a side is given up."""

Run = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: as tables call it; ours is "TiltLM".
        script: the file in this folder that it runs.
        peer: whose environment it needs; None runs in ours.
        flags: what it is told beside the case's flags.
    """

    name: str
    script: str
    peer: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A piece of work that all sides do alike.

    Attributes:
        flags: the work, as every side's command line says it.
    """

    name: str
    model: tuple[str, ...]
    sides: tuple[Side, ...]
    flags: tuple[str, ...]
    rounds: int
    about: Mapping[str, Any] = field(default_factory=dict)


def driver_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The command line of every comparison."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, help="runs of each side; each case has its own default")
    parser.add_argument("--device", default="auto", help="auto takes the GPU if there is one; cpu, cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice, where a case has none")
    parser.add_argument("--sides", nargs="+", help="only sides with these names, such as TiltLM")
    parser.add_argument("--quick", action="store_true", help="a tiny model and the smallest sizes: does it run at all")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where the figures go")
    parser.add_argument("--work", type=Path, default=WORK / name, help="keeps finished runs, to go on from")
    for peer in PEERS:
        parser.add_argument(f"--{peer}-python", type=Path, help=f"python of an environment with {peer}")
    return parser


def compare(options: argparse.Namespace, cases: Sequence[Case], summarise: Callable[[list[Run]], Run]) -> Run:
    """Run all cases and write the result.

    Args:
        summarise: the figures of one side's runs, or of one round.
    """
    machine = hardware(options.device)
    found = {
        "device": machine["device"],
        "dtype": options.dtype,
        "hardware": machine,
        "cases": {case.name: _case(case, options, machine["device"], summarise) for case in cases},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _case(case: Case, options: argparse.Namespace, device: str, summarise: Callable[[list[Run]], Run]) -> Run:
    sides = [side for side in case.sides if not options.sides or side.name in options.sides]
    model = model_folder(case.model)
    rounds: list[dict[str, Run]] = []
    missing: dict[str, str] = {}
    for number in range(options.rounds or case.rounds):
        order = sides if number % 2 == 0 else sides[::-1]
        done: dict[str, Run] = {}
        for side in order:
            try:
                common = ("--device", device, "--dtype", options.dtype, "--threads", str(options.threads))
                flags = (*common, *case.flags, *side.flags)  # what comes later holds
                kept = options.work / case.name / f"{number + 1}-{side.name.replace(' ', '-')}.json"
                done[side.name] = _kept_or_run(side, (str(model), *flags), kept, options)
                print(f"{case.name}, round {number + 1}: {side.name} done", file=sys.stderr)
            except (Failed, Unavailable) as error:
                missing[side.name] = str(error)
                print(f"{case.name}, round {number + 1}: {side.name} FAILED: {error}", file=sys.stderr)
        rounds.append(done)
    require_same_work(case.name, rounds)
    return {
        "about": {"model": model_name(case.model), "flags": " ".join(case.flags), **case.about},
        "summary": summary(rounds, summarise),
        "missing": missing,
        "rounds": [{name: _published(run, model) for name, run in done.items()} for done in rounds],
    }


def _published(run: Run, model: Path) -> Run:
    """A run without what it says of this machine's folders."""
    return {**run, "flags": [flag.replace(str(model), model.name) for flag in run["flags"]]}


class Failed(Exception):
    """A side's process ended with an error."""


def _kept_or_run(side: Side, flags: tuple[str, ...], kept: Path, options: argparse.Namespace) -> Run:
    if kept.is_file():
        run = json.loads(kept.read_text())
        if run["flags"] == list(flags):
            return run
    python, path = Path(sys.executable), str(HERE.parent / "src")
    if side.peer is not None:
        python, path = getattr(options, f"{side.peer}_python") or PEERS[side.peer].python(), ""
    began = time.time()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    try:
        done = subprocess.run(
            [python, HERE / side.script, *flags],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"it took more than {LONGEST} seconds") from error
    kept.parent.mkdir(parents=True, exist_ok=True)
    found = figures(done.stdout)
    if done.returncode or found is None:
        kept.with_suffix(".failed.txt").write_text(done.stdout + done.stderr)
        raise Failed(f"{reason(done.stderr)} (exit code {done.returncode})")
    run = {"flags": list(flags), "load_before": load, "wall_seconds": time.time() - began, **found}
    kept.write_text(json.dumps(run))
    return run


def figures(said: str) -> Run | None:
    """The last JSON object that a side printed; vLLM goes on talking when it is over. None where there is none."""
    for line in reversed(said.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def reason(said: str) -> str:
    """The last line that names an error, or the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]


def require_same_work(name: str, rounds: Sequence[Mapping[str, Run]]) -> None:
    """Both sides made the same tokens, or the figures mean nothing.

    Raises:
        SystemExit: if they did not.
    """
    made = {side: run["tokens"] for done in rounds for side, run in done.items()}
    if len({json.dumps(tokens) for tokens in made.values()}) > 1:
        raise SystemExit(f"{name}: not the same work: {made}")


def summary(rounds: Sequence[Mapping[str, Run]], summarise: Callable[[list[Run]], Run]) -> dict[str, Any]:
    """What `summarise` says of each side, and of each peer's figures over ours within each round.

    `summarise` gives numbers by name; those whose name begins with "seconds" or "peak" are compared.
    """
    sides = list(dict.fromkeys(side for done in rounds for side in done))
    out: dict[str, Any] = {side: summarise([done[side] for done in rounds if side in done]) for side in sides}
    ratios: dict[str, Any] = {}
    for side in sides:
        pairs = [(summarise([done[side]]), summarise([done[OURS]])) for done in rounds if side in done and OURS in done]
        if side == OURS or not pairs:
            continue
        names = [name for name in pairs[0][0] if name.startswith(("seconds", "peak")) and pairs[0][1].get(name)]
        ratios[side] = {name: spread([theirs[name] / ours[name] for theirs, ours in pairs]) for name in names}
    return {"sides": out, "over_ours": ratios}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def pooled(runs: Sequence[Run], name: str) -> list[float]:
    """All values of a list that every run has."""
    return [value for run in runs for value in run[name]]


def peaks(runs: Sequence[Run]) -> dict[str, float]:
    """Most memory of any run: resident, and of the accelerator where there is one."""
    names = ("peak_memory_bytes", "peak_device_memory_bytes")
    return {name: max(run[name] for run in runs) for name in names if all(run.get(name) for run in runs)}


def model_name(kind: Sequence[str]) -> str:
    """A model of `models.py` in words."""
    if kind[0] == "smollm2":
        return "SmolLM2-135M"
    sizes = [f"{name.removeprefix('--')} {value}" for name, value in zip(kind[1::2], kind[2::2], strict=True)]
    return f"a Llama of {', '.join(sizes)}"


def model_folder(kind: Sequence[str]) -> Path:
    """A model of `models.py` as that file stands, made if it is not there."""
    edition = hashlib.sha256((HERE / "models.py").read_bytes()).hexdigest()[:8]
    folder = MODELS / "-".join([*(word.removeprefix("--") for word in kind), edition])
    if not folder.is_dir():
        path = str(HERE.parent / "src")
        command = [sys.executable, str(HERE / "models.py"), kind[0], str(folder), *kind[1:]]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr)
    return folder


def hardware(device: str) -> dict[str, Any]:
    """What the figures are measured on, without the machine's name."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = lines[0] if lines else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = None
    if device != "cpu":
        code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        gpu = found.stdout.strip() or None
    if device == "auto":
        device = "cuda" if gpu else "cpu"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    system = f"{platform.system()} {platform.machine()}"
    return {"device": device, "gpu": gpu, "cpu": cpu, "cores": cores, "memory_bytes": memory, "system": system}
