"""SMC on SmolLM2: TiltLM beside genlm-control on its transformers backend, the same reward as critic; and its cost over particles.

python bench/smc.py --rounds 2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from fits import exponent
from harness import OURS, Case, Run, Side, compare, driver_parser, peaks
from tables import Table, by_side, console, digits, ratio

NAME = "smc"
SIDES = (Side(OURS, "smc_tiltlm.py"), Side("genlm-control", "smc_genlm.py", "genlm"))
TINY = ("llama", "--width", "56", "--layers", "2", "--vocabulary", "128")


def main() -> None:
    parser = driver_parser(__doc__.splitlines()[0], NAME)
    parser.add_argument("--particles", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    model, counts, tokens = ("smollm2",), options.particles, options.tokens
    if options.quick:
        model, counts, tokens = TINY, [4, 8], 4
    flags = ("--particles", *map(str, counts), "--tokens", str(tokens))
    about = {"particles": counts, "tokens": tokens}
    console(tables(compare(options, [Case(NAME, model, SIDES, flags, 1, about)], summarise(counts))))


def summarise(counts: Sequence[int]) -> Callable[[list[Run]], Run]:
    """Medians over runs at each number of particles, the exponent of the time, and the most memory."""

    def figures(runs: list[Run]) -> dict[str, float]:
        took = [median(run["seconds"][place] for run in runs) for place in range(len(counts))]
        out = {"warm-up seconds": median(run["warmup_seconds"][0] for run in runs)}
        for count, value, tokens in zip(counts, took, runs[0]["tokens"], strict=True):
            out |= {f"seconds, {count}": value, f"rate, {count}": tokens / value}
        out["log Z"] = mean(run["log_z"][-1] for run in runs)
        return out | {"exponent": exponent(counts, took)} | peaks(runs)

    return figures


def tables(result: dict[str, Any]) -> list[Table]:
    """One table: tokens a second at each number of particles."""
    found = result["cases"][NAME]
    counts = found["about"]["particles"]
    rows = {f"tokens a second, {n} particles": lambda s, n=n: f"{s[f'rate, {n}']:.1f}" for n in counts}
    rows[f"log Z, {counts[-1]} particles"] = lambda s: f"{s['log Z']:.2f}"
    rows["exponent of the time over particles"] = lambda s: f"{s['exponent']:.2f}"
    rows["warm-up, not counted, seconds"] = lambda s: digits(s["warm-up seconds"])
    ratios = {f"time over ours, {n} particles": ratio(f"seconds, {n}") for n in counts}
    ratios["peak memory over ours"] = ratio("peak_memory_bytes")
    title = f"SMC, {found['about']['model']}, {result['dtype']}: {found['about']['tokens']} tokens a particle"
    return [by_side(title, found, rows, ratios)]


if __name__ == "__main__":
    main()
