"""Progress bars of what takes long; on a terminal only, and gone when it is done."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class DrawBars(Progress):
    """A bar for each thing that is drawn."""

    def bar(self, what: str, count: int) -> Callable[[int], None]:
        """A bar of `count` steps; the function moves it on."""
        task = self.add_task(what, total=count)
        return lambda done: self.advance(task, done)


def draw_bars(console: Console) -> DrawBars:
    """Bars on this console."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    return DrawBars(*columns, console=console, transient=True, disable=not console.is_terminal or console.quiet)
