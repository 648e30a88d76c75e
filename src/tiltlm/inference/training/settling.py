"""The law at which a group-relative policy gradient with its KL in the loss stands still, found by listing the groups.

Let a(x) be what a draw x gets on average over the rest of its group, advantage times aggregation weight, and m(x) the average
weight alone. With the policy a free table of next-token probabilities, the expected update vanishes where among the
continuations of every prefix

    a - c m phi(log q / pi0) = const,    phi(l) = l for KL(q || pi0),  1 - exp(-l) for KL(pi0 || q),

averages over the completions that go through a continuation. For a KL of whole completions there is one prefix, the empty one,
and its continuations are the completions. As a depends on q through the group, the law is solved for: the updates are
followed from the prior, and Newton's method makes the end exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import root
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.training.policy_gradients.advantages import Advantage
from tiltlm.inference.training.policy_gradients.aggregate import Aggregate
from tiltlm.posterior.exact import Exact

LISTED = 5_000
"""Most groups that are listed."""
FOLLOWED = 300
"""Updates that are followed before Newton's method takes over."""
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Branches:
    """The choices that a law is made of: nodes, each a continuation of its parent; node 0 is the start.

    Attributes:
        node: the nodes that each completion goes through, 0 on padding.
        parent: of each node.
    """

    node: Int[Tensor, "K T"]
    parent: Int[Tensor, " N"]

    @property
    def mask(self) -> Bool[Tensor, "K T"]:
        return self.node > 0

    def normalised(self, logits: Float[Tensor, " N"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """log-probability of each node given its parent, and the log-normaliser of its siblings; 0 at the start."""
        peak = torch.full_like(logits, -torch.inf).scatter_reduce(0, self.parent[1:], logits[1:], "amax")
        total = torch.zeros_like(logits).index_add_(0, self.parent[1:], (logits - peak[self.parent]).exp()[1:])
        normaliser = (total.log() + peak)[self.parent]
        start = torch.arange(len(logits)) == 0
        return torch.where(start, 0.0, logits - normaliser), torch.where(start, 0.0, normaliser)

    def law(self, edge: Float[Tensor, " N"]) -> Float[Tensor, " K"]:
        """log-probability of each completion."""
        return torch.where(self.mask, edge[self.node], 0.0).sum(-1)

    def mass(self, values: Float[Tensor, " K"]) -> Float[Tensor, " N"]:
        """Sum over the completions that go through each node."""
        through = torch.zeros(len(self.parent), dtype=values.dtype)
        through.index_add_(0, self.node[self.mask], values[:, None].expand_as(self.node)[self.mask])
        through[0] = values.sum()
        return through

    def edges(self, log_law: Float[Tensor, " K"]) -> Float[Tensor, " N"]:
        """log-probability of each node given its parent, under a law on the completions."""
        mass = self.mass(log_law.exp()).log()
        return mass - mass[self.parent]


def prefixes(exact: Exact) -> Branches:
    """One node a prefix."""
    number: dict[tuple[int, ...], int] = {(): 0}
    parent, rows = [0], []
    for completion in exact.completions:
        for end in range(1, len(completion) + 1):
            if completion[:end] not in number:
                number[completion[:end]] = len(parent)
                parent.append(number[completion[: end - 1]])
        rows.append([number[completion[:end]] for end in range(1, len(completion) + 1)])
    width = exact.scored.draws.tokens.shape[1]
    return Branches(torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor(parent))


def completions(exact: Exact) -> Branches:
    """One node a completion: a law without structure."""
    count = len(exact.scored)
    return Branches(torch.arange(1, count + 1)[:, None], torch.zeros(count + 1, dtype=torch.long))


# --- the divergences: phi and where its weight m comes from ---


def reverse(log_ratio: Tensor) -> Tensor:
    """KL(q || pi0)."""
    return log_ratio


def forward(log_ratio: Tensor) -> Tensor:
    """KL(pi0 || q)."""
    return -torch.expm1(-log_ratio)


@dataclass(frozen=True)
class Penalty:
    """The KL in the loss.

    Attributes:
        branches: `prefixes` for a KL of tokens, `completions` for one of whole completions.
        phi: `reverse` or `forward`.
        of_states: the KL is that of the state, so that its weight does not depend on the continuation.
        coefficient: c.
    """

    branches: Callable[[Exact], Branches]
    phi: Callable[[Tensor], Tensor]
    coefficient: float
    of_states: bool = False


def settled_law(
    exact: Exact, group: int, advantage: Advantage, aggregate: Aggregate, longest: int, penalty: Penalty
) -> Float[Tensor, " K"]:
    """log-probabilities of the completions at the law that the updates, started at the prior, come to rest at.

    Exact for batches of one prompt. It is found as a stationary law; that it is the only one is not shown.

    Raises:
        InputError: for more groups than can be listed, or if the updates do not come to rest.
    """
    branches = penalty.branches(exact)
    prior = branches.edges(exact.log_prior)
    signal, weight, others = _listed(exact, group, advantage, aggregate, longest)

    def gap(edge: Tensor) -> Tensor:
        """How much more each continuation is wanted than its siblings on average, per unit of the KL's weight."""
        q = branches.law(edge).exp()
        share = q[others].prod(-1)
        a, m = signal @ share, weight @ share
        mass = branches.mass(q)
        a, m = branches.mass(q * a) / mass, branches.mass(q * m) / mass
        wanted = a - penalty.coefficient * (m[branches.parent] if penalty.of_states else m) * penalty.phi(edge - prior)
        total = torch.zeros_like(mass).index_add_(0, branches.parent[1:], (mass * wanted)[1:])
        centred = (wanted - (total / mass)[branches.parent]) / penalty.coefficient
        centred[0] = 0.0
        return centred

    edge, rate = prior, 0.2
    for _ in range(FOLLOWED):
        edge, _ = branches.normalised(edge + (rate * gap(edge)).clamp(-rate, rate))

    def residual(logits: Any) -> Any:
        trial, normaliser = branches.normalised(torch.cat([torch.zeros(1, dtype=torch.float64), torch.tensor(logits)]))
        return (gap(trial) + normaliser)[1:].numpy()  # siblings may share an offset; it is put at none

    found = root(residual, edge[1:].numpy(), method="hybr", options={"xtol": 1e-14})
    error = float(abs(residual(found.x)).max())
    if not error < TOLERANCE:
        raise InputError(
            f"kl_coefficient is {penalty.coefficient:g}, at which the updates did not come to rest (a pull of {error:.1e} is "
            f"left); raise kl_coefficient"
        )
    logits = torch.cat([torch.zeros(1, dtype=torch.float64), torch.tensor(found.x)])
    return branches.law(branches.normalised(logits)[0])


def _listed(
    exact: Exact, group: int, advantage: Advantage, aggregate: Aggregate, longest: int
) -> tuple[Float[Tensor, "K M"], Float[Tensor, "K M"], Int[Tensor, "M G"]]:
    """Advantage times weight, and weight, of each completion next to each choice of the other draws; and those choices."""
    count = len(exact.scored)
    if count**group > LISTED:
        raise InputError(
            f"group is {group}, which makes {count}^{group} groups, more than {LISTED} to list; take a smaller group"
        )
    tuples = torch.tensor(list(itertools.product(range(count), repeat=group)))
    reward = exact.scored.log_evidence.double()[tuples].T  # advantages work on columns: each is a group
    first = advantage(reward, torch.zeros(group, dtype=torch.long))[0].view(count, -1)
    mask = exact.scored.draws.mask
    shares = []
    for rows in tuples:
        one = torch.zeros(mask[rows].shape, dtype=torch.float64)
        one[0] = mask[rows[0]]
        shares.append(group * aggregate(one, mask[rows], longest) / mask[rows[0]].sum())
    weight = torch.stack(shares).view(count, -1)
    return first * weight, weight, tuples.view(count, -1, group)[0, :, 1:]
