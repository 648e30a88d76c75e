"""Value functions over prefixes, exactly: the token MDP of a target whose completions can be listed.

The state is the text so far, the action the next token, the transition is certain, and the only reward is r / beta at the end.
A method of value learning is a backup V(s) = f(log pi0(.|s), Q(s, .)) with Q(s, a) = V(s + a), and r / beta where s + a is
a whole completion. Its fixed point is found by backward induction, and its law is the prior tilted by Q, token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.posterior.exact import Exact

Backup = Callable[[Tensor, Tensor], Tensor]
"""(log pi0(a|s), Q(s, a)), both (S, A) and -inf where there is no such action -> V(s), (S,)."""


def soft_backup(log_prior: Float[Tensor, "S A"], q: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
    """log sum_a pi0(a|s) exp Q(s, a), whose fixed point is V* (Haarnoja et al. 2017, eq. 7, with pi0 for the uniform law)."""
    return (log_prior + q).logsumexp(-1)


def max_backup(log_prior: Float[Tensor, "S A"], q: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
    """max_a Q(s, a): the limit beta -> 0 of beta times the soft backup of r / beta."""
    return q.amax(-1)


def prior_backup(log_prior: Float[Tensor, "S A"], q: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
    """sum_a pi0(a|s) Q(s, a): the value of going on as the prior does (Mudgal et al. 2024)."""
    return _mean(log_prior, q)


def tilted_backup(log_prior: Float[Tensor, "S A"], q: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
    """sum_a pi_Q(a|s) Q(s, a), pi_Q the prior tilted by Q: what SARSA without a KL settles at."""
    return _mean((log_prior + q).log_softmax(-1), q)


def _mean(log_p: Tensor, q: Tensor) -> Tensor:
    return torch.where(log_p > -torch.inf, log_p.exp() * q, 0.0).sum(-1)


@dataclass(frozen=True)
class Tree:
    """The prefixes of one prompt's completions. A pair (s, a) goes by the prefix s + a, a state by s.

    Attributes:
        exact: the completions, whose order everything here keeps.
    """

    exact: Exact

    @cached_property
    def pairs(self) -> tuple[tuple[int, ...], ...]:
        """Every prefix of at least one token."""
        found = {c[:t]: None for c in self.exact.completions for t in range(1, len(c) + 1)}
        return tuple(found)

    @cached_property
    def states(self) -> tuple[tuple[int, ...], ...]:
        """Every prefix after which there is another token; the empty one is first."""
        return tuple({c[:t]: None for c in self.exact.completions for t in range(len(c))})

    @cached_property
    def pair_of(self) -> Int[Tensor, "K T"]:
        """The pair at each token of each completion, 0 on padding."""
        number = {pair: i for i, pair in enumerate(self.pairs)}
        table = torch.zeros(self.exact.scored.log_prior.shape, dtype=torch.long)
        for row, c in enumerate(self.exact.completions):
            table[row, : len(c)] = torch.tensor([number[c[: t + 1]] for t in range(len(c))])
        return table

    @cached_property
    def children(self) -> Int[Tensor, "S A"]:
        """The pairs of each state, -1 where it has fewer than another."""
        number = {pair: i for i, pair in enumerate(self.pairs)}
        below: dict[tuple[int, ...], list[int]] = {state: [] for state in self.states}
        for pair in self.pairs:
            below[pair[:-1]].append(number[pair])
        widest = max(map(len, below.values()))
        return torch.tensor([ids + [-1] * (widest - len(ids)) for ids in below.values()])

    @cached_property
    def state_of(self) -> Int[Tensor, " N"]:
        """The state in which each pair's token is chosen."""
        number = {state: i for i, state in enumerate(self.states)}
        return torch.tensor([number[pair[:-1]] for pair in self.pairs])

    @cached_property
    def successor(self) -> Int[Tensor, " N"]:
        """The state that each pair leads to, -1 where it ends the completion."""
        number = {state: i for i, state in enumerate(self.states)}
        return torch.tensor([number.get(pair, -1) for pair in self.pairs])

    @cached_property
    def log_prior(self) -> Float[Tensor, " N"]:
        """log pi0(a|s) of each pair."""
        return self.gathered(self.exact.scored.log_prior.double())

    @cached_property
    def evidence(self) -> Float[Tensor, " N"]:
        """r / beta where a pair ends the completion, 0 elsewhere."""
        last = torch.zeros(self.pair_of.shape, dtype=torch.float64)
        lengths = self.exact.scored.draws.lengths
        last[torch.arange(len(last)), lengths - 1] = self.exact.scored.log_evidence.double()
        return self.gathered(last)

    def gathered(self, table: Float[Tensor, "K T"]) -> Float[Tensor, " N"]:
        """What a table over completions says of each pair."""
        mask = self.exact.scored.draws.mask
        out = torch.zeros(len(self.pairs), dtype=table.dtype)
        out[self.pair_of[mask]] = table[mask]
        return out

    def by_state(self, values: Float[Tensor, " N"]) -> Float[Tensor, "S A"]:
        """Numbers of pairs, in the places of `children`; -inf where there is none."""
        return torch.where(self.children >= 0, values[self.children], -torch.inf)

    def backed_up(self, values: Float[Tensor, " S"]) -> Float[Tensor, " N"]:
        """Q(s, a) from the values of states."""
        return torch.where(self.successor >= 0, values[self.successor], self.evidence)

    def fixed_point(self, backup: Backup) -> Float[Tensor, " N"]:
        """Q of each pair such that Q(s, a) is the backup of what follows; found from the ends to the root."""
        q = self.evidence
        for _ in range(self.pair_of.shape[1]):
            q = self.backed_up(backup(self.by_state(self.log_prior), self.by_state(q)))
        return q

    def log_tilted(self, q: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """log pi_Q(a|s) of each pair: pi0(a|s) exp Q(s, a), normalised in every state."""
        joint = self.log_prior + q
        return joint - self.by_state(joint).logsumexp(-1)[self.state_of]

    def completions(self, values: Float[Tensor, " N"]) -> Float[Tensor, "K T"]:
        """Numbers of pairs at each token of each completion, 0 on padding."""
        return torch.where(self.exact.scored.draws.mask, values[self.pair_of], 0.0)

    def log_law(self, q: Float[Tensor, " N"]) -> Float[Tensor, " K"]:
        """Log-probability of each completion under pi_Q."""
        return self.completions(self.log_tilted(q)).sum(-1)
