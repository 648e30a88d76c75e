"""Expected reward against KL to the prior: the predicted frontier, best of n, and where the policy went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from tiltlm.report.canvas import canvas, error_bars
from tiltlm.report.folder import Json, Run, finite
from tiltlm.report.landing import at_beta, frontier_of, predicted, shortfall
from tiltlm.report.palette import LIGHT
from tiltlm.report.panels import smooth
from tiltlm.report.words import show, show_beta, spread


def frontier_figure(run: Run) -> go.Figure:
    """Expected reward against KL to the prior: predicted over beta, best of n, and where the policy went."""
    figure = canvas(560, "KL to the prior, nats a completion", "expected reward, reward units")
    figure.update_layout(margin_r=24)
    points = frontier_of(run.plan)
    right = _reach(run, points)
    add_curve(figure, [origin(run.plan), *points])
    add_best_of_n(figure, run.plan["best_of_n"], right)
    add_prior(figure, run.plan["prior_reward"])
    _add_path(figure, run.metrics)
    _add_prediction(figure, run)
    _add_policy(figure, run)
    _add_betas(figure, run, points, right)
    low, high = _heights(run, points, right)
    pad = 0.07 * (high - low or 1.0)
    figure.update_xaxes(range=[-0.025 * right, right])
    figure.update_yaxes(range=[low - pad, high + pad])
    return figure


def origin(plan: Json) -> Json:
    """The prior as the frontier's first point: the optimum at an infinite beta."""
    ess, prior = plan.get("samples_per_prompt"), plan["prior_reward"]
    return {"beta": math.inf, "kl": {"value": 0.0}, "reward": prior, "ess": ess, "reliable": True}


def _trusted(points: Sequence[Json]) -> int:
    """How many points come before the first that the plan does not trust."""
    return next((i for i, point in enumerate(points) if not point["reliable"]), len(points))


def _reach(run: Run, points: Sequence[Json]) -> float:
    """The right end of the picture: all that is trusted or happened, and only a glimpse of the rest."""
    trusted = _trusted(points)
    inside = [points[trusted - 1]["kl"]["value"] * 1.12] if trusted else [p["kl"]["value"] for p in points]
    aim = predicted(run)
    if aim is not None:
        inside.append(1.15 * (finite(aim["kl"]["high"]) or aim["kl"]["value"]))
    if run.certificate is not None:
        value, _, high = spread(run.certificate["kl_prior"])
        inside.append(1.12 * (high or value or 0.0))
    inside += [1.08 * x for x, _ in smooth_path(run.metrics)]
    return max([*inside, 1e-3])


def _heights(run: Run, points: Sequence[Json], right: float) -> tuple[float, float]:
    prior = run.plan["prior_reward"]
    values: list[Any] = [prior["value"], prior["low"], *(y for _, y in smooth_path(run.metrics))]
    for point in points:
        if point["kl"]["value"] <= right:
            values += [point["reward"][key] for key in ("value", "low", "high")]
    values += [point["reward"] for point in run.plan["best_of_n"] if point["kl"] <= right]
    if run.certificate is not None:
        values += spread(run.certificate["reward"])
    known = [number for value in values if (number := finite(value)) is not None]
    return (min(known), max(known)) if known else (0.0, 1.0)


def add_curve(figure: go.Figure, points: Sequence[Json]) -> None:
    """The predicted frontier with its band; dotted from where the draws are too few."""
    points = [point for point in points if finite(point["reward"]["value"]) is not None]
    cut = _trusted(points)
    near, far = points[:cut], points[max(0, cut - 1) :]
    for part, tint in ((far, "posterior_far"), (near, "posterior_band")):
        band = [p for p in part if finite(p["reward"]["low"]) is not None and finite(p["reward"]["high"]) is not None]
        if len(band) > 1:
            figure.add_scatter(
                x=[p["kl"]["value"] for p in [*band, *reversed(band)]],
                y=[p["reward"]["low"] for p in band] + [p["reward"]["high"] for p in reversed(band)],
                fill="toself",
                fillcolor=LIGHT[tint],
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
            )
    for part, name, rank, line in (
        (far, "too few draws to tell", 7, {"color": LIGHT["prior"], "width": 2, "dash": "dot"}),
        (near, "predicted frontier, 95%", 2, {"color": LIGHT["posterior"], "width": 2.5}),
    ):
        if len(part) > 1 or (part and part is near):
            figure.add_scatter(
                x=[p["kl"]["value"] for p in part],
                y=[p["reward"]["value"] for p in part],
                mode="lines",
                line=line,
                name=name,
                legendrank=rank,
                customdata=[
                    [show_beta(p["beta"]), show(p["reward"]["low"]), show(p["reward"]["high"]), show(p["ess"], 1)]
                    for p in part
                ],
                hovertemplate="<b>β = %{customdata[0]}</b><br>reward %{y:.3f} [%{customdata[1]}, %{customdata[2]}]"
                "<br>KL %{x:.2f} nats<br>ESS %{customdata[3]}<extra></extra>",
            )


def add_best_of_n(figure: go.Figure, known: Sequence[Json], right: float) -> None:
    """Best of 2, 4, 8, … of the prior, as far as the picture goes."""
    points = [p for p in known if p["kl"] <= right]
    if not points:
        return
    figure.add_scatter(
        x=[p["kl"] for p in points],
        y=[p["reward"] for p in points],
        mode="markers+text",
        marker={"symbol": "diamond-open", "size": 9, "color": LIGHT["muted"], "line": {"width": 1.5}},
        text=[str(p["n"]) for p in points],
        textposition="bottom right",
        textfont={"size": 12, "color": LIGHT["muted"]},
        name="best of n",
        legendrank=4,
        hovertemplate="<b>best of %{text}</b><br>reward %{y:.3f}<br>KL %{x:.2f} nats<extra></extra>",
    )


def add_prior(figure: go.Figure, prior: Json) -> None:
    """The prior, at no distance from itself."""
    value, low, high = (finite(prior[key]) for key in ("value", "low", "high"))
    if value is None:
        return
    figure.add_scatter(
        x=[0.0],
        y=[value],
        error_y=error_bars(value, low, high, LIGHT["prior"]),
        mode="markers+text",
        marker={"size": 11, "color": LIGHT["prior"]},
        text=["prior"],
        textposition="bottom right",
        textfont={"size": 13, "color": LIGHT["muted"]},
        name="prior",
        legendrank=1,
        hovertemplate=f"<b>prior</b><br>reward {show(value, 3)} [{show(low)}, {show(high)}]<extra></extra>",
    )


def _pairs(metrics: Sequence[Json]) -> list[tuple[float, float]]:
    both = [(finite(row.get("kl_prior")), finite(row.get("reward"))) for row in metrics]
    return [(kl, reward) for kl, reward in both if kl is not None and reward is not None]


def smooth_path(metrics: Sequence[Json]) -> list[tuple[float, float]]:
    """(KL, reward) along training, smoothed."""
    pairs = _pairs(metrics)
    return list(zip(smooth([x for x, _ in pairs]), smooth([y for _, y in pairs]), strict=True))


def _add_path(figure: go.Figure, metrics: Sequence[Json]) -> None:
    raw, path = _pairs(metrics), smooth_path(metrics)
    if not raw:
        return
    steps = [
        row["step"]
        for row in metrics
        if finite(row.get("kl_prior")) is not None and finite(row.get("reward")) is not None
    ]
    figure.add_scatter(
        x=[x for x, _ in raw],
        y=[y for _, y in raw],
        mode="markers",
        marker={"size": 5, "color": LIGHT["policy_faint"]},
        customdata=steps,
        showlegend=False,
        hovertemplate="step %{customdata}<br>reward %{y:.3f}<br>KL %{x:.2f} nats<extra></extra>",
    )
    figure.add_scatter(
        x=[x for x, _ in path],
        y=[y for _, y in path],
        mode="lines",
        line={"color": LIGHT["policy_soft"], "width": 1.5},
        name="training, smoothed",
        legendrank=5,
        hoverinfo="skip",
    )


def _add_prediction(figure: go.Figure, run: Run) -> None:
    aim = predicted(run)
    if aim is None:
        return
    label = f"posterior at β = {show_beta(aim['beta'])}, predicted"
    figure.add_scatter(
        x=[aim["kl"]["value"]],
        y=[aim["reward"]["value"]],
        mode="markers",
        marker={"size": 15, "color": LIGHT["paper"], "line": {"color": LIGHT["posterior"], "width": 3}},
        name=label,
        legendrank=3,
        hovertemplate=f"<b>{label}</b><br>reward %{{y:.3f}}<br>KL %{{x:.2f}} nats<extra></extra>",
    )


def _add_policy(figure: go.Figure, run: Run) -> None:
    if run.certificate is None:
        return
    kl, kl_low, kl_high = spread(run.certificate["kl_prior"])
    reward, low, high = spread(run.certificate["reward"])
    if kl is None or reward is None:
        return
    label = {"showarrow": False, "xanchor": "left", "align": "left", "bgcolor": LIGHT["veil"], "borderpad": 2}
    label |= {"font": {"color": LIGHT["policy"], "size": 13}}
    figure.add_annotation(x=kl, y=reward, text="<b>policy</b>", xshift=9, yshift=-17, **label)
    gap = shortfall(run)
    if gap is not None and gap.place != "on":
        line = {"color": LIGHT["policy"], "width": 1.5, "dash": "dot"}
        figure.add_shape(type="line", x0=kl, x1=kl, y0=reward, y1=gap.expected, line=line)
        text = f"{show(abs(gap.gap))} {gap.place}<br>the frontier"
        figure.add_annotation(x=kl, y=(reward + gap.expected) / 2, text=text, xshift=6, **label)
    figure.add_scatter(
        x=[kl],
        y=[reward],
        error_x=error_bars(kl, kl_low, kl_high, LIGHT["policy"]),
        error_y=error_bars(reward, low, high, LIGHT["policy"]),
        mode="markers",
        marker={"size": 13, "color": LIGHT["policy"]},
        name="policy, certified",
        legendrank=6,
        hovertemplate=f"<b>policy</b><br>reward {show(reward, 3)} [{show(low, 3)}, {show(high, 3)}]"
        f"<br>KL {show(kl)} [{show(kl_low)}, {show(kl_high)}] nats<extra></extra>",
    )


def _add_betas(figure: go.Figure, run: Run, points: Sequence[Json], right: float) -> None:
    """A few round betas along the curve, where there is room for them."""
    aim = predicted(run)
    taken = [0.0] + ([aim["kl"]["value"]] if aim else [])
    spots: list[Json] = []
    for beta in _round_betas(points):
        spot = at_beta(list(points), beta)
        if spot is None or spot["kl"]["value"] > 0.94 * right:
            continue
        at = spot["kl"]["value"]
        if all(abs(at - other) > 0.085 * right for other in taken):
            taken.append(at)
            spots.append(spot)
    if not spots:
        return
    marker = {"size": 6, "color": LIGHT["posterior"]}
    on_curve = [(p["beta"], p["kl"]["value"], p["reward"]["value"]) for p in spots]
    label_betas(figure, on_curve, marker=marker, hoverinfo="skip", showlegend=False)


def label_betas(figure: go.Figure, points: Sequence[tuple[float, float, float]], **looks: Any) -> None:
    """Markers of (beta, KL, reward), each with its beta to the left."""
    figure.add_scatter(
        x=[kl for _, kl, _ in points],
        y=[reward for *_, reward in points],
        mode="markers+text",
        text=[f"β {beta:g}  " for beta, *_ in points],
        textposition="top left",
        textfont={"size": 12, "color": LIGHT["posterior"]},
        **looks,
    )


def _round_betas(points: Sequence[Json]) -> list[float]:
    """Round numbers between the smallest and the largest beta, the roundest first."""
    betas = [point["beta"] for point in points]
    if not betas:
        return []
    decades = range(math.floor(math.log10(min(betas))), math.ceil(math.log10(max(betas))) + 1)
    found = [
        float(f"{mantissa * 10.0**decade:.3g}") for mantissa in (1.0, 2.0, 5.0, 3.0, 1.5, 7.0) for decade in decades
    ]
    return [beta for beta in found if min(betas) <= beta <= max(betas)]
