"""What is believed of a reward that is linear in features: a Gaussian over its weights, or an ensemble of such beliefs.

The reward r(x) = w . phi(x) of w ~ N(m, S) is jointly Gaussian over completions: mean phi m, covariance phi S phi'. The covariances
between completions matter: a preference depends on r(a) - r(b), whose variance is var r(a) + var r(b) - 2 cov(r(a), r(b)), and two
completions of one prompt share most of what is uncertain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.reward_models.glm import Loss, Mode, best_mode, mode, spread


class RewardPosterior(Protocol):
    """A belief about a reward, as a function of features; [B, D], or [M, B, D] where each of M parts has its own."""

    def mean(self, features: Tensor) -> Float[Tensor, " B"]:
        """E r(x)."""
        ...

    def covariance(self, features: Tensor) -> Float[Tensor, "B B"]:
        """Cov(r(x), r(x'))."""
        ...

    def members(self, features: Tensor, k: int, rng: Generator) -> Float[Tensor, "K B"]:
        """k rewards drawn from the belief, each judging all B completions. The same rng state gives the same rewards."""
        ...

    def preference(self, first: Tensor, second: Tensor) -> Float[Tensor, " B"]:
        """P(first is preferred to second), row by row, the uncertainty of the difference averaged over."""
        ...


def preference_probability(difference: Float[Tensor, " B"], variance: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """E sigma(d) for d ~ N(difference, variance), approximately: sigma(difference / sqrt(1 + pi variance / 8)) (MacKay 1992, eq. 10).

    Args:
        variance: of the difference of the two rewards; not the sum of their variances, which forgets what they share.
    """
    return (difference / (1 + math.pi / 8 * variance).sqrt()).sigmoid()


@dataclass(frozen=True)
class Standardiser:
    """Features of zero mean and unit variance over the training set, and a constant for the bias after them.

    Attributes:
        centre, scale: of every feature.
        bias: whether a column of ones is added. Bradley and Terry's model has none: no comparison tells of it.
    """

    centre: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    bias: bool

    @classmethod
    def of(cls, features: Float[Tensor, "N D"], *, bias: bool) -> Standardiser:
        """From training features; a feature that never changes is left as it is, about zero."""
        features = features.double()
        scale = features.std(0, correction=0)
        return cls(features.mean(0), torch.where(scale > 1e-9 * (1 + features.abs().amax(0)), scale, 1.0), bias)

    @classmethod
    def identity(cls, width: int, *, bias: bool = False) -> Standardiser:
        """Features as they are."""
        return cls(torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64), bias)

    def __call__(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        if features.shape[-1] != len(self.centre):
            raise InputError(
                f"features have {features.shape[-1]} columns, and this head was learned on {len(self.centre)}; give features of the "
                f"trunk that it was learned with"
            )
        scaled = (features.double() - self.centre) / self.scale
        return torch.cat([scaled, torch.ones_like(scaled[..., :1])], -1) if self.bias else scaled


@dataclass(frozen=True)
class LinearPosterior:
    """w ~ N(weights, root root') over standardised features: Laplace's approximation, or exact for a Gaussian likelihood.

    Attributes:
        root: a square root of the covariance.
        precision: of the prior, as it was given or as the evidence chose it.
    """

    weights: Float[Tensor, " F"]
    root: Float[Tensor, "F F"]
    scaling: Standardiser
    precision: float = math.nan

    def mean(self, features: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        return self.scaling(features) @ self.weights

    def variance(self, features: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """The diagonal of `covariance`."""
        return (self.scaling(features) @ self.root).square().sum(-1)

    def covariance(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B B"]:
        spans = self.scaling(features) @ self.root
        return spans @ spans.T

    def draw(self, k: int, rng: Generator) -> Float[Tensor, "K F"]:
        """k weights from the posterior."""
        noise = torch.randn(k, len(self.weights), generator=rng, dtype=torch.float64)
        return self.weights + noise @ self.root.T

    def members(self, features: Float[Tensor, "B D"], k: int, rng: Generator) -> Float[Tensor, "K B"]:
        return self.draw(_positive(k), rng) @ self.scaling(features).T

    def difference(self, first: Tensor, second: Tensor) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Mean and variance of r(first) - r(second), row by row."""
        change = self.scaling(first) - self.scaling(second)
        return change @ self.weights, (change @ self.root).square().sum(-1)

    def preference(self, first: Tensor, second: Tensor) -> Float[Tensor, " B"]:
        return preference_probability(*self.difference(first, second))

    def probability(self, features: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """E sigma(r), for a logit."""
        return preference_probability(self.mean(features), self.variance(features))


@dataclass(frozen=True)
class SoftmaxPosterior:
    """W.flatten() ~ N(weights.flatten(), root root'): a classifier of three or more classes."""

    weights: Float[Tensor, "C F"]
    root: Float[Tensor, "CF CF"]
    scaling: Standardiser
    precision: float = math.nan

    def reward(self, label: int) -> LinearPosterior:
        """The logit of a class minus the mean logit of the others: linear in the weights, so Gaussian as they are."""
        classes, width = self.weights.shape
        contrast = torch.full((classes,), -1 / (classes - 1), dtype=torch.float64)
        contrast[label] = 1.0
        spans = torch.einsum("c,cfk->fk", contrast, self.root.view(classes, width, -1))
        values, vectors = torch.linalg.eigh(spans @ spans.T)
        return LinearPosterior(
            contrast @ self.weights, vectors * values.clamp(min=0).sqrt(), self.scaling, self.precision
        )

    def probabilities(self, features: Float[Tensor, "B D"], rng: Generator, draws: int = 256) -> Float[Tensor, "B C"]:
        """E softmax(W phi), by draws of W; of the order of 1 / sqrt(draws) off."""
        design, (classes, width) = self.scaling(features), self.weights.shape
        total = design.new_zeros(len(design), classes)
        for _ in range(draws):
            noise = self.root @ torch.randn(classes * width, generator=rng, dtype=torch.float64)
            total += (design @ (self.weights + noise.view(classes, width)).T).softmax(-1)
        return total / draws


@dataclass(frozen=True)
class Ensemble:
    """Several beliefs, equally likely: heads on bootstrapped data, or heads on adapters of their own.

    Attributes:
        parts: one a member.
        within: also draw from each part's own posterior; without it a member is its part's mean (the usual deep ensemble).
    """

    parts: tuple[LinearPosterior, ...]
    within: bool = False

    def mean(self, features: Tensor) -> Float[Tensor, " B"]:
        return self._means(features).mean(0)

    def covariance(self, features: Tensor) -> Float[Tensor, "B B"]:
        """Of the members' means, and with `within` the mean of their covariances on top (the law of total covariance)."""
        centred = self._means(features) - self.mean(features)
        between = centred.T @ centred / len(self.parts)
        if not self.within:
            return between
        pairs = zip(self.parts, self._views(features), strict=True)
        return between + torch.stack([part.covariance(view) for part, view in pairs]).mean(0)

    def members(self, features: Tensor, k: int, rng: Generator) -> Float[Tensor, "K B"]:
        """k members, in random order, none a second time before all have had their turn."""
        order = torch.cat(
            [torch.randperm(len(self.parts), generator=rng) for _ in range(-(-_positive(k) // len(self.parts)))]
        )
        views = self._views(features)
        if not self.within:
            return self._means(features)[order[:k]]
        return torch.cat([self.parts[m].members(views[m], 1, rng) for m in order[:k].tolist()])

    def preference(self, first: Tensor, second: Tensor) -> Float[Tensor, " B"]:
        """The mean of the members' probabilities."""
        views = zip(self.parts, self._views(first), self._views(second), strict=True)
        if self.within:
            return torch.stack([part.preference(a, b) for part, a, b in views]).mean(0)
        return torch.stack([part.difference(a, b)[0].sigmoid() for part, a, b in views]).mean(0)

    def probability(self, features: Tensor) -> Float[Tensor, " B"]:
        """E sigma(r), for a logit: the mean of the members' probabilities."""
        if not self.within:
            return self._means(features).sigmoid().mean(0)
        pairs = zip(self.parts, self._views(features), strict=True)
        return torch.stack([part.probability(view) for part, view in pairs]).mean(0)

    def _views(self, features: Tensor) -> list[Tensor]:
        return [features] * len(self.parts) if features.ndim == 2 else list(features)

    def _means(self, features: Tensor) -> Float[Tensor, "M B"]:
        pairs = zip(self.parts, self._views(features), strict=True)
        return torch.stack([part.mean(view) for part, view in pairs])


def laplace(
    features: Float[Tensor, "N D"],
    loss: Loss,
    *,
    other: Float[Tensor, "N D"] | None = None,
    precision: float | None = None,
    bias: bool = False,
    scaling: Standardiser | None = None,
) -> LinearPosterior | SoftmaxPosterior:
    """Laplace's approximation of a linear head's posterior, at its MAP.

    Args:
        features: of every row; of the preferred completion, where rows are comparisons.
        other: of the completion it was preferred to; the head then sees the difference.
        precision: of the prior on weights of standardised features; None takes the one with the largest marginal likelihood.
        bias: learn a bias as well.
        scaling: of the features; from these features by default.

    Raises:
        InputError: if the precision is not positive or the features are not finite.
    """
    if precision is not None and not 0 < precision < math.inf:
        raise InputError(
            f"precision is {precision}; it is a prior's 1 / variance and must be a positive number, or None"
        )
    everything = features if other is None else torch.cat([features, other])
    if not torch.isfinite(everything).all():
        raise InputError(
            "features hold NaN or infinite numbers; load the model with dtype=float32, or leave such rows out"
        )
    scaling = scaling or Standardiser.of(everything, bias=bias)
    design = scaling(features) if other is None else scaling(features) - scaling(other)
    found = (
        best_mode(design, loss, bias=bias)
        if precision is None
        else mode(design, loss, spread(precision, design.shape[1], bias=bias))
    )
    root = _inverse_root(found)
    chosen = float(found.precision[0])
    if loss.outputs == 1:
        return LinearPosterior(found.weights[0], root, scaling, chosen)
    return SoftmaxPosterior(found.weights, root, scaling, chosen)


def _inverse_root(found: Mode) -> Float[Tensor, "P P"]:
    """A root of H^-1 from the Cholesky factor of H: L^-T."""
    eye = torch.eye(len(found.factor), dtype=torch.float64)
    return torch.linalg.solve_triangular(found.factor.T, eye, upper=True)


def _positive(k: int) -> int:
    if k < 1:
        raise InputError(f"k is {k}; ask for at least 1 member")
    return k


def bootstrap_rows(count: int, rng: Generator) -> Int[Tensor, " N"]:
    """As many rows as there are, drawn with replacement."""
    return torch.randint(count, (count,), generator=rng)
