"""Minimum Bayes risk: the candidate that agrees best with all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evaluation.systems import System

Utility = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(hypotheses, references) -> the worth of each hypothesis if its reference were the truth."""


def agreement(part: Any) -> Utility:
    """The utility that a part measures which compares with a reference: `agreement(CHRF())`, `RougeL()`, `TokenF1()`."""
    if not hasattr(part, "references"):
        raise InputError(
            f"utility {getattr(part, 'label', part)!r} compares with no reference; take CHRF, RougeL, BLEU or TokenF1"
        )
    return lambda hypotheses, references: part(list(hypotheses), **{part.column: list(references)})


def expected_utilities(
    candidates: Sequence[str], utility: Utility, weights: Sequence[float] | None = None
) -> dict[str, float]:
    """Σ_y p(y) u(h, y) of each different candidate h, under the law that the candidates and weights are a sample of.

    Equal texts are one candidate, with their weights added; every pair of different texts is compared once.

    Raises:
        InputError: if there is no candidate, or no positive weight.
    """
    given = [1.0] * len(candidates) if weights is None else list(weights)
    if len(given) != len(candidates) or not candidates or min(given, default=0) < 0 or not sum(given) > 0:
        raise InputError(
            f"there are {len(candidates)} candidates and {len(given)} weights; give each a weight, none negative, not all 0"
        )
    mass: dict[str, float] = {}
    for text, weight in zip(candidates, given, strict=True):
        mass[text] = mass.get(text, 0.0) + weight
    texts = list(mass)
    pairs = [(h, y) for h in texts for y in texts]
    worth: Float[Tensor, "H Y"] = torch.tensor(
        list(utility([h for h, _ in pairs], [y for _, y in pairs])), dtype=torch.float64
    ).view(len(texts), -1)
    law = torch.tensor([mass[y] for y in texts], dtype=torch.float64)
    return dict(zip(texts, (worth @ (law / law.sum())).tolist(), strict=True))


def minimum_bayes_risk(candidates: Sequence[str], utility: Utility, weights: Sequence[float] | None = None) -> str:
    """argmax_h Σ_y p(y) u(h, y) (Kumar & Byrne 2004), over samples as candidates and as references (Eikema & Aziz 2020).

    Weighted draws (of importance sampling, SMC) give their weights, so that p is the posterior. Of equally good ones the first.
    """
    worth = expected_utilities(candidates, utility, weights)
    return max(worth, key=lambda text: worth[text])


def mbr_system(system: System, utility: Utility, name: str | None = None) -> System:
    """The system that answers each prompt with the minimum-Bayes-risk choice among another system's completions."""
    runs = tuple(tuple((minimum_bayes_risk(texts, utility),) for texts in run) for run in system.runs)
    return System(f"{system.name}+mbr" if name is None else name, runs, seconds=system.seconds)
