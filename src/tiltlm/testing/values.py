"""A value engine's claim, proved or refuted on a critic that is a table: one number for every prefix of a tabular language."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm.posterior import exact as ex
from tiltlm.posterior.values import Tree, max_backup, soft_backup
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Scored
from tiltlm.testing.check import TOLERANCE, Check
from tiltlm.testing.fixtures import Language, language, sine_logit, small_language

GROUPS = (2, 3)
"""Completions a prompt for which all tuples are listed."""
FALLING = (12, 24)
"""The same, where a bias of order 1/n is measured: a contrast of few draws is void, and its bias grows at first."""
SETTLED = 1e-9
"""Nats between where an engine ends and what it claims."""
ITERATIONS = 100


def value_checks(engine: Any) -> Iterator[Check]:
    """Every check that the claim of an engine that trains a critic calls for."""
    tree = tree_of(small_language())
    if engine.claim.fixed_point == "p*":
        yield from _posterior_checks(engine, tree)
    else:
        yield from _other_law_checks(engine, tree)


def three_completions() -> Language:
    """1, 00 and 01, where 1 is EOS: so few that many draws can be listed."""
    return language(
        lambda prompt, prefix: [sine_logit(prefix, a) for a in range(2)],
        lambda x: math.cos(len(x)) + 0.5 * x[-1],
        beta=0.7,
        vocab_size=2,
        depth=2,
        eos=1,
    )


def tree_of(world: Language) -> Tree:
    """The prefixes of a language's first prompt."""
    return Tree(ex.posterior(world.target, world.prompts))


# --- the claims ---


def _posterior_checks(engine: Any, tree: Tree) -> Iterator[Check]:
    """Nothing pulls at Q* = log E_pi0[exp(r / beta) | s + a], and from zero the engine ends there."""
    claim: Claim = engine.claim
    if claim.bias == "1/n":
        yield from _falling_checks(engine, tree_of(three_completions()))
    else:
        yield from _stationary_checks(engine, tree)
    for whose, q in _ends(engine, tree):
        distance = ex.kl(tree.log_law(q), tree.exact.log_posterior)
        yield Check(f"from zero, draws of {whose}: KL(pi_Q||p*) at the end", abs(distance), SETTLED)
        yield Check(f"from zero, draws of {whose}: V(root) is log Z", abs(_root(tree, q) - tree.exact.log_z), SETTLED)


def _stationary_checks(engine: Any, tree: Tree) -> Iterator[Check]:
    best = tree.fixed_point(soft_backup)
    for whose, behaviour in behaviours(engine.claim, tree):
        for group in GROUPS:
            signals = Signals(replace(engine, group=group), tree, best, behaviour(best))
            yield Check(f"expected gradient vanishes at Q*, draws of {whose}, group {group}", signals.pull, TOLERANCE)
            if engine.claim.data != "prior" and group == GROUPS[0]:  # a regression's signal vanishes on average only
                yield Check(f"every draw's signal vanishes at Q*, draws of {whose}", signals.largest, TOLERANCE)


def _falling_checks(engine: Any, tree: Tree) -> Iterator[Check]:
    best = tree.fixed_point(soft_backup)
    for whose, behaviour in behaviours(engine.claim, tree):
        low, high = (Signals(replace(engine, group=n), tree, best, behaviour(best)).pull for n in FALLING)
        slope = math.log(high / low) / math.log(FALLING[1] / FALLING[0]) if low > TOLERANCE else -math.inf
        yield Check(f"expected gradient at Q* falls like 1/n, draws of {whose} (slope in n)", slope, -0.5)


def _other_law_checks(engine: Any, tree: Tree) -> Iterator[Check]:
    """An engine that settles elsewhere: Q* does not stay, and from zero it ends where it says."""
    claim: Claim = engine.claim
    best = tree.fixed_point(soft_backup)
    for whose, behaviour in behaviours(claim, tree):
        pull = Signals(replace(engine, group=GROUPS[0]), tree, best, behaviour(best)).pull
        # A modest claim must be an honest one too: say p* if it is p*.
        yield Check(f"Q* is not stationary, draws of {whose}", TOLERANCE / max(pull, 1e-300), 1e-3)
    if claim.fixed_point != "greedy" and not hasattr(engine, "settles_at"):
        return
    for whose, q in _ends(engine, tree):
        law = tree.log_law(q)
        if hasattr(engine, "settles_at"):
            gap = float((law - engine.settles_at(tree.exact)).abs().max())
            yield Check(f"from zero, draws of {whose}: the law at the end is {claim.fixed_point}", gap, SETTLED)
        if claim.fixed_point == "greedy":
            evidence = tree.exact.scored.log_evidence.double()
            largest = float(evidence.max())
            short = largest - float(evidence[tree.exact.completions.index(greedy(tree, q))])
            yield Check(f"from zero, draws of {whose}: the greedy completion is the best (nats short)", short, SETTLED)
            value = float(max_backup(tree.by_state(tree.log_prior), tree.by_state(q))[0])
            yield Check(f"from zero, draws of {whose}: its value is its evidence", abs(value - largest), SETTLED)


def _root(tree: Tree, q: Tensor) -> float:
    return float(soft_backup(tree.by_state(tree.log_prior), tree.by_state(q))[0])


def greedy(tree: Tree, q: Tensor) -> tuple[int, ...]:
    """The completion that takes the largest Q at every token."""
    state = 0
    while True:
        pair = int(tree.children[state, tree.by_state(q)[state].argmax()])
        state = int(tree.successor[pair])
        if state < 0:
            return tree.pairs[pair]


# --- who draws ---

Behaviour = Callable[[Tensor], Tensor]
"""Q of each pair -> log-probability of each token of each completion (K, T) under the law that draws."""


def behaviours(claim: Claim, tree: Tree) -> list[tuple[str, Behaviour]]:
    """The laws that draw, by the claim: the prior; the critic's own, which moves with it; and one that has nothing to do with it."""
    if claim.data == "prior":
        return [("the prior", lambda q: tree.completions(tree.log_prior))]
    own: Behaviour = lambda q: tree.completions(tree.log_tilted(q.detach()))  # noqa: E731
    other = tree.log_tilted(1.4 * torch.arange(len(tree.pairs), dtype=torch.float64).sin())
    another: Behaviour = lambda q: tree.completions(other)  # noqa: E731
    return [("the critic", own)] if claim.data == "on-policy" else [("the critic", own), ("another law", another)]


def even(tree: Tree) -> Tensor:
    """The law under which all completions are equally likely: one draw of each is then its whole population (K, T)."""
    count = torch.zeros(len(tree.pairs), dtype=torch.float64)
    mask = tree.exact.scored.draws.mask
    count.index_add_(0, tree.pair_of[mask], torch.ones(int(mask.sum()), dtype=torch.float64))
    shares = count.log() - tree.by_state(count.log()).logsumexp(-1)[tree.state_of]
    return tree.completions(shares)


# --- the table, and what a loss wants of it ---


def forward_of(tree: Tree, q: Tensor) -> Forward:
    """What one pass of a critic with this table gives for all completions; its target network is the same table."""
    q_target = q.detach()
    log_prior = tree.by_state(tree.log_prior)
    soft, hard = (backup(log_prior, tree.by_state(q_target))[tree.state_of] for backup in (soft_backup, max_backup))
    return Forward(
        log_q=tree.completions(tree.log_tilted(q)),
        values=tree.completions(soft_backup(log_prior, tree.by_state(q))[tree.state_of]),
        q=tree.completions(q),
        q_target=tree.completions(q_target),
        soft_target=tree.completions(soft),
        max_target=tree.completions(hard),
        double_target=tree.completions(hard),
    )


def _chosen(forward: Forward, needs: frozenset[str], index: Tensor) -> Forward:
    """The rows at `index` of the fields that an engine reads; `log_q` is always there."""
    return Forward(**{name: getattr(forward, name)[index] for name in needs | {"log_q"}})


def _behaving(tree: Tree, behaviour: Tensor) -> Scored:
    scored = tree.exact.scored
    return replace(scored, draws=replace(scored.draws, log_q=behaviour, sampler=""))


def _state(engine: Any, tree: Tree) -> Any:
    state = engine.init(tree.exact.scored.draws.prompts)
    return state.double() if isinstance(state, nn.Module) else state


@dataclass(frozen=True)
class Signals:
    """What an engine's loss wants of a table, over all sets of `engine.group` draws, repeats included.

    Attributes:
        pull: the largest entry of the expected gradient.
        largest: the largest derivative of any set's loss.
    """

    engine: Any
    tree: Tree
    q: Tensor
    behaviour: Tensor

    @property
    def pull(self) -> float:
        q = self.q.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(expected_loss(self.engine, self.tree, q, self.behaviour), q)
        return float(gradient.abs().max())

    @property
    def largest(self) -> float:
        q = self.q.clone().requires_grad_()
        found = 0.0
        for _, loss in _losses(self.engine, self.tree, q, self.behaviour):
            (gradient,) = torch.autograd.grad(loss, q, retain_graph=True)
            found = max(found, float(gradient.abs().max()))
        return found


def expected_loss(engine: Any, tree: Tree, q: Tensor, behaviour: Tensor) -> Tensor:
    """The loss's expectation over all tuples of `engine.group` draws of a law; differentiable in the table."""
    shares, losses = zip(*_losses(engine, tree, q, behaviour), strict=True)
    return (torch.stack(shares) * torch.stack(losses)).sum()


def _losses(engine: Any, tree: Tree, q: Tensor, behaviour: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Probability and loss of every tuple; tuples that differ in their order only are taken together, as losses do."""
    forward, scored, state = forward_of(tree, q), _behaving(tree, behaviour), _state(engine, tree)
    log_q = behaviour.sum(-1)
    for rows in itertools.combinations_with_replacement(range(len(log_q)), engine.group):
        index = torch.tensor(rows)
        orders = math.lgamma(engine.group + 1) - sum(math.lgamma(rows.count(row) + 1) for row in set(rows))
        loss, _ = engine.loss(_chosen(forward, engine.claim.needs, index), scored.select(index), state)
        yield (log_q[index].sum() + orders).exp(), loss


# --- where it ends ---


def _ends(engine: Any, tree: Tree) -> Iterator[tuple[str, Tensor]]:
    """Where the engine goes from a table of zeros."""
    if engine.claim.bias == "1/n":
        yield "every completion in turn", settle_on_population(engine, tree)
        return
    for whose, behaviour in behaviours(engine.claim, tree):
        yield whose, settle(replace(engine, group=GROUPS[0]), tree, behaviour)


def settle(engine: Any, tree: Tree, behaviour: Behaviour) -> Tensor:
    """The table at which the expected gradient's steps from zero come to rest.

    Each step divides the gradient by its slope in every entry, as Newton would: without bias, an entry's gradient depends on
    that entry alone, once targets and draws are held. Both are then brought up to date.
    """

    def gradient(q: Tensor) -> Tensor:
        return torch.autograd.grad(expected_loss(engine, tree, q, behaviour(q)), q, create_graph=True)[0]

    def step(q: Tensor, slope_of: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(slope_of.sum(), q)
        return slope_of.detach() / slope.abs().clamp(min=1e-12)

    return _iterate(gradient, step, len(tree.pairs))


def settle_on_population(engine: Any, tree: Tree) -> Tensor:
    """The same for an engine with a bias of order 1/n, in the limit: on a batch of every completion once, drawn evenly."""
    behaviour, everything = even(tree), torch.arange(len(tree.exact.completions))
    scored, state = _behaving(tree, behaviour), _state(engine, tree)

    def gradient(q: Tensor) -> Tensor:
        loss, _ = engine.loss(_chosen(forward_of(tree, q), engine.claim.needs, everything), scored, state)
        return torch.autograd.grad(loss, q, create_graph=True)[0]

    def step(q: Tensor, slope_of: Tensor) -> Tensor:
        hessian = torch.stack([torch.autograd.grad(entry, q, retain_graph=True)[0] for entry in slope_of])
        values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
        along = vectors.T @ slope_of.detach()
        return vectors @ torch.where(values.abs() > 1e-10, along / values.abs().clamp(min=1e-10), 0.0)

    return _iterate(gradient, step, len(tree.pairs))


def _iterate(gradient: Callable[[Tensor], Tensor], step: Callable[[Tensor, Tensor], Tensor], size: int) -> Tensor:
    q = torch.zeros(size, dtype=torch.float64)
    for number in range(ITERATIONS):
        leaf = q.clone().requires_grad_()
        longest = 1 / (1 + number / 10)  # a step that is too long is not repeated for ever
        move = step(leaf, gradient(leaf)).clamp(-longest, longest)
        q = q - move
        if float(move.abs().max()) < SETTLED / 10:
            break
    return q
