"""The picture of the cost curves: a panel an axis, seconds above and bytes below, both logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from curves import curves
from fits import last_exponent
from plotly.subplots import make_subplots
from tasks import photograph

from tiltlm.report.canvas import canvas
from tiltlm.report.palette import LIGHT

LINES = {
    "seconds a step": ("policy", "whole step"),
    "seconds, draw and score": ("posterior", "drawing, judging, scoring"),
    "seconds, update": ("gold", "update"),
}


def draw(result: dict[str, Any], file: Path) -> None:
    """Write the picture as a page, and beside it as PNG where there is a browser to photograph it."""
    drawn = figure(result)
    drawn.write_html(file, include_plotlyjs="cdn")
    photograph(drawn, file.with_suffix(".png"))


def figure(result: dict[str, Any]) -> go.Figure:
    """The figure: a dotted line of slope 1 through the first point of each panel says what linear growth would be."""
    found = curves(result)
    names = list(found)
    out = make_subplots(rows=2, cols=len(names), vertical_spacing=0.12, horizontal_spacing=0.05)
    plain = canvas(620, "").layout.to_plotly_json()
    axes = {name: plain.pop(name) for name in ("xaxis", "yaxis")}
    out.update_layout(plain, width=260 * len(names) + 80, margin_t=30)
    out.update_xaxes(axes["xaxis"], type="log")
    out.update_yaxes(axes["yaxis"], type="log")
    for place, axis in enumerate(names, 1):
        curve = found[axis]
        for name, (colour, label) in LINES.items():
            _line(out, curve["size"], curve[name], 1, place, LIGHT[colour], label)
        _line(out, curve["size"], [value / 1e6 for value in curve["bytes"]], 2, place, LIGHT["policy"], "bytes")
        for row, name in ((1, "seconds a step"), (2, "bytes")):
            scale = 1e6 if name == "bytes" else 1.0
            _linear(out, curve["size"], curve[name][0] / scale, row, place)
        ticks = {"tickvals": curve["size"], "ticktext": [f"{size:,}" for size in curve["size"]]}
        out.update_xaxes(row=1, col=place, **ticks)
        out.update_xaxes(row=2, col=place, title_text=axis, **ticks)
    out.update_yaxes(row=1, col=1, title_text="seconds")
    out.update_yaxes(row=2, col=1, title_text="MB of a step")
    for number, (colour, label) in enumerate(LINES.values()):
        where = {"xref": "paper", "yref": "paper", "x": 0.24 * number, "y": 1.05, "xanchor": "left"}
        out.add_annotation(text=label, showarrow=False, font={"color": LIGHT[colour], "size": 13}, **where)
    return out


def _line(out: go.Figure, sizes: list[float], costs: list[float], row: int, col: int, colour: str, label: str) -> None:
    said = f"{label}: %{{y:.3g}} at %{{x:,}}, last exponent {last_exponent(sizes, costs):.2f}<extra></extra>"
    look = {"mode": "lines+markers", "line": {"color": colour, "width": 2}, "marker": {"size": 6}}
    out.add_scatter(x=sizes, y=costs, hovertemplate=said, row=row, col=col, **look)


def _linear(out: go.Figure, sizes: list[float], first: float, row: int, col: int) -> None:
    line = {"color": LIGHT["prior"], "width": 1, "dash": "dot"}
    costs = [first * size / sizes[0] for size in sizes]
    out.add_scatter(x=sizes, y=costs, mode="lines", line=line, hoverinfo="skip", row=row, col=col)
