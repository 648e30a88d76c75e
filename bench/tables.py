"""Tables of the speed benchmarks: the same rows on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness import OURS

CLOSE = 0.02
"""Ratios this near to 1 are a draw."""


@dataclass(frozen=True)
class Table:
    """A title, a head, rows of text, and sentences below."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.heads) + " |"]
        lines.append("|" + "|".join(["---", *["--:"] * (len(self.heads) - 1)]) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def console(tables: Sequence[Table]) -> None:
    """Print tables."""
    from rich.console import Console
    from rich.table import Table as Rich

    out = Console()
    for table in tables:
        shown = Rich(title=table.title)
        for number, head in enumerate(table.heads):
            shown.add_column(head, justify="left" if number == 0 else "right")
        for row in table.rows:
            shown.add_row(*row)
        out.print(shown)
        for note in table.notes:
            out.print(note)


Cell = Callable[[Mapping[str, Any]], str]


def by_side(title: str, found: Mapping[str, Any], rows: Mapping[str, Cell], ratios: Mapping[str, Cell]) -> Table:
    """A case's summary: a column a side.

    Args:
        rows: from a side's figures to a cell.
        ratios: from a peer's figures over ours to a cell.
    """
    sides, over = found["summary"]["sides"], found["summary"]["over_ours"]
    body = [[name, *(cell(figures) for figures in sides.values())] for name, cell in rows.items()]
    body.append(["peak memory, GB", *(gigabytes(figures) for figures in sides.values())])
    for name, cell in ratios.items():
        body.append([name, *("" if side == OURS else cell(over[side]) if side in over else "–" for side in sides)])
    return Table(title, ["", *sides], body, notes(found))


def notes(found: Mapping[str, Any]) -> list[str]:
    """Where a peer is ahead, what did not run, whether the log-probabilities agree, and how busy the machine was."""
    out = []
    for side, figures in found["summary"]["over_ours"].items():
        ahead = [name for name, value in figures.items() if value["median"] < 1 - CLOSE]
        out += [f"**{side} does better than {OURS}** in {', '.join(map(readable, ahead))}." for _ in ahead[:1]]
    out += [f"{side} did not run: {why}" for side, why in found["missing"].items()]
    runs = [run for done in found["rounds"] for run in done.values()]
    checks = [run["agreement"] for run in runs if "agreement" in run]
    if checks:
        worst = max(checks, key=lambda check: max(check["drawn"], check["scored"]))
        out.append(
            f"Log-probabilities, root mean square distance from transformers in float32, nats a token: drawn {worst['drawn']:.1e}, "
            f"scored {worst['scored']:.1e}; transformers in the same precision {worst['transformers']:.1e}."
        )
    loads = [run["load_before"] for run in runs if run.get("load_before") is not None]
    rounds = len(found["rounds"])
    busy = f"; load average before a run {min(loads):.1f}–{max(loads):.1f}" if loads else ""
    out.append(f"{rounds} round{'s' * (rounds > 1)}{busy}.")
    return out


def readable(name: str) -> str:
    """A figure's name as a sentence has it."""
    return {"peak_memory_bytes": "peak memory", "peak_device_memory_bytes": "peak memory of the GPU"}.get(name, name)


def ratio(name: str) -> Cell:
    """Median and range of a ratio within the rounds; below 1 a peer is ahead."""

    def cell(figures: Mapping[str, Any]) -> str:
        if name not in figures:
            return "–"
        value = figures[name]
        text = f"{value['median']:.2f} ×"
        if value["least"] != value["most"]:
            text += f" ({value['least']:.2f}–{value['most']:.2f})"
        return text if value["median"] >= 1 - CLOSE else f"**{text}**"

    return cell


def digits(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def gigabytes(figures: Mapping[str, Any]) -> str:
    """Peak memory; on a GPU its own beside the host's."""
    host, device = figures["peak_memory_bytes"] / 1e9, figures.get("peak_device_memory_bytes")
    return f"{host:.2f}" if not device else f"{host:.2f}, GPU {device / 1e9:.2f}"
