"""Reward hacking in the report: proxy and held-out reward over sqrt(KL), the parts of the reward, its length bias, heavy draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from tiltlm.diagnostics.overoptimisation import FEWEST, Overoptimisation, fit_overoptimisation
from tiltlm.errors import InputError
from tiltlm.estimates import Z95, Estimate
from tiltlm.report.canvas import canvas
from tiltlm.report.folder import Json, Run, finite
from tiltlm.report.palette import LIGHT
from tiltlm.report.panels import Panel, smooth
from tiltlm.report.words import show, show_estimate, show_range

DRAWN = 120
"""Points of a drawn curve."""
GOLDEN = 0.6180339887498949
"""Spreads dots of the same length evenly within their column."""
FEW_LENGTHS = 12
"""As many different lengths have a tick each."""


def seen(run: Run) -> list[dict[str, float]]:
    """Measurements of gold along training: step, KL smoothed over a tenth of the run, proxy, gold and its standard error."""
    columns = {"kl": "kl_prior", "proxy": "reward", "gold": "gold", "stderr": "gold_stderr"}
    rows = [{new: finite(row.get(old)) for new, old in columns.items()} | {"step": row["step"]} for row in run.metrics]
    whole = [{k: float(v) for k, v in row.items() if v is not None} for row in rows]
    whole = [row for row in whole if {"kl", "proxy", "gold"} <= row.keys()]
    smoothed = _steady([row["kl"] for row in whole])
    return [row | {"kl": max(0.0, kl)} for row, kl in zip(whole, smoothed, strict=True)]


def _steady(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the run. Windows stay symmetric to the ends, so that a steady rise is not bent."""
    reach, last = max(1, len(values) // 20), len(values) - 1
    halves = [min(reach, i, last - i) for i in range(len(values))]
    return [math.fsum(values[i - h : i + h + 1]) / (2 * h + 1) for i, h in enumerate(halves)]


def prior_gold(run: Run) -> Estimate | None:
    """The held-out reward under the prior: as certified, else as planned."""
    certified = ((run.hacking or {}).get("gold") or {}).get("prior")
    if certified and finite(certified["value"]) is not None and finite(certified["stderr"]) is not None:
        return Estimate(certified["value"], certified["stderr"], certified["n"])
    planned = (run.plan.get("gold") or {}).get("prior")
    if planned and all(finite(planned[key]) is not None for key in ("value", "low", "high")):
        return Estimate(planned["value"], (planned["high"] - planned["low"]) / (2 * Z95), 1)
    return None


def fitted(run: Run) -> Overoptimisation | None:
    """The curve of Gao et al. (2023) through the gold seen in training; None where there is too little of it."""
    rows = [row for row in seen(run) if row.get("stderr", 0.0) > 0]
    if len(rows) < FEWEST + 2:
        return None
    columns = [[row[name] for row in rows] for name in ("kl", "gold", "stderr")]
    prior = prior_gold(run)
    try:
        return fit_overoptimisation(*columns, prior=prior if prior and prior.stderr > 0 else None)
    except InputError:  # the policy did not move
        return None


def has_gold(run: Run) -> bool:
    """Whether a held-out reward was seen, planned or certified."""
    return bool(seen(run) or run.plan.get("gold") or (run.hacking or {}).get("gold"))


def alarm_of(run: Run) -> Json | None:
    """The alarm that training raised, if it did."""
    return next((row["alarm"] for row in run.metrics if row.get("alarm")), None)


def hacking_lines(run: Run, certified: bool = True) -> list[str]:
    """What a person should know of the held-out reward, in two lines; none where there is no such reward.

    Args:
        certified: whether the certificate is of the policy that training left, and not of an earlier one.
    """
    if not has_gold(run):
        return []
    rows, alarm = seen(run), alarm_of(run)
    means = (run.hacking or {}).get("gold") or {}
    if certified and {"policy", "prior"} <= means.keys():
        what = f"Held out: gold went from {show_estimate(means['prior'])} to {show_estimate(means['policy'])}"
    elif rows:
        share = max(1, len(rows) // 10)
        first, last = (math.fsum(r["gold"] for r in part) / share for part in (rows[:share], rows[-share:]))
        what = f"Held out: gold went from {show(first, 3)} to {show(last, 3)} in training"
    else:
        what = "Held out: gold was predicted, and not seen in training"
    found = fitted(run)
    where = [found.sentence] if found is not None else []
    if not where and run.plan.get("gold"):
        where = [str(run.plan["gold"]["sentence"]).removeprefix("gold: ").rstrip(".")]
    if found is not None and found.verdict in ("peak", "falling"):
        now = max(row["kl"] for row in rows[-max(1, len(rows) // 10) :])
        where.append(f"the policy is at {show(now)} nats" + (", past it" if now > found.peak.high else ""))
    warned = str(alarm["sentence"]) if alarm else ("no alarm" if rows else "")
    second = "; ".join([part for part in (warned, *where) if part])
    return [what + ".", second[:1].upper() + second[1:] + "."] if second else [what + "."]


def part_lines(run: Run) -> list[str]:
    """What became of each part of the evidence, a line a part; none where certify has not looked, or where there is one part."""
    parts = (run.hacking or {}).get("parts") or {}
    lines = []
    for name, part in parts.items():
        change = part["change"]
        if len(parts) > 1 and all(finite(change[key]) is not None for key in ("value", "low", "high")):
            by = f"{change['value']:+.3g} [{change['low']:.2g}, {change['high']:.2g}]"
            lines.append(
                f"{name}: {show(part['prior'], 3)} under the prior, {show(part['policy'], 3)} under the policy ({by})"
            )
    return lines


def overoptimisation_figure(run: Run) -> go.Figure | None:
    """Proxy above and gold below over d = sqrt(KL): predicted, seen, fitted, and the peak."""
    if not has_gold(run):
        return None
    figure = canvas(620, "√KL to the prior, √nats")
    grid = figure.layout.yaxis.to_plotly_json()  # pyright: ignore
    title = {"text": "trained on, reward units", "font": grid["title"]["font"], "standoff": 12}
    figure.update_layout(yaxis2=grid | {"domain": [0.54, 1.0], "title": title})
    figure.update_layout(yaxis={"domain": [0.0, 0.46], "title_text": "held out (gold)"}, margin_r=24)
    rows, found = seen(run), fitted(run)
    points = [p for p in (run.plan.get("gold") or {}).get("points", ()) if p["reliable"]]
    points = [p for p in points if finite(p["kl"]["value"]) is not None]
    for axis, planned, measured, tone in (("y2", "proxy", "proxy", "policy"), ("y", "gold", "gold", "gold")):
        _add_predicted(figure, points, planned, axis)
        _add_seen(figure, rows, measured, tone, axis)
    if found is not None:
        _add_fit(figure, found)
    return figure


def _add_predicted(figure: go.Figure, points: Sequence[Json], name: str, axis: str) -> None:
    if len(points) < 2:
        return
    xs = [math.sqrt(max(0.0, p["kl"]["value"])) for p in points]
    whole = [(x, p[name]) for x, p in zip(xs, points, strict=True) if finite(p[name]["low"]) is not None]
    figure.add_scatter(
        x=[x for x, _ in [*whole, *reversed(whole)]],
        y=[p["low"] for _, p in whole] + [p["high"] for _, p in reversed(whole)],
        fill="toself",
        fillcolor=LIGHT["posterior_band"],
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        yaxis=axis,
    )
    figure.add_scatter(
        x=xs,
        y=[p[name]["value"] for p in points],
        mode="lines",
        line={"color": LIGHT["posterior"], "width": 2.2},
        name="predicted from the prior’s draws, 95%" if axis == "y" else None,
        showlegend=axis == "y",
        legendrank=1,
        yaxis=axis,
        customdata=[f"{p['beta']:.3g}" for p in points],
        hovertemplate="<b>β = %{customdata}</b><br>predicted %{y:.3f}<extra></extra>",
    )


def _add_seen(figure: go.Figure, rows: Sequence[dict[str, float]], name: str, tone: str, axis: str) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["kl"])
    xs, ys = [math.sqrt(row["kl"]) for row in rows], [row[name] for row in rows]
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="markers",
        marker={"size": 6, "color": LIGHT[f"{tone}_faint"]},
        showlegend=False,
        yaxis=axis,
        customdata=[int(row["step"]) for row in rows],
        hovertemplate="step %{customdata}<br>%{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=xs,
        y=smooth(ys),
        mode="lines",
        line={"color": LIGHT[f"{tone}_soft"], "width": 1.6},
        name="held out, in training" if tone == "gold" else "trained on, in training",
        legendrank=3 if tone == "gold" else 2,
        yaxis=axis,
        hoverinfo="skip",
    )


def _add_fit(figure: go.Figure, found: Overoptimisation) -> None:
    """The fitted curve over what was seen, and its peak where it is inside."""
    last = math.sqrt(found.seen[1])
    xs = [last * i / DRAWN for i in range(DRAWN + 1)]
    figure.add_scatter(
        x=xs,
        y=[found.at(x * x) for x in xs],
        mode="lines",
        line={"color": LIGHT["gold"], "width": 2.6},
        name="fit d (a − b log d)",
        legendrank=4,
        hovertemplate="√KL %{x:.2f}<br>fit %{y:.3f}<extra></extra>",
    )
    if found.verdict != "peak":
        return
    d = math.sqrt(found.peak.value)
    low, high = math.sqrt(found.peak.low), min(last, math.sqrt(found.peak.high))
    band = {"fillcolor": LIGHT["gold_band"], "line": {"width": 0}, "layer": "below"}
    figure.add_shape(type="rect", xref="x", yref="paper", x0=low, x1=high, y0=0, y1=1, **band)
    line = {"color": LIGHT["gold"], "width": 1.5, "dash": "dash"}
    figure.add_shape(type="line", xref="x", yref="paper", x0=d, x1=d, y0=0, y1=1, line=line)
    text = f"gold peaks at {show(found.peak.value)} {show_range(found.peak.low, found.peak.high)} nats"
    label = {"showarrow": False, "bgcolor": LIGHT["veil"], "font": {"color": LIGHT["gold"], "size": 13}}
    side = {"xanchor": "left", "xshift": 6} if d < 0.6 * last else {"xanchor": "right", "xshift": -6}
    figure.add_annotation(x=d, y=0.5, yref="paper", text=text, **side, **label)


def part_panels(run: Run) -> list[Panel]:
    """Every part of the reward over training, and gold; empty where the reward has one part and nothing is held out."""
    names = sorted({key for row in run.metrics for key in row if key.startswith("reward/")})
    columns = [(name, name.removeprefix("reward/"), "policy") for name in names]
    if any(finite(row.get("gold")) is not None for row in run.metrics):
        columns.append(("gold", "held out (gold)", "gold"))
    if len(columns) < 2:
        return []
    panels = []
    for key, title, tone in columns:
        pairs = [(row["step"], y) for row in run.metrics if (y := finite(row.get(key))) is not None]
        if pairs:
            panels.append(Panel(title, "its own units", "", _curve(pairs, tone)))
    return panels


def _curve(pairs: Sequence[tuple[float, float]], tone: str) -> go.Figure:
    figure = canvas(220, "step")
    steps, values = [x for x, _ in pairs], [y for _, y in pairs]
    line = {"color": LIGHT[f"{tone}_faint"], "width": 1.2}
    figure.add_scatter(x=steps, y=values, mode="lines", line=line, hovertemplate="step %{x}<br>%{y:.3f}<extra></extra>")
    line = {"color": LIGHT[tone], "width": 2.2}
    figure.add_scatter(x=steps, y=smooth(values), mode="lines", line=line, hoverinfo="skip")
    return figure


def length_figure(run: Run) -> go.Figure | None:
    """Reward against length, a dot a draw, of the prior and of the policy; None where all of them have one length."""
    draws = (run.hacking or {}).get("draws") or {}
    kinds = {
        kind: [d for d in draws.get(kind) or () if finite(d["reward"]) is not None] for kind in ("prior", "policy")
    }
    lengths = {d["length"] for dots in kinds.values() for d in dots}
    if len(lengths) < 2:
        return None
    figure = canvas(380, "tokens in the completion", "reward, reward units")
    if max(lengths) - min(lengths) < FEW_LENGTHS:  # else Plotly would put ticks between them
        figure.update_xaxes(dtick=1, range=[min(lengths) - 1, max(lengths) + 1])
    for rank, (kind, dots) in enumerate(kinds.items(), start=1):
        if dots:
            figure.add_scatter(
                x=[d["length"] + 0.6 * ((i * GOLDEN) % 1 - 0.5) for i, d in enumerate(dots)],
                y=[d["reward"] for d in dots],
                mode="markers",
                marker={"size": 6, "color": LIGHT[kind], "opacity": 0.45},
                name=f"{kind}: {_correlation(run, kind, dots)}",
                legendrank=rank,
                customdata=[d["length"] for d in dots],
                hovertemplate=f"{kind}<br>%{{customdata}} tokens<br>reward %{{y:.3f}}<extra></extra>",
            )
    return figure


def _correlation(run: Run, kind: str, dots: Sequence[Json]) -> str:
    found: Any = ((run.hacking or {}).get("length") or {}).get(kind) or {}
    if finite(found.get("value")) is None:
        lengths = {d["length"] for d in dots}
        return f"all of {lengths.pop()} tokens" if len(lengths) == 1 else "correlation unknown"
    return f"correlation {show(found['value'])} {show_range(found['low'], found['high'])}"


def heaviest(run: Run) -> list[dict[str, Any]]:
    """The draws with the largest log p*/q, as text with their parts."""
    rows = []
    for entry in (run.hacking or {}).get("heaviest") or ():
        parts = [(str(name), show(value)) for name, value in entry["parts"].items()] if len(entry["parts"]) > 1 else []
        numbers = [("log weight", show(entry["log_weight"])), ("reward", show(entry["reward"])), *parts]
        if finite(entry.get("gold")) is not None:
            numbers.append(("gold", show(entry["gold"])))
        numbers.append(("tokens", str(entry["length"])))
        rows.append({"prompt": str(entry["prompt"]), "text": str(entry["text"]).strip(), "numbers": numbers})
    return rows
