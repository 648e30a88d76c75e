"""Linear heads on fixed features: MAP by Newton's method, and how well a prior precision explains the data (float64).

The penalised loss of every head here is convex, sum_n loss_n(W phi_n) + 1/2 sum_i precision_i w_i^2, so that Newton's method finds
its minimum to machine precision, and the Hessian there is exact (for a generalised linear model in its natural link, it is also
the Fisher information). See Bishop 2006, sections 4.3-4.5; MacKay 1992 for the evidence.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

from tiltlm.errors import TiltWarning

BIAS_PRECISION = 0.01
"""Prior precision of a bias: N(0, 10^2), wide for features of unit variance."""
PRECISIONS = (1e-4, 1e7)
"""Where the evidence looks for a prior precision; for features of unit variance."""
STEPS = 100


class Loss(Protocol):
    """A convex negative log-likelihood of scores Z [N, O], O outputs a row, in nats."""

    @property
    def outputs(self) -> int: ...

    def value(self, scores: Float[Tensor, "N O"]) -> Tensor:
        """Its sum over rows."""
        ...

    def slope(self, scores: Float[Tensor, "N O"]) -> Float[Tensor, "N O"]: ...

    def curvature(self, scores: Float[Tensor, "N O"]) -> Float[Tensor, "N O O"]: ...

    def take(self, rows: Int[Tensor, " M"]) -> Loss:
        """The loss of some rows, which may repeat."""
        ...


@dataclass(frozen=True)
class Logistic:
    """-t log sigma(z - m) - (1 - t) log sigma(m - z): Bradley and Terry's model where z is a difference of rewards.

    Attributes:
        target: t, the probability of the first outcome; 1 - epsilon under label smoothing.
        margin: m, by how much the first has to win at least (Touvron et al. 2023, eq. 2).
    """

    target: Float[Tensor, " N"]
    margin: Float[Tensor, " N"]
    outputs = 1

    def value(self, scores: Float[Tensor, "N 1"]) -> Tensor:
        z = scores[:, 0] - self.margin
        return (torch.nn.functional.softplus(z) - self.target * z).sum()

    def slope(self, scores: Float[Tensor, "N 1"]) -> Float[Tensor, "N 1"]:
        return ((scores[:, 0] - self.margin).sigmoid() - self.target)[:, None]

    def curvature(self, scores: Float[Tensor, "N 1"]) -> Float[Tensor, "N 1 1"]:
        p = (scores[:, 0] - self.margin).sigmoid()
        return (p * (1 - p))[:, None, None]

    def take(self, rows: Int[Tensor, " M"]) -> Logistic:
        return Logistic(self.target[rows], self.margin[rows])


@dataclass(frozen=True)
class Categorical:
    """Cross-entropy of classes, with a row of weights for every class (the symmetric parametrisation)."""

    label: Int[Tensor, " N"]
    outputs: int
    smoothing: float = 0.0

    @property
    def _target(self) -> Float[Tensor, "N O"]:
        hot = torch.nn.functional.one_hot(self.label, self.outputs).double()
        return (1 - self.smoothing) * hot + self.smoothing / self.outputs

    def value(self, scores: Float[Tensor, "N O"]) -> Tensor:
        return -(self._target * scores.log_softmax(-1)).sum()

    def slope(self, scores: Float[Tensor, "N O"]) -> Float[Tensor, "N O"]:
        return scores.softmax(-1) - self._target

    def curvature(self, scores: Float[Tensor, "N O"]) -> Float[Tensor, "N O O"]:
        p = scores.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    def take(self, rows: Int[Tensor, " M"]) -> Categorical:
        return Categorical(self.label[rows], self.outputs, self.smoothing)


@dataclass(frozen=True)
class Gaussian:
    """-log N(t; z, noise), constants included, so that the evidence can compare noises.

    Attributes:
        noise: variance of the scores around their mean.
    """

    target: Float[Tensor, " N"]
    noise: float
    outputs = 1

    def value(self, scores: Float[Tensor, "N 1"]) -> Tensor:
        squares = (scores[:, 0] - self.target).square().sum()
        return squares / (2 * self.noise) + 0.5 * len(self.target) * math.log(2 * math.pi * self.noise)

    def slope(self, scores: Float[Tensor, "N 1"]) -> Float[Tensor, "N 1"]:
        return ((scores[:, 0] - self.target) / self.noise)[:, None]

    def curvature(self, scores: Float[Tensor, "N 1"]) -> Float[Tensor, "N 1 1"]:
        return torch.full((len(self.target), 1, 1), 1 / self.noise, dtype=torch.float64)

    def take(self, rows: Int[Tensor, " M"]) -> Gaussian:
        return Gaussian(self.target[rows], self.noise)


@dataclass(frozen=True)
class Mode:
    """The minimum of a penalised loss, and Laplace's approximation there.

    Attributes:
        weights: W_MAP, a row of weights for every output.
        factor: lower Cholesky factor of the Hessian over W.flatten().
        log_evidence: log of the data's marginal likelihood, by Laplace; exact for `Gaussian`.
        precision: of the prior N(0, 1 / precision), one a weight.
    """

    weights: Float[Tensor, "O F"]
    factor: Float[Tensor, "OF OF"]
    log_evidence: float
    precision: Float[Tensor, " F"]


def hessian(
    design: Float[Tensor, "N F"], loss: Loss, precision: Float[Tensor, " F"], weights: Float[Tensor, "O F"]
) -> Float[Tensor, "OF OF"]:
    """Exact second derivative of the penalised loss over W.flatten()."""
    outputs, width = weights.shape
    curvature = loss.curvature(design @ weights.T)
    blocks = design.new_zeros(outputs, width, outputs, width)
    for a in range(outputs):
        for b in range(a + 1):
            block = design.T @ (curvature[:, a, b, None] * design)
            blocks[a, :, b], blocks[b, :, a] = block, block.T
    return blocks.view(outputs * width, outputs * width) + torch.diag(precision.repeat(outputs))


def mode(
    design: Float[Tensor, "N F"],
    loss: Loss,
    precision: Float[Tensor, " F"],
    start: Float[Tensor, "O F"] | None = None,
) -> Mode:
    """W_MAP by Newton's method with backtracking.

    Args:
        precision: of the prior, one a weight, positive: it is what makes the minimum unique.
        start: a guess; zero by default.
    """
    weights = design.new_zeros(loss.outputs, design.shape[1]) if start is None else start

    def penalised(at: Tensor) -> Tensor:
        return loss.value(design @ at.T) + 0.5 * (precision * at.square()).sum()

    value = penalised(weights)
    for _ in range(STEPS):
        gradient = loss.slope(design @ weights.T).T @ design + precision * weights
        factor = torch.linalg.cholesky(hessian(design, loss, precision, weights))
        step = torch.cholesky_solve(gradient.reshape(-1, 1), factor).view_as(weights)
        decrement = float((gradient * step).sum())
        if decrement < 1e-18 * (1 + abs(float(value))):
            break
        size = 1.0
        while float(candidate := penalised(weights - size * step)) > float(value) - 1e-4 * size * decrement:
            size /= 2
            if size < 1e-8:  # the loss no longer resolves the step: this is the minimum
                break
        if size < 1e-8:
            break
        weights, value = weights - size * step, candidate
    factor = torch.linalg.cholesky(hessian(design, loss, precision, weights))
    log_evidence = 0.5 * loss.outputs * precision.log().sum() - factor.diagonal().log().sum() - penalised(weights)
    return Mode(weights, factor, float(log_evidence), precision)


def best_mode(design: Float[Tensor, "N F"], loss: Loss, *, bias: bool) -> Mode:
    """The mode at the prior precision with the largest marginal likelihood; a bias keeps `BIAS_PRECISION`.

    Warns:
        TiltWarning: if the data say nothing: the evidence grows up to the largest precision that is looked at.
    """
    low, high = (math.log(end) for end in PRECISIONS)
    latest: list[Mode] = []

    def at(log_precision: float) -> Mode:
        start = latest[-1].weights if latest else None
        latest.append(mode(design, loss, spread(math.exp(log_precision), design.shape[1], bias=bias), start))
        return latest[-1]

    found = minimize_scalar(
        lambda log_precision: -at(log_precision).log_evidence,
        bounds=(low, high),
        method="bounded",
        options={"xatol": 0.02},
    )
    if found.x > high - 1:
        warnings.warn(
            f"the evidence prefers ever larger prior precisions (up to {PRECISIONS[1]:g}): the {len(design)} rows say nothing about "
            f"the reward that these features can express; give more rows, other features, or precision=",
            TiltWarning,
            stacklevel=3,
        )
    return at(float(found.x))


def spread(precision: float, width: int, *, bias: bool) -> Float[Tensor, " F"]:
    """The same precision for every weight, the bias (the last) apart."""
    values = torch.full((width,), precision, dtype=torch.float64)
    if bias:
        values[-1] = BIAS_PRECISION
    return values


def best_noise(
    design: Float[Tensor, "N F"], target: Float[Tensor, " N"], precision: float | None, *, bias: bool
) -> float:
    """The noise variance with the largest evidence, by MacKay's fixed point: SSE / (N - effective parameters).

    Args:
        precision: of the prior; None takes the best for every noise on the way.
    """
    noise = float(target.var(correction=0)) / 2 or 1.0
    for _ in range(STEPS):
        loss = Gaussian(target, noise)
        found = (
            best_mode(design, loss, bias=bias)
            if precision is None
            else mode(design, loss, spread(precision, design.shape[1], bias=bias))
        )
        residual = loss.target - design @ found.weights[0]
        prior_share = (torch.cholesky_inverse(found.factor).diagonal() * found.precision).sum()
        effective = design.shape[1] - float(prior_share)
        new = max(float(residual.square().sum()) / max(len(target) - effective, 1.0), 1e-12)
        if abs(math.log(new / noise)) < 1e-3:
            return new
        noise = new
    return noise
