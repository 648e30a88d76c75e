"""Which beta? The predicted frontier as a curve, and on it what the optimum at each beta promises and what training reached."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from tiltlm.estimates import Z95
from tiltlm.report.canvas import canvas
from tiltlm.report.folder import Json
from tiltlm.report.frontier import add_best_of_n, add_curve, add_prior, label_betas, origin
from tiltlm.report.landing import frontier_of
from tiltlm.report.palette import LIGHT


def betas_figure(sweep: Json) -> go.Figure:
    """The picture of a `Sweep.as_dict()`: rings are predictions, dots policies, a dotted line leads from one to the other."""
    plan, points = sweep["plan"], sweep["points"]
    figure = canvas(520, "KL to the prior, nats a completion", "expected reward, reward units")
    figure.update_layout(
        margin_t=56, width=900, showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    curve = frontier_of(plan)
    right = _reach(curve, points)
    add_curve(figure, [origin(plan), *curve])
    add_best_of_n(figure, plan["best_of_n"], right)
    add_prior(figure, plan["prior_reward"])
    for point in points:
        _lead(figure, point)
    _rings(figure, points)
    _dots(figure, points, right, (0.0, plan["prior_reward"]["value"]))
    figure.update_xaxes(range=[-0.06 * right, right])  # the labels of the largest betas stand left of the prior
    return figure


def _reach(curve: Sequence[Json], points: Sequence[Json]) -> float:
    """The right end: all that was reached, and what is predicted of the betas as far as that can be trusted."""
    trusted = [p["kl"]["value"] for p in curve if p["reliable"]]
    asked = [p["predicted"]["kl"] for p in points if p["predicted"]["reliable"]]
    reached = [p["kl"]["value"] + Z95 * p["kl"]["stderr"] for p in points]
    return 1.12 * max([*trusted, *asked, *reached, 1e-3])


def _lead(figure: go.Figure, point: Json) -> None:
    """From the prediction to what was reached."""
    line = {"color": LIGHT["policy_soft"], "width": 1.2, "dash": "dot"}
    x, y = (point["predicted"]["kl"], point["kl"]["value"]), (point["predicted"]["reward"], point["reward"]["value"])
    figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def _rings(figure: go.Figure, points: Sequence[Json]) -> None:
    once = {point["beta"]: point["predicted"] for point in points}
    label_betas(
        figure,
        [(beta, p["kl"], p["reward"]) for beta, p in once.items()],
        marker={"size": 13, "color": LIGHT["paper"], "line": {"color": LIGHT["posterior"], "width": 2.5}},
        name="the posterior at β, predicted",
        legendrank=3,
        hovertemplate="<b>%{text}, predicted</b><br>reward %{y:.3f}<br>KL %{x:.2f} nats<extra></extra>",
    )


def _dots(figure: go.Figure, points: Sequence[Json], right: float, prior: tuple[float, float]) -> None:
    bar = {"type": "data", "color": LIGHT["policy"], "thickness": 1.6, "width": 4}
    at = [(point["kl"]["value"], point["reward"]["value"]) for point in points]
    rings = [(point["predicted"]["kl"], point["predicted"]["reward"]) for point in points]
    figure.add_scatter(
        x=[kl for kl, _ in at],
        y=[reward for _, reward in at],
        error_x={"array": [Z95 * point["kl"]["stderr"] for point in points], **bar},
        error_y={"array": [Z95 * point["reward"]["stderr"] for point in points], **bar},
        mode="markers+text",
        marker={"size": 11, "color": LIGHT["policy"]},
        text=[f"  β {point['beta']:g}  " for point in points],
        textposition=_beside(at, [*rings, prior], right),
        textfont={"size": 12, "color": LIGHT["policy"]},
        name="the policy trained at β",
        legendrank=6,
        customdata=[point["seed"] for point in points],
        hovertemplate="<b>%{text}</b>, seed %{customdata}<br>reward %{y:.3f}<br>KL %{x:.2f} nats<extra></extra>",
    )


CORNERS = {"bottom right": (1, -1), "top right": (1, 1), "bottom left": (-1, -1), "top left": (-1, 1)}
LABEL = (0.04, 0.04)
"""How far a label's middle is from its dot, as shares of the picture."""


def _beside(at: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]], right: float) -> list[str]:
    """For each dot the corner whose label is farthest from the other dots, from `others`, and from the labels before it."""
    heights = [reward for _, reward in (*at, *others)]
    tall = 1.3 * (max(heights) - min(heights)) or 1.0  # all of them fill about three quarters of the picture's height
    dots, taken = ([(kl / right, reward / tall) for kl, reward in some] for some in (at, others))
    chosen: list[str] = []
    for own, (x, y) in enumerate(dots):
        near = [*(dot for other, dot in enumerate(dots) if other != own), *taken]
        spots = {name: (x + a * LABEL[0], y + b * LABEL[1]) for name, (a, b) in CORNERS.items()}
        room = {name: min((math.dist(spot, other) for other in near), default=1.0) for name, spot in spots.items()}
        best = max(room, key=lambda name: min(room[name], 0.1))
        chosen.append(best)
        taken.append(spots[best])
    return chosen
