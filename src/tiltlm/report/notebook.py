"""The report's picture of what is in memory rather than in a run's folder, for notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import plotly.graph_objects as go

from tiltlm.report.folder import Run
from tiltlm.report.frontier import frontier_figure


class Facts(Protocol):
    """A plan or a certificate."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        ...


def picture(plan: Facts, certificate: Facts | None = None) -> go.Figure:
    """The predicted frontier, and where a certified policy is on it.

    Args:
        plan: of `tl.plan`.
        certificate: of `tl.certify`, at the plan's beta.
    """
    known = None if certificate is None else certificate.as_dict()
    figure = frontier_figure(Run(Path(), {}, plan.as_dict(), certificate=known))
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.18})
