"""The five applications, every method with three seeds: `tiltlm task NAME --table` of each, as JSON and as a table for the docs.

python bench/tasks.py                        # all five; hours on two cores, and it goes on where it was cut off
python bench/tasks.py qa --out runs          # one; variants too, such as qa-abstain
python bench/tasks.py --written              # only the tables again, from the JSON files that are there
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import plotly.graph_objects as go

from tiltlm.evaluation.table import without_finer
from tiltlm.report.betas import betas_figure
from tiltlm.report.canvas import write_figure
from tiltlm.report.palette import LIGHT
from tiltlm.report.tasks import task_figure
from tiltlm.tasks import applications

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PAPER = LIGHT["paper"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(applications()), help="which; the five by default")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--written", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    for name in chosen.names:
        file = RESULTS / f"task-{name}.json"
        if not chosen.written:
            command = ["-m", "tiltlm", "task", name, "--table", "--out", chosen.out / name, "--json", file]
            subprocess.run([sys.executable, *map(str, command)], check=True)
        if file.is_file():
            result = json.loads(file.read_text())
            file.with_suffix(".md").write_text(table(result))
            photograph(task_figure(result), DOCS / f"task-{name}.png")
        betas = RESULTS / f"betas-{name}.json"
        if betas.is_file():
            photograph(betas_figure(json.loads(betas.read_text())), DOCS / f"betas-{name}.png")


def photograph(figure: go.Figure, file: Path) -> None:
    """A figure as PNG, twice as fine as it is wide."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        print(f"no Chromium here: {file} stays as it is")
        return
    with tempfile.TemporaryDirectory() as folder:
        page = write_figure(figure.update_layout(paper_bgcolor=PAPER), Path(folder) / "figure.html")
        size = f"--window-size={int(figure.layout.width or 900) + 20},{int(figure.layout.height) + 20}"
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=2", size]
        command = [browser, *flags, "--virtual-time-budget=5000", f"--screenshot={file.resolve()}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)


def table(result: dict) -> str:
    """A Markdown table: a row a method, bold where it differs from the prior by more than two standard errors."""
    metrics = without_finer(result["metrics"])
    heads = ["", *metrics, "ELBO", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for system in result["systems"]:
        cells = [cell(system["metrics"].get(metric)) for metric in metrics]
        bound = elbo(result, system)
        seconds = "–" if system["seconds"] is None else f"{system['seconds']:.0f}"
        lines.append(
            "| " + " | ".join([system["name"], *cells, "–" if bound is None else f"{bound:.2f}", seconds]) + " |"
        )
    seeds = max(system["seeds"] for system in result["systems"])
    note = "ELBO = log Z − KL(q‖p*), in nats: its differences are those of the distance from the posterior."
    return (
        "\n".join(lines) + f"\n\n{result['prompts']} test prompts, {seeds} seeds, beta {result['beta']:.3g}. {note}\n"
    )


def elbo(result: dict, system: dict) -> float | None:
    """Mean over seeds; None for what has no density. Earlier results lack it: there it is E r / beta - KL(q || pi0)."""
    moved = system["metrics"].get("KL to prior")
    if moved is None or moved["value"] is None:
        return None
    outcomes = [outcome for outcome in result["outcomes"] if outcome["method"] == system["name"]]
    if all("elbo" in outcome for outcome in outcomes):
        return sum(outcome["elbo"] for outcome in outcomes) / len(outcomes)
    return sum(outcome["reward"] for outcome in outcomes) / len(outcomes) / result["beta"] - moved["value"]


def cell(value: dict | None) -> str:
    if value is None or value["value"] is None:
        return "–"
    digits = 1 if abs(value["value"]) >= 10 else 3
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.{digits}f}"
    text = f"{value['value']:z.{digits}f}{error}"
    gap = value["difference"]
    far = gap is not None and None not in gap.values() and abs(gap["value"]) > 2 * gap["stderr"]
    return f"**{text}**" if far else text


if __name__ == "__main__":
    main()
