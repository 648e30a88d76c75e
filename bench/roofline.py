"""How near each phase of our step is to what this machine allows.

Measures the machine (matrix products in bfloat16 and float32 at the shapes that matter, memory bandwidth), counts the operations
and bytes that each phase needs at least, times the phases, and says achieved / possible: the least time, the larger
of operations over the best rate of any shape and bytes over the bandwidth, over the time taken.

python bench/roofline.py                                   # SmolLM2, 4 prompts × 8 × 32 tokens
python bench/roofline.py --group 32 --tokens 64 --repeats 1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import set_threads
from harness import RESULTS, hardware, model_folder, model_name
from tables import Table, console, digits

NAME = "roofline"
SCORING = ("prior scoring", "forward", "backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto takes the GPU if there is one; cpu, cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16, help="LoRA's; 0 trains all weights")
    parser.add_argument("--micro", type=int, default=1024, help="completion tokens in one pass with gradient")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json")
    options = parser.parse_args()
    set_threads(options)
    result = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    console(tables(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The machine's rates, and seconds and counts of each phase."""
    import torch
    from roofline_counts import Size, phases
    from roofline_machine import measure as measure_machine
    from roofline_phases import Phases

    machine_facts = hardware(options.device)
    kind = ("llama", "--width", "56", "--layers", "2", "--vocabulary", "128") if options.quick else ("smollm2",)
    size = Size(options.prompts, 0, options.group, options.tokens, options.rank)
    timed = Phases(model_folder(kind), size, machine_facts["device"], options.dtype, options.micro, options.repeats)
    size, model = timed.size, timed.model
    costs = phases(model, size)
    layers = [*model.linears(), (model.width, model.vocabulary)]
    rows = {cost.rows for cost in costs.values() if cost.rows}
    machine = measure_machine(
        machine_facts["device"],
        dict.fromkeys([options.dtype, "bfloat16", "float32"]),
        [(n, a, b) for n in sorted(rows) for a, b in layers],
    )
    took = timed.measure()
    return {
        "device": machine_facts["device"],
        "hardware": machine_facts,
        "dtype": options.dtype,
        "about": {"model": model_name(kind), "threads": torch.get_num_threads(), **vars(size)},
        "bandwidth": {"best": machine.bandwidth, **machine.copies},
        "best_rate": {dtype: machine.best(dtype) for dtype in machine.rates},
        "rates": {
            dtype: {"x".join(map(str, shape)): rate for shape, rate in rates.items()}
            for dtype, rates in machine.rates.items()
        },
        "phases": {
            name: {"seconds": value}
            | (judged(costs[name], value, machine, model, options.dtype) if name in costs else {})
            for name, value in took.items()
        },
    }


def judged(cost: Any, took: float, machine: Any, model: Any, dtype: str) -> dict[str, Any]:
    """What the phase needs, the least time at the machine's best, and at the rates of its own shapes."""
    by_operations, by_bytes = cost.operations / machine.best(dtype), cost.bytes / machine.bandwidth
    out = {
        "operations": cost.operations,
        "bytes": cost.bytes,
        "possible_seconds": max(by_operations, by_bytes),
        "limit": "products" if by_operations > by_bytes else "memory",
        "achieved": max(by_operations, by_bytes) / took,
    }
    if cost.rows:
        rates = machine.rates[dtype]
        sizes = list(model.linears())
        work = sum(a * b for a, b in sizes)
        block = sum(a * b / rates[cost.rows, a, b] for a, b in sizes) / work
        at_shapes = (cost.blocks + cost.other) * block + cost.head / rates[cost.rows, model.width, model.vocabulary]
        out["at_these_shapes"] = at_shapes / took
    return out


def tables(result: dict[str, Any]) -> list[Table]:
    """The phases, and the machine."""
    about, found = result["about"], result["phases"]
    whole = sum(phase["seconds"] for phase in found.values())
    rows = [_row(name, phase, whole) for name, phase in found.items()]
    together = [found[name] for name in SCORING]
    sum_of = {
        key: sum(phase[key] for phase in together) for key in ("seconds", "operations", "bytes", "possible_seconds")
    }
    rows.append(_row("scoring, forward and backward", sum_of | _over(sum_of), whole))
    passed = {key: value - together[0][key] for key, value in sum_of.items()}
    rows.append(_row("forward and backward", passed | _over(passed), whole))
    possible = sum(phase.get("possible_seconds", 0.0) for phase in found.values())
    rows.append(["all phases", digits(whole), "100%", "", "", digits(possible), "", f"{possible / whole:.0%}", ""])
    dtype, rank = result["dtype"], about["rank"]
    size = f"{about['prompts']} prompts × {about['group']} × {about['tokens']} tokens"
    title = f"Roofline of a step, {about['model']}, {dtype}, {f'LoRA r {rank}' if rank else 'all weights'}: {size}"
    heads = ["phase", "seconds", "share", "GFLOP", "MB", "possible", "limit", "achieved", "of these shapes' rate"]
    notes = [
        "Possible: the larger of operations over the best rate and bytes over the bandwidth. The gradient of the output layer is "
        "counted in the backward pass; TiltLM forms it in the forward one, so that their sum is what to look at.",
        "The sum of the phases is not quite a step's time: each is measured by itself, once it is warm.",
        "Of these shapes' rate: the time of the products at the rates below, which for few rows are lower, over the time taken; the "
        "backward pass's transposed products are taken to have the rates of the forward one's.",
    ]
    return [Table(title, heads, rows, notes), _machine(result)]


def _over(phase: dict[str, float]) -> dict[str, Any]:
    return {"achieved": phase["possible_seconds"] / phase["seconds"], "limit": ""}


def _row(name: str, phase: dict[str, Any], whole: float) -> list[str]:
    cells = [name, digits(phase["seconds"]), f"{phase['seconds'] / whole:.0%}"]
    if "operations" not in phase:
        return [*cells, "–", "–", "–", "–", "–", "–"]
    shapes = f"{phase['at_these_shapes']:.0%}" if "at_these_shapes" in phase else ""
    work = [digits(phase["operations"] / 1e9), digits(phase["bytes"] / 1e6), digits(phase["possible_seconds"])]
    return [*cells, *work, phase["limit"], f"{phase['achieved']:.0%}", shapes]


def _machine(result: dict[str, Any]) -> Table:
    dtypes = list(result["rates"])
    shapes = list(result["rates"][dtypes[0]])
    rows = [[shape, *(digits(result["rates"][dtype][shape] / 1e9) for dtype in dtypes)] for shape in shapes]
    copies = ", ".join(
        f"{name} {value / 1e9:.1f} GB/s" for name, value in result["bandwidth"].items() if name != "best"
    )
    return Table("Matrix products, GFLOP/s (rows × in × out)", ["shape", *dtypes], rows, [f"Memory: {copies}."])


if __name__ == "__main__":
    main()
