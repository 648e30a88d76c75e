"""Several samplers on one task: a table of metrics, each with its standard error and its paired difference from the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evaluation.systems import System
from tiltlm.evaluation.uncertainty import Cell, Resampled, bootstrap, difference_of, mean_of, resamples_of
from tiltlm.evidence.composition import as_formula
from tiltlm.evidence.function import label_of
from tiltlm.records import Prompts

RESAMPLES = 200
KL = "KL to prior"
SECONDS = "seconds"
GAP = 2
"""Characters between two columns of the table."""

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class TaskTable:
    """What `evaluate_systems` found.

    Attributes:
        task: its name.
        baseline: the system that the others are compared with.
        metrics: names in the order of the columns.
        rows: of each system, a cell by metric; a metric that a system does not have is missing.
        seconds: of each system whose time is known.
        prompts: how many there were.
        seeds: of each system.
    """

    task: str
    baseline: str
    metrics: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Cell]]
    seconds: Mapping[str, float]
    prompts: int
    seeds: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "task": self.task,
            "baseline": self.baseline,
            "metrics": list(self.metrics),
            "prompts": self.prompts,
            "systems": [
                {
                    "name": name,
                    "seeds": self.seeds[name],
                    "seconds": self.seconds.get(name),
                    "metrics": {metric: cell.as_dict() for metric, cell in cells.items()},
                }
                for name, cells in self.rows.items()
            ],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A row a system; bold where the difference from the baseline is more than two of its standard errors.

        Columns that find no room beside the others come below, in a block of their own. Finer metrics are counted only.
        """
        yield f"[italic]{self.task}: {self.prompts} prompts, ± standard error; bold: more than 2 from {self.baseline}[/italic]"
        names = [name + (f" ({self.seeds[name]} seeds)" if self.seeds[name] > 1 else "") for name in self.rows]
        room = options.max_width - max(map(len, names))
        for block in _blocks(self._columns(), room):
            table = Table(box=None, pad_edge=False)
            table.add_column("", no_wrap=True)
            for head, _ in block:
                table.add_column(head, justify="right")
            for place, name in enumerate(names):
                table.add_row(name, *(cells[place] for _, cells in block))
            yield table
        finer = len(self.metrics) - len(without_finer(self.metrics))
        if finer:
            yield f"[dim]{finer} finer metrics, such as an aspect's recall, are in the JSON file[/dim]"

    def _columns(self) -> list[tuple[str, list[str]]]:
        """Each column's head, and its cells as they are shown."""
        shown = without_finer(self.metrics)
        columns = [(metric, [_shown(cells.get(metric)) for cells in self.rows.values()]) for metric in shown]
        if self.seconds:
            times = [f"{self.seconds[name]:.1f}" if name in self.seconds else "–" for name in self.rows]
            columns.append((SECONDS, times))
        return columns


def without_finer(metrics: Sequence[str]) -> list[str]:
    """Metrics without the parts of others, such as `objects/recall`, of which there are too many for a table or a picture."""
    return [name for name in metrics if "/" not in name]


def _blocks(columns: list[tuple[str, list[str]]], room: int) -> list[list[tuple[str, list[str]]]]:
    """Columns in groups that fit side by side; one that is too wide for any stands alone."""
    blocks: list[list[tuple[str, list[str]]]] = []
    left = 0
    for head, cells in columns:
        words = [len(word) for word in head.split()]
        width = GAP + max([*words, *(cell_len(Text.from_markup(cell).plain) for cell in cells)])
        if not blocks or width > left:
            blocks.append([])
            left = room
        blocks[-1].append((head, cells))
        left -= width
    return blocks


def evaluate_systems(
    task: str,
    data: Prompts | Columns,
    systems: Sequence[System],
    metrics: Sequence[Any],
    *,
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> TaskTable:
    """Measure systems on the same prompts.

    Args:
        data: the prompts with their columns (references, sources), or the columns alone, one value a prompt.
        systems: what each sampler wrote.
        metrics: parts of rewards and reward functions (averaged over a prompt's completions, then over prompts), parts with a
            corpus metric of their own (BLEU, chrF, labels, scenes: of the corpus made of every prompt's j-th completion, averaged
            over j), and what looks at all completions of a prompt (`PassAtK`, `SelfBLEU`, …).
        baseline: the system that others are compared with; the first one by default.
        resamples: of the prompts, for the errors of corpus metrics (Efron's bootstrap; paired, Koehn 2004).
        progress: told after each system's metric.

    Raises:
        InputError: if names are not unique, or a system or column has another number of prompts.
    """
    columns = _columns(data)
    count = _checked(columns, systems)
    base = systems[0].name if baseline is None else baseline
    if base not in {system.name for system in systems}:
        raise InputError(f"baseline is {base!r}; choose one of {', '.join(system.name for system in systems)}")
    chosen = resamples_of(count, resamples, seed)
    found: dict[str, dict[str, Any]] = {system.name: {} for system in systems}
    for metric in metrics:
        for system in systems:
            found[system.name] |= _measured(metric, system, columns, chosen)
            if progress is not None:
                progress(1)
    for system in systems:
        if system.log_ratios is not None:
            found[system.name][KL] = _means(system.log_ratios)
    names = tuple(dict.fromkeys(name for values in found.values() for name in values))
    rows = {
        name: {metric: _cell(values[metric], None if name == base else found[base].get(metric)) for metric in values}
        for name, values in found.items()
    }
    seconds = {system.name: system.seconds for system in systems if system.seconds is not None}
    return TaskTable(task, base, names, rows, seconds, count, {system.name: len(system.runs) for system in systems})


def _measured(metric: Any, system: System, columns: Columns, rows: Int[Tensor, "R P"]) -> dict[str, Any]:
    """Each number by name: a matrix over seeds and prompts, or a corpus metric with its resamples."""
    if hasattr(metric, "of_prompt"):
        values = [
            [
                metric.of_prompt(texts, {name: column[p] for name, column in columns.items()})
                for p, texts in enumerate(run)
            ]
            for run in system.runs
        ]
        return {metric.label: torch.tensor(values, dtype=torch.float64)}
    if hasattr(metric, "corpus"):
        return _corpus(metric, system, columns, rows)
    return {label_of(metric): _means([_per_completion(metric, run, columns) for run in system.runs])}


def _per_completion(metric: Any, run: Sequence[Sequence[str]], columns: Columns) -> list[list[float]]:
    owner = [p for p, texts in enumerate(run) for _ in texts]
    given = {name: [values[p] for p in owner] for name, values in columns.items()}
    values = iter(as_formula(metric)(completions=[text for texts in run for text in texts], **given))
    return [[float(next(values)) for _ in texts] for texts in run]


def _corpus(metric: Any, system: System, columns: Columns, rows: Int[Tensor, "R P"]) -> dict[str, Any]:
    missing = next((name for name in metric.reads if name not in columns), None)
    if missing is not None:
        raise InputError(f"metric {metric.label!r} reads {missing!r}; give it, one value a prompt")
    read = {name: columns[name] for name in metric.reads}
    runs = [
        [_of_some(metric, [texts[j] for texts in run], read) for j in range(min(map(len, run)))] for run in system.runs
    ]
    found = bootstrap(runs, system.prompts, rows)
    return {name if name == metric.label else f"{metric.label}/{name}": value for name, value in found.items()}


def _of_some(metric: Any, texts: list[str], read: Columns) -> Callable[[Int[Tensor, " P"]], Mapping[str, float]]:
    """The metric of the corpus made of some prompts: from sums where it has them, else computed anew."""
    if hasattr(metric, "summable"):
        counts, meaning = metric.summable(texts, **read)
        return lambda some: meaning(counts[some].sum(0))

    def corpus(some: Int[Tensor, " P"]) -> Mapping[str, float]:
        rows = some.tolist()
        columns = {name: [values[i] for i in rows] for name, values in read.items()}
        return metric.corpus([texts[i] for i in rows], **columns)

    return corpus


def _means(runs: Sequence[Sequence[Sequence[float]]]) -> Float[Tensor, "S P"]:
    return torch.tensor([[sum(values) / len(values) for values in run] for run in runs], dtype=torch.float64)


def _cell(values: Any, base: Any) -> Cell:
    if isinstance(values, Resampled):
        return values.cell(base)
    estimate, seeds = mean_of(values)
    return Cell(estimate, seeds, None if base is None else difference_of(values, base))


def _columns(data: Prompts | Columns) -> Columns:
    return {"prompts": data.texts, **data.columns} if isinstance(data, Prompts) else data


def _checked(columns: Columns, systems: Sequence[System]) -> int:
    if not systems:
        raise InputError("there are no systems to compare; give at least one")
    names = [system.name for system in systems]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two systems are called {twice!r}; give each a name of its own")
    count = systems[0].prompts
    for system in systems:
        if system.prompts != count:
            raise InputError(
                f"system {system.name!r} has {system.prompts} prompts and {names[0]!r} has {count}; compare on the same ones"
            )
    for name, values in columns.items():
        if len(values) != count:
            raise InputError(f"column {name!r} has {len(values)} values for {count} prompts; give one a prompt")
    return count


def _shown(cell: Cell | None) -> str:
    if cell is None or math.isnan(cell.estimate.value):
        return "–"
    value, error = cell.estimate.value, cell.estimate.stderr
    digits = 1 if abs(value) >= 10 else 3
    text = (
        f"{value:z.{digits}f}" if math.isnan(error) else f"{value:z.{digits}f} ±{error:.{digits}f}"
    )  # z: no minus before zero
    far = cell.difference is not None and abs(cell.difference.value) > 2 * cell.difference.stderr
    return f"[bold]{text}[/bold]" if far else text
