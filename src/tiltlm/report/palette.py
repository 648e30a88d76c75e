"""Four colours with one meaning each, in light and in dark.

Grey is the prior, blue is the posterior (and what the plan predicts of it), orange is the policy, and green is what was held
out. A figure is built in
the light colours; the report's script swaps each for its dark counterpart, so every light colour must be a different string.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#fdfdfc",
    "ink": "#1d2329",
    "muted": "#66707a",
    "rule": "#d5d9dd",
    "grid": "#ebedef",
    "prior": "#86909a",
    "posterior": "#2a66a5",
    "policy": "#d65f1e",
    "posterior_band": "rgba(42, 102, 165, 0.13)",
    "posterior_far": "rgba(42, 102, 165, 0.05)",
    "policy_faint": "rgba(214, 95, 30, 0.28)",
    "policy_soft": "rgba(214, 95, 30, 0.65)",
    "gold": "#1c7c62",
    "gold_faint": "rgba(28, 124, 98, 0.28)",
    "gold_soft": "rgba(28, 124, 98, 0.65)",
    "gold_band": "rgba(28, 124, 98, 0.12)",
    "veil": "rgba(253, 253, 252, 0.85)",
}
DARK = {
    "paper": "#15181b",
    "ink": "#e4e7ea",
    "muted": "#98a2ac",
    "rule": "#3a4148",
    "grid": "#24292e",
    "prior": "#8f9aa5",
    "posterior": "#7db3ea",
    "policy": "#f58f52",
    "posterior_band": "rgba(125, 179, 234, 0.18)",
    "posterior_far": "rgba(125, 179, 234, 0.07)",
    "policy_faint": "rgba(245, 143, 82, 0.32)",
    "policy_soft": "rgba(245, 143, 82, 0.70)",
    "gold": "#5cc3a2",
    "gold_faint": "rgba(92, 195, 162, 0.32)",
    "gold_soft": "rgba(92, 195, 162, 0.70)",
    "gold_band": "rgba(92, 195, 162, 0.16)",
    "veil": "rgba(21, 24, 27, 0.85)",
}
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def to_dark() -> dict[str, str]:
    """From each light colour to its dark counterpart."""
    return {LIGHT[name]: DARK[name] for name in LIGHT}
