"""All completions of a small language as a tree of prefixes, with the sums that laws on it need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.posterior.exact import Exact


@dataclass(frozen=True)
class Tree:
    """The prefixes of a list of completions. A node is a prefix of at least one token; node 0 is the empty prefix.

    Attributes:
        node: the node that each token of each completion leads to; 0 on padding.
        parent: the node that each node continues.
        mask: True on tokens.
    """

    node: Int[Tensor, "K T"]
    parent: Int[Tensor, " N"]
    mask: Tensor

    @property
    def lengths(self) -> Float[Tensor, " K"]:
        """Tokens of each completion, the EOS included."""
        return self.mask.sum(-1).double()

    def log_mass(self, log_law: Float[Tensor, " K"]) -> Float[Tensor, " N"]:
        """log of each node's probability under a law on the completions."""
        mass = torch.zeros(len(self.parent), dtype=torch.float64)
        peak = log_law.max()
        share = (log_law - peak).exp()[:, None].expand_as(self.node)
        mass.index_add_(0, self.node[self.mask], share[self.mask])
        mass[0] = (log_law - peak).exp().sum()
        return mass.log() + peak

    def conditionals(self, log_law: Float[Tensor, " K"]) -> Float[Tensor, "K T"]:
        """log-probability of each token given its prefix, 0 on padding."""
        mass = self.log_mass(log_law)
        edge = mass - mass[self.parent]
        return torch.where(self.mask, edge[self.node], 0.0)

    def children_mean(self, log_law: Float[Tensor, " K"], values: Float[Tensor, "K T"]) -> Float[Tensor, " N"]:
        """E[values | node]: the mean of what the completions through a node have at that token; 0 at the root."""
        law = log_law.exp()[:, None].expand_as(values)
        total = torch.zeros(len(self.parent), dtype=torch.float64)
        total.index_add_(0, self.node[self.mask], (law * values)[self.mask])
        return total / self.log_mass(log_law).exp()

    def centre(self, log_law: Float[Tensor, " K"], value: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Each node's value minus the mean over its siblings; 0 at the root."""
        mass = self.log_mass(log_law).exp()
        mean = torch.zeros(len(self.parent), dtype=torch.float64)
        mean.index_add_(0, self.parent[1:], (mass * value)[1:])
        centred = value - (mean / mass)[self.parent]
        centred[0] = 0.0
        return centred

    def law(self, edge: Float[Tensor, " N"]) -> Float[Tensor, " K"]:
        """The law whose log-conditionals are `edge`, normalised within each prefix."""
        total = torch.full((len(self.parent),), -torch.inf, dtype=torch.float64)
        peak = total.scatter_reduce(0, self.parent[1:], edge[1:], "amax")
        sums = torch.zeros_like(total).index_add_(0, self.parent[1:], (edge[1:] - peak[self.parent[1:]]).exp())
        normal = edge - (sums.log() + peak)[self.parent]
        return torch.where(self.mask, normal[self.node], 0.0).sum(-1)


def tree(exact: Exact) -> Tree:
    """The prefixes of all completions of a tabular posterior."""
    draws = exact.scored.draws
    number: dict[tuple[int, ...], int] = {(): 0}
    parent, rows = [0], []
    for completion in exact.completions:
        row = []
        for end in range(1, len(completion) + 1):
            prefix = completion[:end]
            if prefix not in number:
                number[prefix] = len(parent)
                parent.append(number[prefix[:-1]])
            row.append(number[prefix])
        rows.append(row + [0] * (draws.tokens.shape[1] - len(row)))
    return Tree(torch.tensor(rows), torch.tensor(parent), draws.mask)
