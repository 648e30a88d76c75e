"""What all pictures share: an empty figure in the light palette on a transparent ground, error bars, and a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from tiltlm.errors import InputError
from tiltlm.report.palette import FONT, LIGHT


def canvas(height: int, x: str, y: str = "") -> go.Figure:
    """An empty figure: hairline grid, no box, room for what is said."""
    axis: dict[str, Any] = {
        "gridcolor": LIGHT["grid"],
        "linecolor": LIGHT["rule"],
        "tickcolor": LIGHT["rule"],
        "zeroline": False,
        "automargin": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickfont": {"color": LIGHT["muted"], "size": 12},
        "title": {"font": {"color": LIGHT["muted"], "size": 13}, "standoff": 12},
    }
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": LIGHT["ink"]},
        margin={"l": 12, "r": 12, "t": 14, "b": 12},
        hovermode="closest",
        hoverlabel={
            "bgcolor": LIGHT["paper"],
            "bordercolor": LIGHT["rule"],
            "font": {"color": LIGHT["ink"], "size": 13},
        },
        hoverlabel_align="left",
        dragmode=False,
        showlegend=False,  # see legend.py
    )
    figure.update_xaxes(**axis, title_text=x, showline=True)
    figure.update_yaxes(**axis, title_text=y, showline=False)
    return figure


def write_figure(figure: go.Figure, path: Path) -> Path:
    """A picture in a file that needs nothing else.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        figure.write_html(path, include_plotlyjs=True, config={"displayModeBar": False})
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); check its permissions") from error
    return path


def error_bars(value: float, low: float | None, high: float | None, colour: str) -> dict[str, Any]:
    """Plotly's `error_y` of an interval; none where an end is missing."""
    if low is None or high is None:
        return {"visible": False}
    ends = {"array": [high - value], "arrayminus": [value - low]}
    return {"type": "data", "symmetric": False, "color": colour, "thickness": 1.6, "width": 4, **ends}
