"""Generation from SmolLM2: TiltLM beside transformers' `generate`, its continuous batching, and vLLM.

python bench/generation.py --rounds 2
python bench/generation.py --sides TiltLM generate --sequences 32
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from harness import OURS, Case, Run, Side, compare, driver_parser, peaks
from tables import Table, by_side, console, digits, ratio

NAME = "generation"
SIDES = (
    Side(OURS, "generation_tiltlm.py"),
    Side("generate", "generation_transformers.py", "trl"),
    Side("continuous batching", "generation_transformers.py", "trl", ("--continuous",)),
    Side("vLLM", "generation_vllm.py", "vllm"),
)
TINY = ("llama", "--width", "56", "--layers", "2", "--vocabulary", "128")


def main() -> None:
    parser = driver_parser(__doc__.splitlines()[0], NAME)
    parser.add_argument("--sequences", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    model, counts, tokens = ("smollm2",), options.sequences, options.tokens
    if options.quick:
        model, counts, tokens = TINY, [8], 4
    flags = ("--sequences", *map(str, counts), "--tokens", str(tokens))
    about = {"sequences": counts, "tokens": tokens}
    console(tables(compare(options, [Case(NAME, model, SIDES, flags, 1, about)], summarise(counts))))


def summarise(counts: Sequence[int]) -> Callable[[list[Run]], Run]:
    """Medians over runs of each number of sequences, and the most memory."""

    def figures(runs: list[Run]) -> dict[str, float]:
        out = {"warm-up seconds": median([run["warmup_seconds"][0] for run in runs])}
        for place, count in enumerate(counts):
            took = median([run["seconds"][place] for run in runs])
            out |= {f"seconds, {count}": took, f"rate, {count}": runs[0]["tokens"][place] / took}
        return out | peaks(runs)

    return figures


def tables(result: dict[str, Any]) -> list[Table]:
    """One table: tokens a second at each number of sequences."""
    found = result["cases"][NAME]
    counts = found["about"]["sequences"]
    rows = {f"tokens a second, {n} sequences": lambda s, n=n: f"{s[f'rate, {n}']:.0f}" for n in counts}
    rows["warm-up, not counted, seconds"] = lambda s: digits(s["warm-up seconds"])
    ratios = {f"time over ours, {n} sequences": ratio(f"seconds, {n}") for n in counts}
    ratios["peak memory over ours"] = ratio("peak_memory_bytes")
    title = f"Generation, {found['about']['model']}, {result['dtype']}: 4 prompts, {found['about']['tokens']} tokens a sequence"
    return [by_side(title, found, rows, ratios)]


if __name__ == "__main__":
    main()
