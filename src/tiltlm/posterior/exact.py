"""Exact posteriors by enumeration, in float64.

For a model whose completions can be listed (at most `LIMIT` strings), everything that the rest of the library
estimates is computed here without sampling: log Z, the posterior, soft values, divergences, the laws of
decoding engines, and the gradients that training engines estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import roots_legendre
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import Sampler
from tiltlm.records import Draws, Prompts, Scored
from tiltlm.target import Target

LIMIT = 200_000


def enumerate_completions(sampler: Any, prompts: Prompts, prompt: int = 0, limit: int = LIMIT) -> Draws:
    """Every completion of one prompt that has positive probability, with its log-probability.

    Prefixes are extended level by level and those without mass are dropped, so a model that rules strings out is
    listed whatever its vocabulary would allow.

    Args:
        sampler: a prior or policy of `tiltlm.lm`, or any sampler with `complete`, `body.eos` and `body.vocabulary`.

    Raises:
        InputError: if there are more than `limit` strings.
    """
    vocabulary = sampler.body.vocabulary
    eos, depth = sampler.body.eos, sampler.law.max_new_tokens
    if sampler.law.stop:
        raise InputError("stop strings cannot be enumerated; take a law without them")
    done: list[tuple[int, ...]] = []
    frontier: list[tuple[int, ...]] = [()]
    for level in range(1, depth + 1):
        grown = [(*prefix, token) for prefix in frontier for token in range(vocabulary)]
        if len(grown) + len(done) > limit:
            raise InputError(
                f"there are more than {limit} completions ({len(grown) + len(done)} at length {level}); enumerate a smaller "
                f"vocabulary or max_new_tokens"
            )
        index = torch.full((len(grown),), prompt)
        alive = sampler.complete(prompts, index, grown).log_prob > -torch.inf
        grown = [prefix for prefix, a in zip(grown, alive.tolist(), strict=True) if a]
        done += [prefix for prefix in grown if prefix[-1] in eos or level == depth]
        frontier = [prefix for prefix in grown if prefix[-1] not in eos]
    return sampler.complete(prompts, torch.full((len(done),), prompt), done)


@dataclass(frozen=True)
class Exact:
    """The exact posterior of one prompt.

    Attributes:
        scored: every completion, scored; `scored.draws.log_q` is the prior's.
        beta: the target's temperature.
    """

    scored: Scored
    beta: float

    @property
    def log_prior(self) -> Float[Tensor, " K"]:
        return self.scored.log_prior.sum(-1).double()

    @property
    def reward(self) -> Float[Tensor, " K"]:
        """beta times the log-likelihood."""
        return self.beta * self.scored.log_evidence.double()

    @property
    def log_joint(self) -> Float[Tensor, " K"]:
        """log pi0 + r / beta."""
        return self.log_prior + self.scored.log_evidence.double()

    @property
    def log_z(self) -> float:
        return float(self.log_joint.logsumexp(0))

    @property
    def log_posterior(self) -> Float[Tensor, " K"]:
        return self.log_joint - self.log_joint.logsumexp(0)

    def log_prob(self, sampler: Sampler) -> Float[Tensor, " K"]:
        """log q of every completion under another sampler of the same law."""
        return sampler.log_prob(replace(self.scored.draws, sampler="")).sum(-1).double()

    def mean_reward(self, log_q: Float[Tensor, " K"]) -> float:
        """E_q r."""
        q = log_q.exp()
        return float(torch.where(q > 0, q * self.reward, 0.0).sum())  # the posterior leaves out what is impossible

    def elbo(self, log_q: Float[Tensor, " K"]) -> float:
        """E_q[log pi0 + r / beta - log q] = log Z - KL(q || p*)."""
        return self.log_z - kl(log_q, self.log_posterior)

    def soft_values(self) -> Mapping[tuple[int, ...], float]:
        """V*(prefix) = beta log E_pi0[exp(r / beta) | prefix] for every prefix, whole completions included."""
        sums: dict[tuple[int, ...], tuple[list[float], list[float]]] = {}
        rows = zip(self.completions, self.log_prior.tolist(), self.log_joint.tolist(), strict=True)
        for completion, log_prior, log_joint in rows:
            for length in range(len(completion) + 1):
                prior, joint = sums.setdefault(completion[:length], ([], []))
                prior.append(log_prior)
                joint.append(log_joint)
        return {
            prefix: self.beta * float(np.logaddexp.reduce(joint) - np.logaddexp.reduce(prior))
            for prefix, (prior, joint) in sums.items()
        }

    @property
    def listed(self) -> Scored:
        """Every completion once, with log q = 0: draws whose importance weights pi0 / q are the probabilities themselves."""
        draws = self.scored.draws
        return replace(self.scored, draws=replace(draws, log_q=torch.zeros_like(draws.log_q), sampler=""))

    @property
    def completions(self) -> tuple[tuple[int, ...], ...]:
        """The completions' ids, EOS included."""
        draws = self.scored.draws
        return tuple(tuple(t[m].tolist()) for t, m in zip(draws.tokens, draws.mask, strict=True))


def posterior(target: Target, prompts: Prompts, prompt: int = 0, limit: int = LIMIT) -> Exact:
    """The exact posterior of a target for one prompt."""
    draws = enumerate_completions(target.prior, prompts, prompt, limit)
    scored = target.score(replace(draws, log_q=draws.log_q.double()))
    return Exact(replace(scored, log_evidence=scored.log_evidence.double()), target.beta)


# --- divergences between laws on the same list of completions, by their log-probabilities ---


def kl(log_q: Float[Tensor, " K"], log_p: Float[Tensor, " K"]) -> float:
    """KL(q || p) in nats."""
    q = log_q.exp()
    return float(torch.where(q > 0, q * (log_q - log_p), 0.0).sum())


def chi2(log_p: Float[Tensor, " K"], log_q: Float[Tensor, " K"]) -> float:
    """chi^2(p || q) = sum p^2 / q - 1."""
    return float((2 * log_p - log_q).logsumexp(0).exp() - 1)


def total_variation(log_q: Float[Tensor, " K"], log_p: Float[Tensor, " K"]) -> float:
    """Half the L1 distance."""
    return float((log_q.exp() - log_p.exp()).abs().sum() / 2)


def jensen_shannon(log_q: Float[Tensor, " K"], log_p: Float[Tensor, " K"]) -> float:
    """Mean KL of both to their average, in nats."""
    middle = torch.logaddexp(log_q, log_p) - np.log(2)
    return (kl(log_q, middle) + kl(log_p, middle)) / 2


def entropy(log_q: Float[Tensor, " K"]) -> float:
    """Shannon entropy in nats."""
    return -float(torch.where(log_q > -torch.inf, log_q.exp() * log_q, 0.0).sum())


# --- laws of decoding engines ---


def best_of_n_law(exact: Exact, n: int) -> Float[Tensor, " K"]:
    """The law of the best of `n` prior draws, the first drawn among equals: pi0 (F^n - F_-^n) / (F - F_-).

    F and F_- are the prior's probabilities of a reward at most, and less than, the completion's
    (Beirami et al. 2024, with ties broken by the order of draw).
    """
    prior, reward = exact.log_prior.exp(), exact.reward
    less = torch.stack([prior[reward < r - 1e-12].sum() for r in reward])
    equal = torch.stack(
        [prior[(reward == r) | ((reward - r).abs() <= 1e-12)].sum() for r in reward]
    )  # -inf is a tie too
    return prior * ((less + equal) ** n - less**n) / equal


def sir_law(exact: Exact, n: int) -> Float[Tensor, " K"]:
    """The law of one draw resampled from `n` prior draws in proportion to exp(r / beta).

    pi_n(x) = n pi0(x) w(x) E[1 / (w(x) + S)], S the sum of the other n - 1 weights; the expectation is the integral over
    t > 0 of exp(-w(x) t) phi(t)^(n-1), phi the Laplace transform of one weight.
    """
    prior, weight = exact.log_prior.exp(), exact.scored.log_evidence.exp()
    mean = float((prior * weight).sum())
    nodes, weights = roots_legendre(4000)
    u = torch.tensor((nodes + 1) / 2)  # t = u / (1 - u) / (n mean) maps (0, 1) to (0, inf)
    t = u / (1 - u) / (n * mean)
    dt = torch.tensor(weights / 2) / (1 - u) ** 2 / (n * mean)
    phi = (-t[:, None] * weight[None, :]).exp() @ prior
    inverse = ((-t[:, None] * weight[None, :]).exp() * (phi ** (n - 1) * dt)[:, None]).sum(0)
    return n * prior * weight * inverse


# --- gradients ---


def reverse_kl_gradient(
    policy: Any, exact: Exact, divergence: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Exact gradient of KL(q || p*) with respect to the policy's weights, or of another divergence.

    Args:
        divergence: (log_q, log_p) -> scalar, differentiable in log_q; reverse KL by default.
    """
    log_q = policy.forward(exact.scored.draws, frozenset({"log_q"})).log_q.sum(-1)
    if divergence is None:
        loss = (log_q.exp() * (log_q - exact.log_posterior)).sum()
    else:
        loss = divergence(log_q, exact.log_posterior)
    return _gradient(policy, loss)


def expected_gradient(policy: Any, exact: Exact, coefficients: Mapping[str, Float[Tensor, "K T"]]) -> dict[str, Tensor]:
    """An engine's gradient, once it is known what it wants of each number of a pass.

    Args:
        coefficients: for a field of `Forward` ("log_q", "kl"), the derivative of the expected loss with respect to it.
    """
    forward = policy.forward(exact.scored.draws, frozenset(coefficients))
    return _gradient(policy, sum((value * getattr(forward, name)).sum() for name, value in coefficients.items()))


def _gradient(policy: Any, loss: Any) -> dict[str, Tensor]:
    named = policy.named_parameters()
    grads = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, grads, strict=True))
