"""Progress and metrics of a run: a bar to look at, a JSONL file always, trackers on request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tiltlm.errors import InputError

Metrics = dict[str, Any]


class Monitor:
    """Where `fit` reports to.

    Args:
        out: folder of `metrics.jsonl`; None writes no file.
        trackers: names that accelerate knows: "tensorboard", "wandb", "trackio".
        console: where the bar is drawn; stderr by default.
        what: name of the bar.
        quiet: draw none.

    Attributes:
        steps, drawn: how many steps were logged here, and completions drawn in them.
    """

    def __init__(
        self,
        out: Path | None = None,
        trackers: Sequence[str] = (),
        console: Console | None = None,
        config: Mapping[str, Any] | None = None,
        what: str = "train",
        quiet: bool = False,
    ) -> None:
        self._path = out / "metrics.jsonl" if out else None
        self._trackers = tuple(trackers)
        self._config = dict(config or {})
        self.steps = self.drawn = 0
        self._accelerator: Any = None
        self._progress = Progress(
            TextColumn(what),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            disable=quiet,
        )
        self._task: Any = None

    def __enter__(self) -> Monitor:
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.open("a").close()
            except OSError as error:
                raise InputError(
                    f"out {str(self._path.parent)!r} cannot be written ({error.strerror}); choose another folder"
                ) from error
        if self._trackers:
            self._accelerator = _trackers(self._trackers, self._path.parent if self._path else Path(), self._config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:  # its end_training() would end the processes' connection as well
                tracker.finish()

    def start(self, steps: int, done: int) -> None:
        """Show the bar."""
        self._progress.start()
        self._task = self._progress.add_task("train", total=steps, completed=done, status="")

    def log(self, step: int, metrics: Metrics) -> None:
        """One step's metrics."""
        self.steps += 1
        self.drawn += metrics["drawn"]
        parts = [
            ("E r {:.3f}", metrics["reward"]),
            ("gold {:.3f}", metrics.get("gold")),
            ("KL {:.2f}", metrics["kl_prior"]),
            ("ELBO {:.2f}", metrics["elbo"]),
        ]
        parts += [("loss {:.3f}", metrics["loss"]), ("{:.0f} tok/s", metrics["tokens_per_second"])]
        known = [(form, value) for form, value in parts if value is not None and math.isfinite(value)]
        status = "  ".join(form.format(value) for form, value in known)
        self._progress.update(self._task, completed=step, status=status)
        if self._path is not None:
            line = json.dumps(plain({"step": step, **metrics})) + "\n"
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                raise InputError(
                    f"{self._path} cannot be written ({error.strerror}); make room, then go on with --resume"
                ) from error
        if self._accelerator is not None:
            flat = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            self._accelerator.log(flat, step=step)

    def position(self) -> int:
        """Bytes of the metrics so far; a checkpoint keeps it, so that a resumed run does not log a step twice."""
        return self._path.stat().st_size if self._path is not None else 0

    def rewind(self, position: int) -> None:
        """Forget what was logged after a checkpoint."""
        if self._path is not None and position < self.position():
            with self._path.open("r+b") as file:
                file.truncate(position)


def plain(value: Any) -> Any:
    """A value as JSON has it: no NaN and no infinity, they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value if value is None or isinstance(value, str | int) else str(value)


def _trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> Any:
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    absent = [name for name in names if name not in map(str, get_available_trackers())]
    if absent:  # accelerate would say nothing and log nowhere
        raise InputError(f"tracker {absent[0]!r} is not installed; install it, or choose tensorboard, wandb or trackio")
    try:
        accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
        plain = {k: v for k, v in config.items() if isinstance(v, int | float | str | bool)}
        accelerator.init_trackers("tiltlm", config=plain)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"tracker {', '.join(names)} cannot be used ({error}); install it, or choose tensorboard, wandb or trackio"
        ) from error
    return accelerator
