"""When to be silent? The risk of the answers given against how many are given, a curve a method."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from tiltlm.report.canvas import canvas
from tiltlm.report.folder import Json
from tiltlm.report.palette import LIGHT

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
"""Methods beyond prior and policy are told apart by their dashes."""


def risk_coverage_figure(curves: Sequence[Json]) -> go.Figure:
    """The picture of some `RiskCoverage.as_dict()`: to the left only the surest questions are answered, to the right all."""
    figure = canvas(
        440, "coverage: share of the questions that are answered", "risk: share of the answers that is wrong"
    )
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(margin_t=56, width=760, showlegend=True, legend=legend)
    colours = {"prior": LIGHT["prior"], "policy": LIGHT["policy"]}
    others = [curve["name"] for curve in curves if curve["name"] not in colours]
    for curve in curves:
        name, points = curve["name"], curve["points"]
        dash = DASHES[others.index(name) % len(DASHES)] if name in others else "solid"
        figure.add_scatter(
            x=[point["coverage"] for point in points],
            y=[point["risk"] for point in points],
            customdata=[point["confidence"] for point in points],
            mode="lines+markers",
            line={"color": colours.get(name, LIGHT["posterior"]), "width": 2, "dash": dash},
            marker={"size": 7},
            name=f"{name}, area {curve['area']:.3f}",
            hovertemplate=f"{name}: votes of at least %{{customdata:.2f}}<br>answers %{{x:.2f}}, wrong %{{y:.2f}}<extra></extra>",
        )
    figure.update_xaxes(range=[0, 1.02])
    figure.update_yaxes(range=[0, 1.02])
    return figure
