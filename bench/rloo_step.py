"""One training step of RLOO + LoRA: TiltLM beside TRL, each in its own environment and process.

Both sides run in alternation, and who goes first alternates too, because the speed of a machine drifts from minute
to minute: what counts is the ratio within a round. This process imports neither library, so that its own memory does
not show in theirs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from common import ALPHA, BETA, RANK, size_arguments
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "rloo_step.json"
SIDES = ("tiltlm", "trl")
NAMES = {"tiltlm": "TiltLM", "trl": "TRL"}
MODEL = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, parents=[size_arguments()])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--model", type=Path, help=f"folder of a model; {MODEL}, converted by TiltLM, by default")
    parser.add_argument("--trl-python", type=Path, help="python of an environment with TRL; bench/.venv-trl by default")
    parser.add_argument("--out", type=Path, default=RESULT, help="where to write the figures")
    arguments = parser.parse_args()

    pythons = {"tiltlm": Path(sys.executable), "trl": arguments.trl_python or trl_environment()}
    model = arguments.model or model_folder()
    size = {name: getattr(arguments, name) for name in ("steps", "prompts", "group", "tokens")}
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        order = SIDES if number % 2 == 0 else SIDES[::-1]
        rounds.append({side: run(side, pythons[side], model, size, number + 1) for side in order})

    result = {
        "task": {"model": MODEL if arguments.model is None else model.name, "rounds": arguments.rounds, **size}
        | {"dtype": "bfloat16", "beta": BETA, "lora_rank": RANK, "lora_alpha": ALPHA},
        "summary": summarise(rounds),
        "hardware": hardware(),
        "rounds": rounds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    show(result["summary"], size)


def trl_environment() -> Path:
    """TRL's own environment, made if it is not there: its requirements are not ours."""
    folder = HERE / ".venv-trl"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    constraints = HERE / "constraints-trl.txt"
    wanted = constraints.read_text()
    done = folder / "installed.txt"  # written last, so that an environment cut short is completed
    if not done.is_file() or done.read_text() != wanted:
        print("making TRL's environment in bench/.venv-trl …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        packages = ["trl", "torch", "peft", "vaderSentiment"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", str(constraints), *packages], check=True)
        done.write_text(wanted)
    return python


def model_folder() -> Path:
    """The folder with safetensors that `tl.load` itself uses; converts the model on first use."""
    code = f"from tiltlm.lm.load import _resolve; print(_resolve({MODEL!r}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip().splitlines()[-1])


def run(side: str, python: Path, model: Path, size: dict[str, int], number: int) -> dict[str, Any]:
    """One process of one side; its figures, and how busy the machine was when it began."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    flags = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [python, HERE / f"step_{side}.py", model, *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{NAMES[side]} failed in round {number}:\n{done.stderr[-4000:]}")
    out = {"load_before": load, **json.loads(done.stdout.strip().splitlines()[-1])}
    print(f"round {number}: {NAMES[side]:6} {median(out['seconds']):7.2f} s a step", file=sys.stderr)
    return out


def summarise(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each side, and TRL's time over TiltLM's within each round."""
    out: dict[str, Any] = {}
    for side in SIDES:
        runs = [one[side] for one in rounds]
        seconds, tokens = _pool(runs, "seconds"), _pool(runs, "tokens")
        out[side] = {
            "seconds_per_step": median(seconds),
            "fastest_step": min(seconds),
            "slowest_step": max(seconds),
            "phases": {name: median(_pool([r["phases"] for r in runs], name)) for name in runs[0]["phases"]},
            "tokens_per_step": sum(tokens) / len(tokens),
            "tokens_per_second": sum(tokens) / sum(seconds),
            "completions_per_step": sorted(set(_pool(runs, "completions"))),
            "longest_completion": max(r["longest"] for r in runs),
            "peak_memory_bytes": max(r["peak_memory_bytes"] for r in runs),
            "trained_parameters": runs[0]["trained_parameters"],
            "versions": runs[0]["versions"],
        }
    per_step = [median(one["trl"]["seconds"]) / median(one["tiltlm"]["seconds"]) for one in rounds]
    per_token = [_seconds_per_token(one["trl"]) / _seconds_per_token(one["tiltlm"]) for one in rounds]
    out["trl_over_tiltlm"] = {"per_step": _spread(per_step), "per_token": _spread(per_token)}
    return out


def _pool(runs: list[dict[str, Any]], name: str) -> list[float]:
    return [value for one in runs for value in one[name]]


def _seconds_per_token(one: dict[str, Any]) -> float:
    return sum(one["seconds"]) / sum(one["tokens"])


def _spread(ratios: list[float]) -> dict[str, float]:
    return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}


def show(summary: dict[str, Any], size: dict[str, int]) -> None:
    """The table, and a plain sentence about whatever makes the two sides differ."""
    ours, theirs = summary["tiltlm"], summary["trl"]
    table = Table(
        title=f"RLOO + LoRA: {size['prompts']} prompts × {size['group']} × {size['tokens']} tokens, bf16, CPU"
    )
    table.add_column("")
    for side in SIDES:
        table.add_column(NAMES[side], justify="right")
    rows = {
        "seconds a step, median": lambda s: f"{s['seconds_per_step']:.2f}",
        "fastest to slowest step": lambda s: f"{s['fastest_step']:.2f}–{s['slowest_step']:.2f}",
        "  draw": lambda s: f"{s['phases']['draw']:.2f}",
        "  score": lambda s: f"{s['phases']['score']:.2f}",
        "  update": lambda s: f"{s['phases']['update']:.2f}",
        "peak memory, GB": lambda s: f"{s['peak_memory_bytes'] / 1e9:.2f}",
        "tokens a step": lambda s: f"{s['tokens_per_step']:.0f}",
        "tokens a second": lambda s: f"{s['tokens_per_second']:.1f}",
    }
    for name, cell in rows.items():
        table.add_row(name, cell(ours), cell(theirs))
    console = Console()
    console.print(table)
    step, token = (summary["trl_over_tiltlm"][name] for name in ("per_step", "per_token"))
    console.print(f"TRL takes {_times(step)} TiltLM's time for a step, median of the rounds (least–most).")
    if ours["tokens_per_step"] != theirs["tokens_per_step"]:
        made = f"{theirs['tokens_per_step']:.0f} tokens a step and TiltLM {ours['tokens_per_step']:.0f}"
        console.print(
            f"TRL drew {made} (ends of text fall by chance); for each token it takes {_times(token)} the time."
        )
    full = [size["prompts"] * size["group"]]
    for side in SIDES:
        drawn, longest = summary[side]["completions_per_step"], summary[side]["longest_completion"]
        if drawn != full or longest > size["tokens"]:
            console.print(f"Not the same task: {NAMES[side]} drew {drawn} completions of up to {longest} tokens.")
    if ours["trained_parameters"] != theirs["trained_parameters"]:
        counts = f"TiltLM trained {ours['trained_parameters']:,} parameters and TRL {theirs['trained_parameters']:,}"
        console.print(f"Not the same task: {counts}.")
    for name in ("torch", "transformers", "peft"):
        if ours["versions"][name] != theirs["versions"][name]:
            pair = f"TiltLM's is {ours['versions'][name]} and TRL's {theirs['versions'][name]}"
            console.print(f"Not the same {name}: {pair}.")


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} × ({ratio['least']:.2f}–{ratio['most']:.2f})"


def hardware() -> dict[str, Any]:
    """What the figures were measured on, without the machine's name."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


if __name__ == "__main__":
    main()
