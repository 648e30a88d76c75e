"""The laws that variants of the objective settle at, on languages that can be listed.

Each is computed from its own formula, by one-dimensional root finding or by recursion from the ends of the completions to
the root; `implied` follows the updates instead, and the tests compare the two. A law is a vector of log-probabilities of
the completions of an `Exact`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from tiltlm.explanation.tree import Tree, tree
from tiltlm.posterior.exact import Exact, kl

Tilt = Callable[[Tensor, Tensor, float], tuple[Tensor, float]]
"""(log pi0(a|h), value of each a, beta) -> (log pi(a|h), value of h)."""


def tilted(exact: Exact, beta: float, bonus: Float[Tensor, " K"] | float = 0.0) -> Float[Tensor, " K"]:
    """pi0 exp((r + bonus) / beta) / Z."""
    joint = exact.log_prior + (exact.reward + bonus) / beta
    return joint - joint.logsumexp(0)


def forward_kl_law(exact: Exact, beta: float) -> Float[Tensor, " K"]:
    """pi = pi0 / (1 - A / beta), A = r - E_pi r: what a reward and a forward KL settle at.

    The stationary point of E_pi r - beta KL(pi0 || pi) (Vojnovic & Yun 2025). With nu = beta + E_pi r it reads
    pi = pi0 beta / (nu - r), and its sum falls in nu, so there is exactly one.
    """
    return _forward(exact.log_prior, exact.reward, beta)[0]


def length_bonus_law(exact: Exact, beta: float) -> tuple[Float[Tensor, " K"], float]:
    """The law, and kappa, of updates in which reward and sequence-level KL of a completion are divided by its length.

    A stationary law has (r - E_pi r - beta log pi / pi0) / |x| constant, so pi = pi0 exp((r + kappa |x|) / beta) / Z with
    kappa = beta KL(pi || pi0) / E_pi |x|.
    """
    lengths = tree(exact).lengths

    def gap(kappa: float) -> float:
        law = tilted(exact, beta, kappa * lengths)
        return kappa - beta * kl(law, exact.log_prior) / float((law.exp() * lengths).sum())

    high = 1.0
    while gap(high) < 0:
        high *= 2
    kappa = float(brentq(gap, 0.0, high, xtol=1e-15, rtol=1e-14))  # pyright: ignore[reportArgumentType]
    return tilted(exact, beta, kappa * lengths), kappa


def own_token_law(exact: Exact, beta: float) -> Float[Tensor, " K"]:
    """pi(a|h) proportional to pi0(a|h) exp(E_pi[r | h a] / beta): every token pays for its own KL, none for the later ones.

    What token-level k2 (or ratio-weighted k3, or the full KL of each position) in the loss settles at. p* has the soft value
    in place of E_pi[r | h a].
    """
    return _backwards(exact, beta, _own_reverse)


def own_token_forward_law(exact: Exact, beta: float) -> Float[Tensor, " K"]:
    """pi(a|h) = pi0(a|h) / (1 - A(h, a) / beta), A the reward's advantage under pi: token-level k3 in the loss."""
    return _backwards(exact, beta, _forward)


def discounted_law(exact: Exact, beta: float, gamma: float) -> Float[Tensor, " K"]:
    """pi(a|h) proportional to pi0(a|h) exp(gamma V(h a) / beta), V(h) = beta log E_pi0[exp(gamma V(h a) / beta)].

    The soft policy of discounted returns, the last token's reward counted in full when it falls.
    """

    def soft(log_prior: Tensor, value: Tensor, beta: float) -> tuple[Tensor, float]:
        joint = log_prior + value / beta
        return joint - joint.logsumexp(0), float(beta * joint.logsumexp(0))

    return _backwards(exact, beta, soft, gamma)


def _own_reverse(log_prior: Tensor, value: Tensor, beta: float) -> tuple[Tensor, float]:
    joint = log_prior + value / beta
    law = joint - joint.logsumexp(0)
    return law, float((law.exp() * value).sum())


def _forward(log_prior: Tensor, value: Tensor, beta: float) -> tuple[Tensor, float]:
    """pi0 beta / (beta + V - value), V such that it sums to one; V is then the mean of `value` under it."""
    prior, top = log_prior.exp(), float(value.max())
    at_top = float(prior[value == value.max()].sum())

    def excess(mean: float) -> float:
        return float((prior * beta / (beta + mean - value)).sum()) - 1

    low = top - beta * (1 - at_top / 2)  # the terms at the top alone sum to 2 here
    mean = float(brentq(excess, low, top + 1e-12, xtol=1e-15, rtol=1e-14))  # pyright: ignore[reportArgumentType]
    law = log_prior + (beta / (beta + mean - value)).log()
    return law, mean


def _backwards(exact: Exact, beta: float, tilt: Tilt, gamma: float = 1.0) -> Tensor:
    """Put a law together from conditionals, each made from the values of the prefixes that follow."""
    branches: Tree = tree(exact)
    mass = branches.log_mass(exact.log_prior)
    log_prior = mass - mass[branches.parent]
    last = branches.node.gather(1, branches.mask.sum(-1, keepdim=True) - 1).flatten()
    value, edge = torch.zeros(len(mass), dtype=torch.float64), torch.zeros(len(mass), dtype=torch.float64)
    value[last] = exact.reward
    inner = {int(node) for node in branches.parent.tolist()}
    leaves = set(last.tolist())
    for node in sorted(inner, reverse=True):  # a child's number is larger than its parent's
        children = (branches.parent == node).nonzero().flatten()
        children = children[children != 0]
        discount = torch.tensor([1.0 if int(child) in leaves else gamma for child in children], dtype=torch.float64)
        law, mean = tilt(log_prior[children], discount * value[children], beta)
        edge[children], value[node] = law, mean
    return branches.law(edge)
