"""Legends as HTML: they wrap on a telephone and follow the page's colours, which Plotly's own do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tiltlm.report.palette import LIGHT


@dataclass(frozen=True)
class Key:
    """One entry: the shape is "line", "dots", "dot", "ring", "diamond", "tick" or "arrow"; the tone a colour of the palette."""

    name: str
    shape: str
    tone: str


_SHAPES = {"diamond-open": "diamond", "line-ns": "tick", "triangle-right-open": "arrow"}


def legend(figure: go.Figure | None) -> list[Key]:
    """The named traces of a figure, by their rank."""
    data: list[Any] = [] if figure is None else list(figure.data)
    traces = [trace for trace in data if trace.name and trace.showlegend is not False]
    return [_key(trace) for trace in sorted(traces, key=lambda t: t.legendrank or 1000)]


def _key(trace: Any) -> Key:
    names = {value: name for name, value in LIGHT.items()}
    if trace.mode == "lines":
        return Key(trace.name, "dots" if trace.line.dash else "line", names[trace.line.color])
    if trace.marker.color == LIGHT["paper"]:
        return Key(trace.name, "ring", names[trace.marker.line.color])
    return Key(trace.name, _SHAPES.get(trace.marker.symbol, "dot"), names[trace.marker.color])
