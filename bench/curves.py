"""Cost curves of our step: seconds and bytes over tokens, group, vocabulary and model size, each with its exponent, and a picture.

One thing grows at a time, on Llamas at random weights; each point is a process of its own, so that its peak of memory is its own.
Bytes are what a step takes beside what was resident before: weights and libraries are not counted. Attention grows with the
square of the tokens; anything else above 1 is a fault.

python bench/curves.py
python bench/curves.py --axes tokens group --rounds 3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fits import exponent, last_exponent
from harness import OURS, Case, Run, Side, compare, driver_parser, pooled
from tables import Table, console, digits

NAME = "curves"
SIDES = (Side(OURS, "step_tiltlm.py"),)
BASE = {"width": 128, "layers": 4, "vocabulary": 8192, "prompts": 4, "group": 8, "tokens": 32}
AXES: Mapping[str, Sequence[int]] = {
    "tokens": (32, 64, 128, 256),
    "group": (8, 16, 32, 64),
    "vocabulary": (8192, 32768, 131072),
    "width": (128, 256, 512),
}
QUICK = {"width": 32, "layers": 2, "vocabulary": 128, "prompts": 2, "group": 2, "tokens": 4}
OF_MODEL = ("width", "layers", "vocabulary")
PHASES = ("seconds a step", "seconds, draw and score", "seconds, update", "bytes")


def main() -> None:
    parser = driver_parser(__doc__.splitlines()[0], NAME)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    options = parser.parse_args()
    axes = {axis: AXES[axis] for axis in options.axes}
    base = BASE
    if options.quick:
        base, axes = QUICK, {"group": (2, 4)}
    result = compare(options, [point(base | {axis: value}, axis) for axis in axes for value in axes[axis]], summarise)
    console(tables(result))


def point(sizes: Mapping[str, int], axis: str) -> Case:
    """A step of one size, all weights trained."""
    model = ("llama", *(word for name in OF_MODEL for word in (f"--{name}", str(sizes[name]))))
    step = [word for name in sizes if name not in OF_MODEL for word in (f"--{name}", str(sizes[name]))]
    flags = ("--rank", "16", "--warmup", "1", "--steps", "2", *step)
    return Case(f"{axis}-{sizes[axis]}", model, SIDES, flags, 1, {"axis": axis, **sizes})


def summarise(runs: list[Run]) -> dict[str, float]:
    """Medians over steps, and the most bytes beside what was resident before."""
    return {
        "seconds a step": median(pooled(runs, "seconds")),
        "seconds, draw and score": median(pooled([run["phases"] for run in runs], "draw and score")),
        "seconds, update": median(pooled([run["phases"] for run in runs], "update")),
        "bytes": max(_bytes(run) for run in runs),
    }


def _bytes(run: Run) -> float:
    return run["peak_device_memory_bytes"] or run["peak_memory_bytes"] - (run["resident_before_bytes"] or 0)


def curves(result: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """By axis: its sizes, and the costs at each."""
    out: dict[str, dict[str, list[float]]] = {}
    for found in result["cases"].values():
        axis, figures = found["about"]["axis"], found["summary"]["sides"].get(OURS)
        if figures is None:
            continue
        curve = out.setdefault(axis, {name: [] for name in ("size", *PHASES)})
        curve["size"].append(found["about"][axis])
        for name in PHASES:
            curve[name].append(figures[name])
    return out


def tables(result: dict[str, Any]) -> list[Table]:
    """A row a point, and the exponents."""
    found = curves(result)
    rows, exponents = [], []
    for axis, curve in found.items():
        for place, size in enumerate(curve["size"]):
            costs = [digits(curve[name][place]) for name in PHASES[:-1]]
            rows.append([f"{axis} {size:,}", *costs, f"{curve['bytes'][place] / 1e6:.0f}"])
        if len(curve["size"]) > 1:
            exponents.append([axis, *(_exponents(curve["size"], curve[name]) for name in PHASES)])
    base = ", ".join(f"{name} {value:,}" for name, value in BASE.items())
    heads = ["", "seconds a step", "drawing, judging, scoring", "update", "MB"]
    device = result["hardware"]["gpu"] or "CPU"
    return [
        Table(
            f"Cost of a step, LoRA r 16, {result['dtype']}, {device}", heads, rows, [f"Where nothing is said: {base}."]
        ),
        Table(
            "Exponents: over all sizes, and between the two largest",
            ["over", *heads[1:4], "bytes"],
            exponents,
            ["1 is linear. The width's operations grow with its square, as a model's parameters do."],
        ),
    ]


def _exponents(sizes: Sequence[float], costs: Sequence[float]) -> str:
    if min(costs) <= 0:
        return "–"
    return f"{exponent(sizes, costs):.2f}, {last_exponent(sizes, costs):.2f}"


if __name__ == "__main__":
    main()
