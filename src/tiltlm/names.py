"""Names that recipes use, made from the names of classes."""

from __future__ import annotations

import re


def name_of(kind: type) -> str:
    """VarGrad is var-grad, BestOfN is best-of-n, SoftSARSA is soft-sarsa, RLOO is rloo, TokenF1 is token-f1."""
    parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+\d*|[A-Z]+\d*", kind.__name__)
    return "-".join(parts).lower()


def summary_of(kind: type) -> str:
    """The first paragraph of a class's docstring, as one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())
