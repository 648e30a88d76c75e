"""A task's table as one picture: every metric a panel, every system a dot with its error."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tiltlm.evaluation.table import without_finer
from tiltlm.report.canvas import canvas
from tiltlm.report.folder import Json, finite
from tiltlm.report.palette import LIGHT
from tiltlm.report.words import show

ROW, HEAD = 26, 96
"""Pixels of a system, and of what is around them."""
ERRORS = 1.96


def task_figure(table: Json) -> go.Figure:
    """The picture of a `TaskTable.as_dict()`: 95% intervals over prompts and seeds, a line at the baseline."""
    names = without_finer(table["metrics"])
    systems = [system["name"] for system in table["systems"]][::-1]
    figure = make_subplots(rows=1, cols=len(names), shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.02)
    plain = canvas(HEAD + ROW * len(systems), "").layout.to_plotly_json()
    axes = {name: plain.pop(name) for name in ("xaxis", "yaxis")}
    figure.update_layout(plain, margin_t=40, width=180 + 150 * len(names))
    figure.update_xaxes(axes["xaxis"], nticks=4, tickangle=0)  # narrow panels: more numbers would be turned to fit
    figure.update_yaxes(axes["yaxis"])
    for place, metric in enumerate(names, 1):
        for system in table["systems"]:
            _dot(figure, system, metric, place, system["name"] == table["baseline"])
        base = next(system for system in table["systems"] if system["name"] == table["baseline"])
        value = finite(base["metrics"].get(metric, {}).get("value"))
        if value is not None:
            figure.add_vline(x=value, line={"color": LIGHT["prior"], "width": 1, "dash": "dot"}, row=1, col=place)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(categoryorder="array", categoryarray=systems, showgrid=False, automargin=True)
    return figure


def _dot(figure: go.Figure, system: Json, metric: str, place: int, baseline: bool) -> None:
    cell = system["metrics"].get(metric)
    value = None if cell is None else finite(cell["value"])
    if cell is None or value is None:
        return
    error = finite(cell["stderr"]) or 0.0
    colour = LIGHT["prior"] if baseline else LIGHT["policy"]
    bar = {"type": "data", "array": [ERRORS * error], "color": colour, "thickness": 2, "width": 0}
    said = f"{system['name']}: {show(value)} ± {show(error)}<extra></extra>"
    dot = {"color": colour, "size": 9}
    figure.add_scatter(
        x=[value], y=[system["name"]], error_x=bar, mode="markers", marker=dot, hovertemplate=said, row=1, col=place
    )
