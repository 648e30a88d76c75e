"""`compare.html`: a comparison as one picture and one table, in a file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from tiltlm.errors import InputError
from tiltlm.report.canvas import canvas
from tiltlm.report.folder import Json, finite
from tiltlm.report.html import embed, page
from tiltlm.report.palette import LIGHT
from tiltlm.report.words import show

ROW = 34
"""Pixels of a contender in the picture."""


def write_comparison(comparisons: Sequence[Json], path: Path) -> Path:
    """Write the page.

    Raises:
        InputError: if the file cannot be written.
    """
    rows = [(c, embed(distance_figure(c)), _rows(c)) for c in comparisons]
    text = page("comparison.html.j2", comparisons=rows)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); check its permissions") from error
    return path


def distance_figure(comparison: Json) -> go.Figure:
    """KL(q || p*) of each contender as a dot with its interval; the nearest to the posterior on top.

    Which is nearer the ELBOs say: each interval has a bound of log Z of its own.
    """
    middles = [(_middle(r), r) for r in comparison["results"]]
    known = [(m, r) for m, r in middles if m is not None]
    log_z = max((value + m for m, r in known if (value := _elbo(r)) is not None), default=0.0)
    known.sort(key=lambda pair: pair[0] if (value := _elbo(pair[1])) is None else log_z - value, reverse=True)
    figure = canvas(90 + ROW * len(known), "KL(q‖p*), nats: distance from the posterior")
    for value, result in known:
        interval = result["to_posterior"]
        low, high = finite(interval["low"]) or 0.0, finite(interval["high"])
        bound = finite(interval["value"]) is None
        colour = LIGHT["posterior"] if result["steps"] == 0 else LIGHT["policy"]
        figure.add_scatter(
            x=[value],
            y=[result["name"]],
            mode="markers",
            marker={"color": colour, "size": 11, "symbol": _symbol(bound, high)},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [(high - value) if high is not None else 0.0],
                "arrayminus": [value - low],
                "color": colour,
                "thickness": 2,
                "width": 0,
            },
            hovertemplate=f"{result['name']}: {_interval(interval)}<br>E r {show(result['reward']['value'])}<extra></extra>",
        )
    right = max([finite(r["to_posterior"]["high"]) or value for value, r in known], default=1.0) or 1.0
    figure.update_xaxes(range=[-0.02 * right, 1.06 * right])
    return figure


def _symbol(bound: bool, high: float | None) -> str:
    """A dot; a stroke for an upper bound; a triangle to the right where nothing bounds it from above."""
    if bound:
        return "line-ns-open"
    return "circle" if high is not None else "triangle-right"


def _middle(result: Json) -> float | None:
    interval = result["to_posterior"]
    if interval is None:
        return None
    value = finite(interval["value"])
    return value if value is not None else finite(interval["high"])


def _elbo(result: Json) -> float | None:
    """None where there is none, or where it is minus infinity."""
    return finite(result["elbo"]["value"]) if result.get("elbo") else None


def _interval(interval: Json | None) -> str:
    if interval is None:
        return "–"
    low, high, value = (finite(interval[name]) for name in ("low", "high", "value"))
    if value is None:
        return f"≤ {show(high)}"
    if low == high:
        return show(value)
    return f"{show(value)} [{show(low)}, {show(high) if high is not None else '∞'}]"


def _rows(comparison: Json) -> list[tuple[str, ...]]:
    """The table: its head, then a row a contender; with gold where a reward was held out."""
    judged = any(r.get("gold") for r in comparison["results"])
    gold_head = ("E gold",) if judged else ()
    rows: list[tuple[str, ...]] = [
        ("", "E r", *gold_head, "KL(q‖pi0)", "ELBO", "KL(q‖p*)", "KL(p*‖q)", "unique", "samples", "seconds")
    ]
    for r in comparison["results"]:
        kl = r["kl_prior"]["value"] if r["kl_prior"] else None
        unique = r["diversity"]["unique"] if r["diversity"] else math.nan
        gold = (_gold(r.get("gold")),) if judged else ()
        cells = (
            show(r["reward"]["value"]),
            *gold,
            show(kl),
            show(_elbo(r)),
            _interval(r["to_posterior"]),
            _interval(r["from_posterior"]),
        )
        share = "–" if math.isnan(unique) else f"{unique:.0%}"
        name = r["name"] if r["served"] == 1 else f"{r['name']} ({r['served']:.0%} of the prompts)"
        rows.append((name, *cells, share, f"{r['samples']:,}", f"{r['seconds']:.1f}"))
    return rows


def _gold(estimate: Json | None) -> str:
    """The mean of the held-out reward and its standard error."""
    return "–" if estimate is None else f"{show(estimate['value'])} ± {show(finite(estimate['stderr']))}"
