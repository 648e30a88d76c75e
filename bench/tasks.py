"""The five applications, every method with three seeds: `tiltlm task NAME --table` of each, as JSON and as a table for the docs.

python bench/tasks.py                        # all five; hours on two cores, and it goes on where it was cut off
python bench/tasks.py qa --out runs          # one
python bench/tasks.py --written              # only the tables again, from the JSON files that are there
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tiltlm.tasks import tasks

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(tasks()), help="which applications")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--written", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    for name in chosen.names:
        file = RESULTS / f"task-{name}.json"
        if not chosen.written:
            command = ["-m", "tiltlm", "task", name, "--table", "--out", chosen.out / name, "--json", file]
            subprocess.run([sys.executable, *map(str, command)], check=True)
        if file.is_file():
            file.with_suffix(".md").write_text(table(json.loads(file.read_text())))


def table(result: dict) -> str:
    """A Markdown table: a row a method, bold where it differs from the prior by more than two standard errors."""
    certified = dict.fromkeys(system["name"] for system in result["systems"])
    for outcome in result["outcomes"]:
        if outcome["kl_posterior"] is not None:
            low = outcome["kl_posterior"]["low"]
            certified[outcome["method"]] = min(low, certified[outcome["method"]] or low)
    metrics = [name for name in result["metrics"] if not name.endswith(("/precision", "/recall"))]  # JSON has them all
    heads = ["", *metrics, "KL to p*, at least", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for system in result["systems"]:
        cells = [cell(system["metrics"].get(metric)) for metric in metrics]
        bound = certified[system["name"]]
        seconds = "–" if system["seconds"] is None else f"{system['seconds']:.0f}"
        lines.append(
            "| " + " | ".join([system["name"], *cells, "–" if bound is None else f"{bound:.2f}", seconds]) + " |"
        )
    seeds = max(system["seeds"] for system in result["systems"])
    return "\n".join(lines) + f"\n\n{result['prompts']} test prompts, {seeds} seeds, beta {result['beta']:.3g}.\n"


def cell(value: dict | None) -> str:
    if value is None or value["value"] is None:
        return "–"
    digits = 1 if abs(value["value"]) >= 10 else 3
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.{digits}f}"
    text = f"{value['value']:.{digits}f}{error}"
    gap = value["difference"]
    far = gap is not None and None not in gap.values() and abs(gap["value"]) > 2 * gap["stderr"]
    return f"**{text}**" if far else text


if __name__ == "__main__":
    main()
