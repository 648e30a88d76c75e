"""Whether a reward model's probabilities are right: likelihood, accuracy, calibration error, reliability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.estimates import Estimate
from tiltlm.reward_models.data import Task, task_of
from tiltlm.reward_models.model import Head, RewardModel
from tiltlm.reward_models.posterior import Ensemble, LinearPosterior, SoftmaxPosterior
from tiltlm.seeds import generator

BINS = 15
"""Bins of equal width over [0, 1], as in Guo et al. (2017)."""
RESAMPLES = 200


@dataclass(frozen=True)
class Bin:
    """Predictions whose confidence falls into one bin.

    Attributes:
        confidence: their mean; `accuracy` the share that was right, `count` how many.
    """

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """How good predicted probabilities of outcomes are; lower is better but for accuracy.

    Attributes:
        nll: mean of -log P(what was the case), in nats.
        accuracy: share of rows whose most probable outcome was the case; a tie counts one half.
        ece: expected calibration error, sum over bins of their share times |accuracy - confidence|. The confidence is the
            probability of the most probable outcome; `BINS` bins of equal width over [0, 1]; its error is a bootstrap's. It is
            never negative, and for a calibrated model of the order of 1 / sqrt(n).
        bins: those that are not empty.
        name: of the rows, such as "held out" or "shifted".
    """

    nll: Estimate
    accuracy: Estimate
    ece: Estimate
    bins: tuple[Bin, ...]
    name: str = ""

    def __str__(self) -> str:
        label = f"{self.name}: " if self.name else ""
        return f"{label}NLL {self.nll}, accuracy {self.accuracy}, ECE {self.ece} ({self.nll.n} rows)"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        numbers = {key: getattr(self, key).as_dict() for key in ("nll", "accuracy", "ece")}
        return {"name": self.name, **numbers, "bins": [vars(some) for some in self.bins]}


def calibration(
    outcome: Float[Tensor, " N"],
    confidence: Float[Tensor, " N"],
    right: Float[Tensor, " N"],
    *,
    name: str = "",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Calibration:
    """From probabilities that were predicted.

    Args:
        outcome: probability that was given to what was the case.
        confidence: probability of the most probable outcome.
        right: 1 where that was the case, 0 where not, 1/2 for a tie.
        seed: of the bootstrap that gives the calibration error's own error.
        resamples: of it; with fewer than 2 that error is NaN.
    """
    count = len(outcome)
    if not count:
        raise InputError("there are no rows to check against; give at least one")
    loss = -outcome.double().clamp(min=1e-300).log()
    rng = generator(seed, "calibration")
    again = [torch.randint(count, (count,), generator=rng) for _ in range(resamples)]
    errors = torch.tensor([_ece(_bins(confidence[rows], right[rows])) for rows in again], dtype=torch.float64)
    bins = _bins(confidence, right)
    return Calibration(
        _mean(loss),
        _mean(right.double()),
        Estimate(_ece(bins), float(errors.std()) if resamples > 1 else math.nan, count),
        bins,
        name,
    )


def check_reward_model(
    model: RewardModel,
    data: Sequence[Mapping[str, Any]] | Task,
    *,
    task: str | None = None,
    plain: bool = False,
    name: str = "",
    features: Tensor | None = None,
) -> Calibration:
    """How well a model predicts judgements that it has not seen: comparisons, or labels.

    Args:
        data: rows for `task_of`.
        task: whose head; the first by default.
        plain: ignore the uncertainty, and predict by the means alone.
        features: of the task's answers, if they are there already.

    Raises:
        InputError: if the rows are of another kind than the head, or scores, which have no probabilities here.
    """
    head = model.head(task)
    if head.kind == "regression":
        raise InputError(
            "the head predicts scores, and calibration is about outcomes; check one learned from comparisons or labels"
        )
    rows = data if isinstance(data, Task) else task_of(data, head.kind, classes=head.classes)
    if rows.kind != head.kind:
        raise InputError(
            f"the rows are for {rows.kind}, and the head was learned by {head.kind}; give rows of that kind"
        )
    features = model.features_of(rows.answers) if features is None else features
    outcome, confidence, right = predictions(head, rows, features, plain=plain)
    return calibration(outcome, confidence, right, name=name)


def predictions(
    head: Head, rows: Task, features: Tensor, *, plain: bool = False
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Each row's probability of what was the case, of the most probable outcome, and whether that was the case."""
    if len(head.classes) > 2:
        shares = _class_shares(head, features[..., rows.rows[:, 0], :], plain=plain)
        label = rows.target.long()
        top, guess = shares.max(-1)
        return shares[torch.arange(len(label)), label], top, (guess == label).double()
    posterior = head.posterior()
    if head.kind == "preference":
        first, second = (features[..., rows.rows[:, side], :] for side in (0, 1))
        yes, was = _compared(posterior, first, second, plain=plain), torch.ones(len(rows), dtype=torch.float64)
    else:
        yes, was = _probability(posterior, features[..., rows.rows[:, 0], :], plain=plain), rows.target
    outcome = torch.where(was > 0.5, yes, 1 - yes)
    right = torch.where(outcome == 0.5, 0.5, (outcome > 0.5).double())
    return outcome, torch.maximum(yes, 1 - yes), right


def _compared(posterior: LinearPosterior | Ensemble, first: Tensor, second: Tensor, *, plain: bool) -> Tensor:
    if plain:
        return (posterior.mean(first) - posterior.mean(second)).sigmoid()
    return posterior.preference(first, second)


def _probability(posterior: LinearPosterior | Ensemble, features: Tensor, *, plain: bool) -> Tensor:
    """P(the last class): a logit with a bias, against nothing."""
    return posterior.mean(features).sigmoid() if plain else posterior.probability(features)


def _class_shares(head: Head, features: Tensor, *, plain: bool) -> Float[Tensor, "N C"]:
    views = [features] * len(head.parts) if features.ndim == 2 else list(features)
    found = []
    for part, view in zip(head.parts, views, strict=True):
        assert isinstance(part, SoftmaxPosterior)
        if plain or (len(head.parts) > 1 and not head.within):
            found.append((part.scaling(view) @ part.weights.T).softmax(-1))
        else:
            found.append(part.probabilities(view, generator(0, "class shares")))
    return torch.stack(found).mean(0)


def _mean(values: Float[Tensor, " N"]) -> Estimate:
    count = len(values)
    stderr = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(values.mean()), stderr, count)


def _bins(confidence: Float[Tensor, " N"], right: Float[Tensor, " N"]) -> tuple[Bin, ...]:
    place = (confidence.double() * BINS).long().clamp(max=BINS - 1)
    found = []
    for number in place.unique().tolist():
        inside: Bool[Tensor, " N"] = place == number
        mean, share = float(confidence[inside].double().mean()), float(right[inside].double().mean())
        found.append(Bin(number / BINS, (number + 1) / BINS, mean, share, int(inside.sum())))
    return tuple(found)


def _ece(bins: Sequence[Bin]) -> float:
    total = sum(some.count for some in bins)
    return sum(some.count / total * abs(some.accuracy - some.confidence) for some in bins)
