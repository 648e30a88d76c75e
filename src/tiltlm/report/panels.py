"""The training as small multiples: reward, KL to the prior and ELBO over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from tiltlm.report.canvas import canvas, error_bars
from tiltlm.report.folder import Run, finite
from tiltlm.report.landing import predicted
from tiltlm.report.palette import LIGHT
from tiltlm.report.words import show, show_range, spread


@dataclass(frozen=True)
class Panel:
    """One of the small multiples; `goal` says what its dashed line is."""

    title: str
    unit: str
    goal: str
    figure: go.Figure


def training_panels(run: Run) -> list[Panel]:
    """Reward, KL to the prior and ELBO over the steps, each with what the plan says of the posterior."""
    aim = predicted(run) or {}
    log_z = (run.certificate or {}).get("log_z_lower") or aim.get("log_z")
    columns = (
        ("reward", "Mean reward", "reward units", aim.get("reward"), "predicted"),
        ("kl_prior", "KL to the prior", "nats", aim.get("kl"), "predicted"),
        ("elbo", "ELBO", "nats", log_z, "log Z ≥"),
    )
    panels = []
    for name, title, unit, aimed, word in columns:
        pairs = [(row["step"], y) for row in run.metrics if (y := finite(row.get(name))) is not None]
        goal = finite(aimed["value"]) if aimed else None
        if pairs:
            says = "" if goal is None else f"{word} {show(goal)}"
            panels.append(Panel(title, unit, says, _curve(run, name, pairs, goal)))
    return panels


def _curve(run: Run, name: str, pairs: Sequence[tuple[float, float]], goal: float | None) -> go.Figure:
    figure = canvas(250, "step")
    steps, values = [x for x, _ in pairs], [y for _, y in pairs]
    hover = "step %{x}<br>%{y:.3f}<extra></extra>"
    line = {"color": LIGHT["policy_faint"], "width": 1.2}
    figure.add_scatter(x=steps, y=values, mode="lines", line=line, hovertemplate=hover)
    line = {"color": LIGHT["policy"], "width": 2.2}
    figure.add_scatter(x=steps, y=smooth(values), mode="lines", line=line, hoverinfo="skip")
    certified = [(row["step"], row["certificate"]) for row in run.metrics if row.get("certificate")]
    if run.certificate is not None and not any(step == steps[-1] for step, _ in certified):
        certified.append((steps[-1], run.certificate))
    for step, certificate in certified:
        value, low, high = spread(certificate[name])
        if value is not None:
            says = f"{show(value, 3)} {show_range(low, high, 3)}"
            figure.add_scatter(
                x=[step],
                y=[value],
                error_y=error_bars(value, low, high, LIGHT["policy"]),
                mode="markers",
                marker={"size": 9, "color": LIGHT["paper"], "line": {"color": LIGHT["policy"], "width": 2}},
                hovertemplate=f"certificate after step {step}<br>{says}<extra></extra>",
            )
    if goal is not None:
        figure.add_hline(y=goal, line={"color": LIGHT["posterior"], "width": 1.5, "dash": "dash"})
        # A line that no trace reaches would fall out of the range that Plotly finds by itself.
        figure.add_scatter(x=[steps[0]], y=[goal], mode="markers", marker={"opacity": 0}, hoverinfo="skip")
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the run (three steps at least), narrower at the ends."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]
