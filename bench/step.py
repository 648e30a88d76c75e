"""One training step beside TRL: SmolLM2 at two sizes, with examples in the prompts, with a slow reward; and a model that is all overhead.

python bench/step.py                              # all cases
python bench/step.py --cases rloo-4x8x32 --rounds 5
python bench/step.py --quick --sides TiltLM       # does our side run
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

from harness import OURS, Case, Run, Side, compare, driver_parser, peaks, pooled
from tables import Table, by_side, console, digits, gigabytes, ratio

NAME = "step"
SIDES = (Side(OURS, "step_tiltlm.py"), Side("TRL", "step_trl.py", "trl"))
SMOLLM2 = ("smollm2",)
TINY = ("llama", "--width", "56", "--layers", "2", "--vocabulary", "128")
"""About 100,000 parameters."""
JUDGE = 5.0
"""Seconds that the slow reward takes for a batch."""
EXAMPLES = 12
"""Lines that stand before every prompt of one case; some hundred tokens."""
PASS = 2048
"""Completion tokens in a pass with gradient, where that is more than the default: time for memory."""


def case(engine: str, prompts: int, group: int, tokens: int, steps: int, rounds: int) -> Case:
    """A step of SmolLM2 with LoRA."""
    size = ("--prompts", str(prompts), "--group", str(group), "--tokens", str(tokens))
    name = f"{engine}-{prompts}x{group}x{tokens}"
    return Case(name, SMOLLM2, SIDES, ("--engine", engine, *size, "--steps", str(steps)), rounds)


def large(steps: int, rounds: int) -> Case:
    """Eight times the tokens: does memory stay, and what do longer passes bring?"""
    longer = Side(f"{OURS}, {PASS:,} a pass", "step_tiltlm.py", flags=("--micro-tokens", str(PASS)))
    one = case("rloo", 4, 32, 64, steps, rounds)
    return replace(one, sides=(*one.sides, longer))


def judged(steps: int, rounds: int) -> Case:
    """The small step with a reward that takes as long as a remote judge: who works meanwhile?"""
    ahead = Side(f"{OURS}, ahead", "step_tiltlm.py", flags=("--ahead",))
    flags = ("--steps", str(steps), "--judge-seconds", str(JUDGE))
    return Case("judged-4x8x32", SMOLLM2, (*SIDES, ahead), flags, rounds)


def examples(steps: int, rounds: int) -> Case:
    """Short answers to prompts that all begin with the same examples: what is read again and again?"""
    flags = ("--prompts", "4", "--group", "8", "--tokens", "8", "--examples", str(EXAMPLES), "--steps", str(steps))
    return Case("examples-4x8x8", SMOLLM2, SIDES, flags, rounds)


def tiny(steps: int, rounds: int) -> Case:
    """All weights of the tiny model in single precision, on one thread: what is left is the libraries' own work."""
    flags = (
        "--rank",
        "0",
        "--dtype",
        "float32",
        "--threads",
        "1",
        "--warmup",
        "3",
        "--steps",
        str(steps),
        "--tokens",
        "8",
    )
    return Case("tiny-4x8x8", TINY, SIDES, flags, rounds)


SMALL, LARGE = "rloo-4x8x32", "rloo-4x32x64"
CASES = (
    case("rloo", 4, 8, 32, steps=2, rounds=2),
    large(steps=1, rounds=1),
    case("grpo", 4, 8, 32, steps=1, rounds=1),
    examples(steps=3, rounds=2),
    judged(steps=3, rounds=1),
    tiny(steps=30, rounds=3),
)


def main() -> None:
    parser = driver_parser(__doc__.splitlines()[0], NAME)
    parser.add_argument("--cases", nargs="+", choices=[one.name for one in CASES], help="only these")
    options = parser.parse_args()
    cases = [one for one in CASES if not options.cases or one.name in options.cases]
    if options.quick:
        cases = [tiny(steps=1, rounds=1)]
    console(tables(compare(options, cases, summarise)))


def summarise(runs: list[Run]) -> dict[str, float]:
    """Medians over steps and runs, and the most memory."""
    phases = {name: pooled([run["phases"] for run in runs], name) for name in runs[0]["phases"]}
    steps = pooled(runs, "seconds")
    tokens = pooled(runs, "tokens")
    return {
        "seconds a step": median(steps),
        "fastest step": min(steps),
        "slowest step": max(steps),
        **{f"seconds, {name}": median(values) for name, values in phases.items()},
        "warm-up seconds": median(pooled(runs, "warmup_seconds")),
        "tokens a second": sum(tokens) / sum(steps),
        **peaks(runs),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """A table a case, and how memory grows from the small step to the large one."""
    cases = result["cases"]
    found = [_table(name, case, result) for name, case in cases.items()]
    return [*found, _growth(cases)] if SMALL in cases and LARGE in cases else found


def _growth(cases: dict[str, Any]) -> Table:
    small, large = (cases[name]["summary"]["sides"] for name in (SMALL, LARGE))
    rows = []
    for side in small:
        if side in large:
            ratio = large[side]["peak_memory_bytes"] / small[side]["peak_memory_bytes"]
            rows.append([side, gigabytes(small[side]), gigabytes(large[side]), f"{ratio - 1:+.0%}"])
    return Table("Peak memory, GB, with eight times the tokens", ["", SMALL, LARGE, "growth"], rows)


def _table(name: str, found: dict[str, Any], result: dict[str, Any]) -> Table:
    engine, size = name.split("-")
    prompts, group, tokens = size.split("x")
    what = f"{engine.upper()}, SmolLM2-135M, LoRA, {result['dtype']}"
    if engine == "judged":
        what = f"RLOO, SmolLM2-135M, LoRA, {result['dtype']}, a reward that waits for {JUDGE:g} s a batch"
    if engine == "examples":
        what = f"RLOO, SmolLM2-135M, LoRA, {result['dtype']}, {EXAMPLES} lines before every prompt"
    if engine == "tiny":
        what = "RLOO, a model of 100,000 parameters, all weights, float32, one thread"
    title = f"{what}: {prompts} prompts × {group} × {tokens} tokens"
    rows = {
        "seconds a step, median": lambda s: digits(s["seconds a step"]),
        "fastest to slowest step": lambda s: f"{digits(s['fastest step'])}–{digits(s['slowest step'])}",
        "of it drawing, judging, scoring": lambda s: digits(s["seconds, draw and score"]),
        "of it the update": lambda s: digits(s["seconds, update"]),
        "warm-up step, not counted": lambda s: digits(s["warm-up seconds"]),
        "tokens a second": lambda s: f"{s['tokens a second']:.0f}",
    }
    ratios = {"time of a step over ours": ratio("seconds a step"), "peak memory over ours": ratio("peak_memory_bytes")}
    return by_side(title, found, rows, ratios)


if __name__ == "__main__":
    main()
