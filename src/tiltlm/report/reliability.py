"""`calibration.html`: how often a reward model is right when it says how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from tiltlm.errors import InputError
from tiltlm.report.canvas import canvas
from tiltlm.report.folder import Json
from tiltlm.report.html import embed, page
from tiltlm.report.legend import legend
from tiltlm.report.palette import LIGHT
from tiltlm.reward_models.calibration import BINS

WITH, WITHOUT = "with its uncertainty", "by its mean alone"
TONES = {WITH: ("posterior", "circle"), WITHOUT: ("policy", "diamond")}


def write_calibration(checks: Sequence[tuple[Json, Json]], path: Path) -> Path:
    """Write the page.

    Args:
        checks: for each set of rows its calibration with the uncertainty, and by the means alone, as `Calibration.as_dict`.

    Raises:
        InputError: if the file cannot be written.
    """
    sections = []
    for pair in checks:
        figure = reliability_figure(*pair)
        sections.append((pair[0], embed(figure), legend(figure), [_row(WITH, pair[0]), _row(WITHOUT, pair[1])]))
    text = page("calibration.html.j2", sections=sections, bins=BINS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); check its permissions") from error
    return path


def reliability_figure(bayesian: Json, plain: Json) -> go.Figure:
    """The share that was right against the confidence, bin by bin, with one standard error; on the diagonal it is calibrated."""
    low = min([some["confidence"] for check in (bayesian, plain) for some in check["bins"]], default=0.5) - 0.03
    figure = canvas(420, "confidence: the probability that was given", "share that was right")
    figure.add_scatter(
        x=[low, 1],
        y=[low, 1],
        mode="lines",
        line={"color": LIGHT["prior"], "width": 2, "dash": "dot"},
        name="calibrated",
        hoverinfo="skip",
        legendrank=1,
    )
    for rank, (name, check) in enumerate(((WITHOUT, plain), (WITH, bayesian)), 2):
        tone, symbol = TONES[name]
        bins = check["bins"]
        figure.add_scatter(
            x=[some["confidence"] for some in bins],
            y=[some["accuracy"] for some in bins],
            mode="markers",
            marker={
                "color": LIGHT[tone],
                "symbol": symbol,
                "size": [_size(some["count"], check["nll"]["n"]) for some in bins],
            },
            error_y={
                "type": "data",
                "array": [(some["accuracy"] * (1 - some["accuracy"]) / some["count"]) ** 0.5 for some in bins],
                "color": LIGHT[tone],
                "thickness": 1.5,
                "width": 0,
            },
            customdata=[some["count"] for some in bins],
            hovertemplate=name + "<br>said %{x:.2f}, right %{y:.2f}<br>%{customdata} rows<extra></extra>",
            name=name,
            legendrank=rank,
        )
    figure.update_xaxes(range=[low, 1.01])
    return figure


def _size(count: int, total: int) -> float:
    """A dot's area grows with its share of the rows."""
    return 6 + 22 * (count / total) ** 0.5


def _row(name: str, check: Json) -> tuple[str, ...]:
    cells = (f"{check[key]['value']:.3f} ± {check[key]['stderr']:.3f}" for key in ("nll", "accuracy", "ece"))
    return (name, *cells)
