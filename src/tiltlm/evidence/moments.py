"""Targets given by moments: the law nearest to the prior under which some features have the means that one asks for.

The I-projection argmin KL(p || a) subject to E_p phi_i = mu_i is p = a exp(lambda . phi) / Z (Csiszar 1975; generation with
distributional control, Khalifa et al. 2021): a moment target is a reward tilt whose temperatures, one a feature, are the
solution of a convex problem.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.estimates import Estimate
from tiltlm.evidence.constraint import Constraint
from tiltlm.evidence.dual import Dual, Solution, minimise
from tiltlm.evidence.function import TextFunction, label_of, number_fault, values_of
from tiltlm.evidence.reward import Reward
from tiltlm.protocols import Evidence, Prior, Sampler
from tiltlm.records import Draws, Prompts, Scored
from tiltlm.seeds import generator
from tiltlm.target import Target, require_finite

ROUNDS = 6
"""Most times that a better proposal is asked for."""


@dataclass(frozen=True)
class Moment:
    """A feature of texts and the mean that it should have.

    Attributes:
        fn: the feature phi, called as `Reward` calls its function; one number a completion.
        mean: mu, the mean over prompts of E phi. For a yes/no feature, mean 1 is a hard constraint (a pointwise one).
        name: how it is called in logs; the function's name by default.
        bounds: smallest and largest value of phi, if known; the evidence is bounded where all of them are.
    """

    fn: TextFunction
    mean: float
    name: str = ""
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bounds is not None and not self.bounds[0] <= self.mean <= self.bounds[1]:
            raise InputError(f"moment {self.label!r} asks for mean {self.mean:g}, outside its bounds {self.bounds}")

    @property
    def label(self) -> str:
        return self.name or label_of(self.fn)


@dataclass(frozen=True)
class Moments:
    """The evidence that gives the moments, and how well it is known.

    Attributes:
        evidence: sum_i lambda_i phi_i, with the hard constraints; `prior * evidence` is the target.
        names: of the moments that have a lambda; in this order are
        weights: lambda, in nats per unit of phi, with the errors that the draws leave,
        achieved: the moments under the target; their standard errors say how far the true ones may be from the asked.
        ess: effective draws a prompt at lambda (harmonic mean over prompts: the bias of a weighted mean goes as 1 / ESS).
        dual: mean_c A_c(lambda) - lambda . mu, the convex function that lambda minimises.
        kl: KL(p || a) = lambda . mu - mean_c A_c, in nats, mean over prompts: what the moments cost. Hard constraints included.
    """

    evidence: Evidence
    names: tuple[str, ...]
    weights: tuple[Estimate, ...]
    achieved: tuple[Estimate, ...]
    ess: float
    dual: float
    kl: Estimate

    def __str__(self) -> str:
        rows = zip(self.names, self.weights, self.achieved, strict=True)
        lines = [f"{name}: lambda {weight}, mean {mean}" for name, weight, mean in rows]
        return "\n".join([*lines, f"KL(p||prior) {self.kl} nats, ESS {self.ess:.0f}"])


def match_moments(
    base: Prior | Target,
    prompts: Prompts | Sequence[Any],
    moments: Sequence[Moment],
    *,
    samples: int = 256,
    min_ess: float = 32.0,
    proposal: Sampler | None = None,
    improve: Callable[[Target], Sampler] | None = None,
    scored: Scored | None = None,
    seed: int = 0,
) -> Moments:
    """The evidence under which features have given means, with the least KL to the base.

    One lambda is shared by all prompts, and every prompt's posterior is normalised by itself: p(x|c) = a(x|c)
    exp(lambda . phi(x, c)) / Z_lambda(c), and what is asked for is mean_c E_{p(.|c)} phi = mu over the prompts as they are
    given. This is the projection under the mean over prompts of KL(p(.|c) || a(.|c)), and it is what `prior * evidence` means
    everywhere in this library. (A joint law of prompts and texts would also give prompts other weights, Z_lambda(c).)

    Lambda is found by Newton's method on the dual, on self-normalised importance weights: its gradient is mu_hat(lambda) - mu
    and its Hessian the covariance of phi, both exact for the draws.

    Args:
        base: a, a prior, or a target that already has evidence.
        moments: features and their means. Yes/no features with mean 1 become hard constraints and need no lambda.
        samples: draws a prompt.
        min_ess: lambda moves no further than keeps so many effective draws a prompt.
        proposal: what to draw from; the base's prior by default.
        improve: gives a better proposal for the target reached so far, for instance
            `lambda target: fit(target, prompts, steps=20)`. Asked whenever `min_ess` stops lambda short of the moments.
        scored: draws that are there already, such as the plan's, instead of new ones; scored with the base, or with anything
            if the base is a prior. With all completions and log q = 0 (`Exact.listed`) the answer is exact.
        seed: of the draws.

    Raises:
        InputError: if the moments cannot be had: a mean outside its feature's range in the draws, moments that contradict each
            other, or too few effective draws, with the moment, the figures and the remedy.
    """
    if not moments:
        raise InputError("moments is empty; give at least one Moment(fn, mean=...)")
    prior = base.prior if isinstance(base, Target) else base
    encoded = prior.encode(prompts)

    def drawn(sampler: Sampler, number: int) -> Scored:
        draws = sampler.draw(encoded, samples, generator(seed, "moments", number))
        return require_finite(_score(base, draws))

    scored = drawn(proposal or prior, 0) if scored is None else _as_base(base, scored)
    problem = _Problem.of(scored, moments)
    solution = minimise(problem.dual, min_ess)
    for number in range(1, ROUNDS + 1):
        if solution.converged or not solution.enough or improve is None:
            break
        better = improve(_tilted(base, problem.evidence(solution.weights)))
        problem = _Problem.of(drawn(better, number), moments)
        solution = minimise(problem.dual, min_ess, solution.weights)
    if not solution.converged:
        raise InputError(problem.complaint(solution, min_ess))
    return problem.result(solution)


def _score(base: Prior | Target, draws: Draws) -> Scored:
    if isinstance(base, Target):
        return base.score(draws)
    return Scored(draws, base.log_prob(draws), torch.zeros(len(draws), dtype=torch.float64))


def _as_base(base: Prior | Target, scored: Scored) -> Scored:
    """Draws that were scored with any evidence, as draws for the base; a prior alone has none."""
    if isinstance(base, Target):
        return scored.at(base.beta)
    return replace(scored, log_evidence=torch.zeros(len(scored), dtype=torch.float64))


def _tilted(base: Prior | Target, evidence: Evidence) -> Target:
    return base * evidence if isinstance(base, Target) else Target(base, evidence)


def _feature(moment: Moment, draws: Draws) -> Float[Tensor, " B"]:
    return values_of(moment.fn, draws, "moment", moment.label, number_fault(moment.bounds))[0]


def _is_pointwise(moment: Moment, values: Float[Tensor, " B"]) -> bool:
    """A yes/no feature that must always hold; the draws show both that it is one and that it can."""
    seen = set(values.unique().tolist())
    return moment.mean == 1 and 1.0 in seen and seen <= {0.0, 1.0}


@dataclass(frozen=True)
class _Problem:
    """The moments on one set of draws.

    Attributes:
        pointwise, tilted: the moments that are hard constraints, and those that have a lambda.
        dual: the convex problem of the tilted ones, on the draws that satisfy the others.
    """

    pointwise: tuple[Moment, ...]
    tilted: tuple[Moment, ...]
    dual: Dual

    @classmethod
    def of(cls, scored: Scored, moments: Sequence[Moment]) -> _Problem:
        values = [_feature(moment, scored.draws) for moment in moments]
        pairs = list(zip(moments, values, strict=True))
        hard = [(m, v) for m, v in pairs if _is_pointwise(m, v)]
        soft = [(m, v) for m, v in pairs if not _is_pointwise(m, v)]
        log_base = scored.log_weight.double()
        inside = torch.stack([torch.ones(len(scored)), *(v for _, v in hard)]).amin(0) == 1
        used, index = scored.draws.prompt_index.unique(return_inverse=True)
        dual = Dual(
            log_w=torch.where(inside, log_base, -torch.inf),
            log_base=log_base,
            features=torch.stack([v for _, v in soft], -1) if soft else log_base.new_zeros(len(scored), 0),
            means=torch.tensor([m.mean for m, _ in soft], dtype=torch.float64),
            index=index,
            groups=len(used),
        )
        problem = cls(tuple(m for m, _ in hard), tuple(m for m, _ in soft), dual)
        problem.require_satisfied(len(scored.draws.prompts) if scored.dropped else len(used))
        return problem

    def require_satisfied(self, prompts: int) -> None:
        """Refuse constraints that no draw of some prompt satisfies."""
        empty = self.dual.empty + prompts - self.dual.groups
        if empty:
            names = ", ".join(repr(m.label) for m in self.pointwise) or "the base"
            raise InputError(
                f"{empty} of {prompts} prompts have no draw that satisfies {names}; draw more samples, or give a proposal that "
                f"satisfies it more often"
            )

    def evidence(self, weights: Float[Tensor, " K"]) -> Evidence:
        """sum_i lambda_i phi_i, with the hard constraints."""
        terms: list[Any] = [
            weight * Reward(m.fn, bounds=m.bounds, name=m.label)
            for m, weight in zip(self.tilted, weights.tolist(), strict=True)
        ]
        terms += [Constraint(m.fn, name=m.label) for m in self.pointwise]
        return functools.reduce(operator.add, terms)

    def complaint(self, solution: Solution, min_ess: float) -> str:
        """Why lambda could not be found, in a sentence."""
        state, draws = solution.state, len(self.dual.index) / self.dual.groups
        outside = (~self.dual.in_range()).nonzero().flatten().tolist()
        if outside:
            moment = self.tilted[outside[0]]
            low, high = (float(ends[outside[0]]) for ends in self.dual.ranges())
            return (
                f"moment {moment.label!r} asks for mean {moment.mean:g}, but its values in {len(self.dual.index)} draws allow "
                f"only means between {low:.4g} and {high:.4g}, both excluded; ask for one in between, draw more samples, or give "
                f"improve= (what must never hold is a Constraint on its opposite)"
            )
        if not solution.enough:
            return (
                f"samples gives {state.ess:.1f} effective draws a prompt ({draws:.0f} drawn) for the base, and min_ess is "
                f"{min_ess:g}; draw more samples, give a proposal nearer to the base, or lower min_ess"
            )
        if len(self.tilted) > 1 and not self.dual.feasible():
            names = ", ".join(repr(m.label) for m in self.tilted)
            return (
                f"moments {names} contradict each other: each mean is possible, but no weighting of the {len(self.dual.index)} "
                f"draws has them all; change one of them, or draw more samples"
            )
        worst = int(state.residual.argmax())
        moment = self.tilted[worst]
        return (
            f"moment {moment.label!r} asks for mean {moment.mean:g}, but it is {float(state.mean[worst]):.4g} where the draws "
            f"stop supporting a further tilt (ESS {state.ess:.1f} of {draws:.0f} a prompt, min_ess {min_ess:g}); draw more "
            f"samples, give a better proposal= (or improve=), or ask for a mean nearer to the base's"
        )

    def result(self, solution: Solution) -> Moments:
        state, count = solution.state, len(self.dual.index)
        lambda_errors, moment_errors, value_error = self.dual.errors(solution.weights)

        def estimates(values: Tensor, errors: Tensor) -> tuple[Estimate, ...]:
            return tuple(Estimate(v, e, count) for v, e in zip(values.tolist(), errors.tolist(), strict=True))

        return Moments(
            evidence=self.evidence(solution.weights),
            names=tuple(m.label for m in self.tilted),
            weights=estimates(solution.weights, lambda_errors),
            achieved=estimates(state.mean, moment_errors),
            ess=state.ess,
            dual=state.value,
            kl=Estimate(max(0.0, -state.value), value_error, count),
        )
