"""The picture of single prompts: which are close to their posterior, and which gave the reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from tiltlm.report.canvas import canvas
from tiltlm.report.folder import Json, Run, finite
from tiltlm.report.landing import predicted
from tiltlm.report.palette import LIGHT
from tiltlm.report.words import show, show_range

MOST = 40
"""Prompts that one picture holds."""
LABEL = 42


@dataclass(frozen=True)
class Row:
    """One prompt, from the certificate, the plan, or both."""

    prompt: str
    certified: Json | None
    planned: Json | None

    @property
    def distance(self) -> float:
        """What the rows are sorted by: KL to the posterior, or without a certificate what there is to gain."""
        if self.certified is not None:
            interval = self.certified["kl_posterior"]
            return finite(interval["value"]) or finite(interval["low"]) or 0.0
        plan = self.planned or {}
        gain = [finite(plan.get("reward", {}).get("value")), finite(plan.get("prior_reward"))]
        return (gain[0] or 0.0) - (gain[1] or 0.0)


def rows_of(run: Run) -> list[Row]:
    """The prompts, the farthest from their posterior last; at most `MOST`, the farthest."""
    planned = list(run.plan["per_prompt"])
    if run.certificate is None:
        rows = [Row(p["prompt"], None, p) for p in planned]
    else:
        certified = run.certificate["per_prompt"]
        names = {p["prompt"]: p for p in planned}
        # The plan leaves out prompts without draws; where it has them all, their order tells equal texts apart.
        partners = planned if len(planned) == len(certified) else [names.get(c["prompt"]) for c in certified]
        rows = [Row(c["prompt"], c, p) for c, p in zip(certified, partners, strict=True)]
    return sorted(rows, key=lambda row: row.distance)[-MOST:]


def prompts_figure(run: Run) -> go.Figure | None:
    """KL to the posterior of every prompt as an interval, beside its reward: prior, predicted, policy."""
    rows = rows_of(run)
    if not rows:
        return None
    both = run.certificate is not None
    figure = canvas(84 + 30 * len(rows), "")
    figure.update_layout(margin_r=16)
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[_label(row.prompt) for row in rows],
        range=[-0.7, len(rows) - 0.3],
        ticks="",
        ticklabelstandoff=8,
        gridcolor=LIGHT["grid"],
    )
    figure.update_yaxes(tickfont={"color": LIGHT["ink"], "size": 13})
    reward_axis = "x2" if both else "x"
    if both:
        grid = figure.to_dict()["layout"]["xaxis"]
        figure.update_layout(xaxis={"domain": [0, 0.56]}, xaxis2=grid | {"domain": [0.62, 1], "anchor": "y"})
        figure.update_layout(
            xaxis_title_text="KL to the posterior, nats", xaxis2_title_text="expected reward, reward units"
        )
        _add_intervals(figure, rows)
    else:
        figure.update_layout(xaxis_title_text="expected reward, reward units")
    _add_rewards(figure, run, rows, reward_axis)
    return figure


def _label(prompt: str) -> str:
    flat = " ".join(prompt.split())
    return escape(flat if len(flat) <= LABEL else flat[: LABEL - 1].rstrip() + "…", quote=False)


def _hover(prompt: str) -> str:
    """The prompt in lines that fit into a tooltip."""
    words, lines = " ".join(prompt.split())[:400].split(" "), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 60:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word[:60]}".strip()
    return "<br>".join(escape(line, quote=False) for line in lines)


def _add_intervals(figure: go.Figure, rows: Sequence[Row]) -> None:
    found = [(y, row, row.certified) for y, row in enumerate(rows) if row.certified is not None]
    closed = [(y, row, c) for y, row, c in found if finite(c["kl_posterior"]["high"]) is not None]
    open_ = [(y, row, c) for y, row, c in found if finite(c["kl_posterior"]["high"]) is None]
    edge = _edge([c for _, _, c in found])
    figure.update_layout(xaxis_range=[0, edge])
    for group, ends, dash in ((closed, "high", "solid"), (open_, "", "dot")):
        xs: list[float | None] = []
        ys: list[float | None] = []
        for y, _, c in group:
            interval = c["kl_posterior"]
            xs += [interval["low"], interval[ends] if ends else 0.97 * edge, None]
            ys += [y, y, None]
        line = {"color": LIGHT["policy"], "width": 4 if ends else 2, "dash": dash}
        figure.add_scatter(x=xs, y=ys, mode="lines", line=line, hoverinfo="skip", showlegend=False)
    _add_middles(figure, closed)
    if open_:
        figure.add_scatter(
            x=[0.97 * edge] * len(open_),
            y=[y for y, _, _ in open_],
            mode="markers",
            marker={"symbol": "triangle-right-open", "size": 11, "color": LIGHT["policy"], "line": {"width": 1.8}},
            name="no upper bound",
            **_tips(open_),
        )


def _edge(certified: Sequence[Json]) -> float:
    """The right end of the axis: beyond every finite end."""
    ends = [finite(c["kl_posterior"]["high"]) or 1.5 * (finite(c["kl_posterior"]["low"]) or 0.0) for c in certified]
    return 1.06 * max([*ends, 1e-2])


def _add_middles(figure: go.Figure, closed: Sequence[tuple[int, Row, Json]]) -> None:
    if closed:
        figure.add_scatter(
            x=[c["kl_posterior"]["value"] for _, _, c in closed],
            y=[y for y, _, _ in closed],
            mode="markers",
            marker={
                "symbol": "circle",
                "size": 8,
                "color": LIGHT["paper"],
                "line": {"color": LIGHT["policy"], "width": 2},
            },
            name="KL to the posterior, 95%",
            **_tips(closed),
        )


def _tips(found: Sequence[tuple[int, Row, Json]]) -> dict[str, Any]:
    rows = []
    for _, row, c in found:
        interval = c["kl_posterior"]
        numbers = [show_range(interval["low"], interval["high"]), show(c["ess"], 1), str(c["exact_samples"])]
        rows.append([_hover(row.prompt), *numbers])
    template = (
        "<b>%{customdata[0]}</b><br>KL to the posterior %{customdata[1]} nats<br>ESS %{customdata[2]}"
        "<br>exact samples %{customdata[3]}<extra></extra>"
    )
    return {"customdata": rows, "hovertemplate": template}


def _add_rewards(figure: go.Figure, run: Run, rows: Sequence[Row], axis: str) -> None:
    planned = [(y, row, row.planned) for y, row in enumerate(rows) if row.planned is not None]
    aim = predicted(run)
    # Without a chosen beta the plan's prompts stand at another temperature than the policy.
    fits = run.certificate is None or (
        aim is not None
        and run.plan["chosen"] is not None
        and math.isclose(run.plan["chosen"]["beta"], aim["beta"], rel_tol=0.01)
    )
    if fits:
        xs: list[float | None] = []
        ys: list[float | None] = []
        for y, _, p in planned:
            xs += [p["reward"]["low"], p["reward"]["high"], None]
            ys += [y, y, None]
        line = {"color": LIGHT["posterior_band"], "width": 9}
        figure.add_scatter(x=xs, y=ys, mode="lines", line=line, hoverinfo="skip", showlegend=False, xaxis=axis)
    marks: list[tuple[str, str, str, list[tuple[int, Row, Any]]]] = [
        ("prior", "circle", "prior", [(y, row, p["prior_reward"]) for y, row, p in planned])
    ]
    if fits:
        marks.append(("predicted", "line-ns", "posterior", [(y, row, p["reward"]["value"]) for y, row, p in planned]))
    certified = [(y, row, row.certified["reward"]) for y, row in enumerate(rows) if row.certified is not None]
    marks.append(("policy", "circle", "policy", certified))
    for name, symbol, colour, points in marks:
        if points:
            figure.add_scatter(
                x=[value for _, _, value in points],
                y=[y for y, _, _ in points],
                mode="markers",
                marker={
                    "symbol": symbol,
                    "size": 9,
                    "color": LIGHT[colour],
                    "line": {"color": LIGHT[colour], "width": 2},
                },
                name=name,
                xaxis=axis,
                customdata=[_hover(row.prompt) for _, row, _ in points],
                hovertemplate=f"<b>%{{customdata}}</b><br>{name}: reward %{{x:.3f}}<extra></extra>",
            )
