"""The convex problem behind a moment target, on weighted draws, and Newton's method for it.

Minimise mean_c A_c(lambda) - lambda . mu over lambda, A_c(lambda) = log E_{a(.|c)} exp(lambda . phi): its gradient is the
difference between the moments at lambda and mu, its Hessian the mean over prompts of the covariance of phi.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiltlm.weights import ess, group_logsumexp, normalise

STEPS = 100
EXACT = 1e-13
"""Gradient, in standard deviations of the features, at which there is nothing left to gain in float64."""
SOLVED = 1e-9
"""... and at which lambda counts as found."""
SHORTEST = 2.0**-20
"""A step that must be shorter than this share of Newton's is no step."""


@dataclass(frozen=True)
class State:
    """The dual at one lambda.

    Attributes:
        mean: moments, mean over prompts.
        hessian: mean over prompts of the covariance of the features.
        spread: of the moments' influence per draw: the covariance of the estimate `mean`.
        ess: harmonic mean over prompts of the effective sample size.
    """

    value: float
    mean: Float[Tensor, " K"]
    gradient: Float[Tensor, " K"]
    hessian: Float[Tensor, "K K"]
    spread: Float[Tensor, "K K"]
    ess: float

    @property
    def deviation(self) -> Float[Tensor, " K"]:
        """Standard deviation of each feature."""
        return self.hessian.diagonal().sqrt()

    @property
    def residual(self) -> Float[Tensor, " K"]:
        """How far each moment is from mu, in standard deviations; infinite for a constant that is not mu."""
        return torch.where(self.gradient == 0, 0.0, self.gradient.abs() / self.deviation)

    def inverse(self) -> Float[Tensor, "K K"]:
        """Pseudo-inverse of the Hessian, whatever the features' units; features that say the same share their lambda."""
        scale = torch.where(self.deviation > 0, 1 / self.deviation, 0.0)
        return scale[:, None] * torch.linalg.pinv(scale[:, None] * self.hessian * scale, hermitian=True) * scale


@dataclass(frozen=True)
class Dual:
    """Features of weighted draws, and the means that they should have.

    Attributes:
        log_w: log-weight of each draw for the base law under the hard constraints; -inf outside.
        log_base: the same without the hard constraints.
        index: the prompt of each draw, of `groups`.
    """

    log_w: Float[Tensor, " B"]
    log_base: Float[Tensor, " B"]
    features: Float[Tensor, "B K"]
    means: Float[Tensor, " K"]
    index: Int[Tensor, " B"]
    groups: int

    @property
    def empty(self) -> int:
        """Prompts without a draw of positive weight."""
        return int((group_logsumexp(self.log_w, self.index, self.groups) == -torch.inf).sum())

    def at(self, weights: Float[Tensor, " K"]) -> State:
        """Value, moments and derivatives at lambda."""
        log_w = self.log_w + self.features @ weights
        p = normalise(log_w, self.index, self.groups)
        log_z = group_logsumexp(log_w, self.index, self.groups) - group_logsumexp(
            self.log_base, self.index, self.groups
        )
        by_prompt = self.features.new_zeros(self.groups, len(weights))
        by_prompt.index_add_(0, self.index, p[:, None] * self.features)
        centred = self.features - by_prompt[self.index]
        mean = by_prompt.mean(0)
        return State(
            value=float(log_z.mean() - weights @ self.means),
            mean=mean,
            gradient=mean - self.means,
            hessian=(p[:, None] * centred).T @ centred / self.groups,
            spread=((p**2)[:, None] * centred).T @ centred / self.groups**2,
            ess=float(1 / (1 / ess(log_w, self.index, self.groups)).mean()),
        )

    def errors(self, weights: Float[Tensor, " K"]) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"], float]:
        """Standard errors (delta method) of lambda, of the moments and of the dual's value; of the draws, not of prompts."""
        state = self.at(weights)
        inverse = state.inverse()
        lambdas = (inverse @ state.spread @ inverse).diagonal().sqrt()
        tilted = normalise(self.log_w + self.features @ weights, self.index, self.groups)
        influence = tilted - normalise(self.log_base, self.index, self.groups)
        return lambdas, state.spread.diagonal().sqrt(), float(influence.norm()) / self.groups

    def ranges(self) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """Smallest and largest mean that weights on the draws can give each feature."""
        possible = self.log_w > -torch.inf
        rows = [self.features[possible & (self.index == group)] for group in range(self.groups)]
        return torch.stack([r.amin(0) for r in rows]).mean(0), torch.stack([r.amax(0) for r in rows]).mean(0)

    def in_range(self) -> Bool[Tensor, " K"]:
        """Whether each mean lies strictly within its feature's range, so that some finite lambda gives it."""
        low, high = self.ranges()
        return ((low < self.means) & (self.means < high)) | ((low == high) & (low == self.means))

    def feasible(self) -> bool:
        """Whether some weights on the draws, normalised for each prompt, give all the means (a linear programme)."""
        from scipy.optimize import linprog
        from scipy.sparse import coo_array, vstack

        possible = (self.log_w > -torch.inf).nonzero().flatten()
        features, index = self.features[possible].numpy(), self.index[possible].numpy()
        ones, columns = np.ones(len(index)), np.arange(len(index))
        each_prompt = coo_array((ones, (index, columns)), shape=(self.groups, len(index)))
        equal = vstack([coo_array(features.T / self.groups), each_prompt])
        found = linprog(0 * ones, A_eq=equal, b_eq=np.concatenate([self.means.numpy(), np.ones(self.groups)]))
        return found.status == 0


@dataclass(frozen=True)
class Solution:
    """Where Newton's method ended.

    Attributes:
        converged: the moments are matched.
        enough: there were enough effective draws to begin with.
    """

    weights: Float[Tensor, " K"]
    state: State
    converged: bool
    enough: bool


def minimise(dual: Dual, min_ess: float, start: Float[Tensor, " K"] | None = None) -> Solution:
    """Newton's method with a line search (Armijo) that lets lambda go only where `min_ess` effective draws remain."""
    weights = torch.zeros_like(dual.means) if start is None else start
    state = dual.at(weights)
    if not len(weights):
        return Solution(weights, state, converged=True, enough=True)
    enough = state.ess >= min_ess
    for _ in range(STEPS if enough else 0):
        if float(state.residual.max()) <= EXACT:
            break
        step = -state.inverse() @ state.gradient
        slope = float(state.gradient @ step)
        share, slack = 1.0, 1e-13 * (1 + abs(state.value))  # rounding must not stop the last steps
        while share >= SHORTEST:
            found = dual.at(weights + share * step)
            if found.ess >= min_ess and found.value <= state.value + 1e-4 * share * slope + slack:
                break
            share /= 2
        else:
            break
        stalled = share == 1 and float(found.residual.max()) >= float(state.residual.max()) <= SOLVED
        if stalled:
            break
        weights, state = weights + share * step, found
    solved = enough and float(state.residual.max()) <= SOLVED and bool(dual.in_range().all())
    return Solution(weights, state, solved, enough)
