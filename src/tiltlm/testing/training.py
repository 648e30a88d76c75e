"""A training engine's claim, proved or refuted: what its loss wants of each log-probability, over all tuples of draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm.posterior import exact as ex
from tiltlm.posterior.values import Tree, soft_backup
from tiltlm.protocols import Claim
from tiltlm.records import POLICY_FIELDS, Forward
from tiltlm.testing.check import TOLERANCE, Check
from tiltlm.testing.fixtures import Language, policy_with_law, posterior_policy, small_language
from tiltlm.testing.values import value_checks

GROUPS = (2, 3)
"""Completions a prompt for which all tuples are listed."""
FALLING = (2, 4)
"""The same, where a bias of order 1/n is measured."""
FIRST, LATER, KNOWN = "", ", later visit", ", log Z known"
"""What a state that estimates log Z from the draws has seen of a prompt: nothing, one earlier draw, or as good as all."""


def _jensen_shannon(log_q: Tensor, log_p: Tensor) -> Tensor:
    middle = torch.logaddexp(log_q, log_p) - math.log(2)
    return (log_q.exp() * (log_q - middle) + log_p.exp() * (log_p - middle)).sum() / 2


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "KL(q||p*)": lambda log_q, log_p: (log_q.exp() * (log_q - log_p)).sum(),
    "KL(p*||q)": lambda log_q, log_p: -(log_p.exp() * log_q).sum(),
    "JS(q,p*)": _jensen_shannon,
    "TV(q,p*)": lambda log_q, log_p: (log_q.exp() - log_p.exp()).abs().sum() / 2,
    "chi2(p*||q)": lambda log_q, log_p: (2 * log_p - log_q).exp().sum(),
}
"""Objectives whose gradient the suite knows, as functions of (log q, log p*)."""


def training_checks(engine: Any) -> Iterator[Check]:
    """Every check that a training engine's claim calls for."""
    claim: Claim = engine.claim
    if not claim.needs <= POLICY_FIELDS:
        yield from value_checks(engine)
        return
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    if claim.fixed_point == "p*":
        yield from _posterior_checks(engine, world, exact)
    else:
        yield from _other_law_checks(engine, world, exact)


# --- p* ---


def _posterior_checks(engine: Any, world: Language, exact: ex.Exact) -> Iterator[Check]:
    claim: Claim = engine.claim
    optimum = posterior_policy(world)
    for when in (KNOWN, LATER) if _estimates_log_z(engine, world) else ():
        yield from _later_checks(engine, world, exact, when)
    for whose, behaviour in _behaviours(claim, world, exact, optimum):
        if claim.bias == "1/n":
            pull = partial(_pull, engine, world, optimum, exact, behaviour)
            yield _falling_check(pull, _sizes(claim), f"expected gradient at p*, draws of {whose}")
            continue
        for group in GROUPS:
            there = _Enumeration(_sized(engine, group), world, optimum, exact, behaviour)
            yield Check(f"expected gradient vanishes at p*, draws of {whose}, group {group}", there.pull, TOLERANCE)
            if claim.bias == "none" and claim.zero_variance and whose == "the policy":
                name = f"every draw's signal vanishes at p*, group {group}"
                yield Check(name, there.largest_signal, TOLERANCE)
    for group in GROUPS:
        yield _attraction_check(engine, world, exact, group)
    if claim.objective in OBJECTIVES and claim.bias != "unknown":
        yield from _gradient_checks(engine, world, exact)


def _later_checks(engine: Any, world: Language, exact: ex.Exact, when: str) -> Iterator[Check]:
    """The same as at a prompt's first visit, when its log Z has been estimated from another law's draws; and in the end."""
    claim: Claim = engine.claim
    optimum = posterior_policy(world)
    for whose, behaviour in _behaviours(claim, world, exact, optimum):
        pull = partial(_pull, engine, world, optimum, exact, behaviour)
        name = f"expected gradient vanishes at p*, draws of {whose}{when}"
        yield _error_check(claim, pull, _sizes(claim, when), name)
    yield _attraction_check(engine, world, exact, *_sizes(claim, when)[0], when)
    if claim.objective in OBJECTIVES and claim.bias != "unknown":
        yield from _gradient_checks(engine, world, exact, when)


def _attraction_check(
    engine: Any, world: Language, exact: ex.Exact, group: int, seen: int | None = 0, when: str = FIRST
) -> Check:
    """A step from the prior along the expected gradient goes towards p*: p* attracts, it does not only stand still."""
    policy = world.prior.policy(lora=None)
    got = _Enumeration(_sized(engine, group), world, policy, exact, exact.scored.log_prior, seen=seen).gradient
    truth = ex.reverse_kl_gradient(policy, exact)
    a, b = (torch.cat([gradient[name].flatten() for name in truth]) for gradient in (got, truth))
    cosine = float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))
    name = f"goes towards p* (minus the cosine with the gradient of KL(q||p*)), group {group}{when}"
    return Check(name, -cosine, -0.05)


def _gradient_checks(engine: Any, world: Language, exact: ex.Exact, when: str = FIRST) -> Iterator[Check]:
    """Away from p*: the expected gradient is the objective's, and no offset of a prompt's reward changes it."""
    claim: Claim = engine.claim
    policy = world.prior.policy(lora=None)
    with torch.no_grad():  # neither the prior nor p*
        for weight in policy.named_parameters().values():
            weight.add_(0.3 * torch.arange(weight.numel(), dtype=weight.dtype).view_as(weight).cos())
    truth = ex.reverse_kl_gradient(policy, exact, OBJECTIVES[claim.objective])
    for whose, behaviour in _behaviours(claim, world, exact, policy):
        if whose != "the policy" and claim.data not in ("weighted", "prior"):
            continue
        for offset in (0.0, 3.0) if when == FIRST else (0.0,):
            name = f"expected gradient is that of {claim.objective}, draws of {whose}, reward offset {offset:g}{when}"
            error = partial(_deviation, engine, world, policy, exact, behaviour, offset, truth)
            yield _error_check(claim, error, _sizes(claim, when), name)


Size = tuple[int, int | None]
"""Where an error is measured: completions a prompt, and draws that the state has seen before; None where it knows log Z."""

ErrorAt = Callable[[int, int | None], float]
"""The same -> error."""


def _sizes(claim: Claim, when: str = FIRST) -> list[Size]:
    groups = {FIRST: GROUPS, LATER: GROUPS[:1], KNOWN: GROUPS[:1]}[when]
    if claim.bias == "1/n":
        groups = GROUPS if when == LATER else FALLING
    return [(group, {FIRST: 0, LATER: 1, KNOWN: None}[when]) for group in groups]


def _pull(
    engine: Any, world: Language, policy: Any, exact: ex.Exact, behaviour: Tensor, group: int, seen: int | None
) -> float:
    return _Enumeration(_sized(engine, group), world, policy, exact, behaviour, seen=seen).pull


def _deviation(
    engine: Any,
    world: Language,
    policy: Any,
    exact: ex.Exact,
    behaviour: Tensor,
    offset: float,
    truth: dict[str, Tensor],
    group: int,
    seen: int | None,
) -> float:
    got = _Enumeration(_sized(engine, group), world, policy, exact, behaviour, offset, seen).gradient
    return _distance(got, truth)


def _error_check(claim: Claim, error: ErrorAt, sizes: list[Size], name: str) -> Check:
    """No error, or one that falls, as the claim says."""
    if claim.bias == "1/n":
        return _falling_check(error, sizes, name)
    return Check(name, max(error(*size) for size in sizes), TOLERANCE)


def _falling_check(error: ErrorAt, sizes: list[Size], name: str) -> Check:
    """An error of order 1/n: the measured slope in log n is about -1; no error at all is as good."""
    few, many = sizes
    low = error(*few)
    slope = math.log(error(*many) / low) / math.log(many[0] / few[0]) if low > TOLERANCE else -math.inf
    return Check(f"{name}: error falls like 1/n (slope in n)", slope, -0.5)


# --- other laws ---


def _other_law_checks(engine: Any, world: Language, exact: ex.Exact) -> Iterator[Check]:
    """An engine that settles elsewhere: not at p*, and, if it can say where, there."""
    claim: Claim = engine.claim
    optimum = posterior_policy(world)
    for group in GROUPS:
        sized = _sized(engine, group)
        for whose, behaviour in _behaviours(claim, world, exact, optimum):
            # A modest claim must be an honest one too: say p* if it is p*.
            pull = _Enumeration(sized, world, optimum, exact, behaviour).pull
            yield Check(f"p* is not stationary, draws of {whose}, group {group}", TOLERANCE / max(pull, 1e-300), 1e-3)
    if claim.fixed_point == "data" or hasattr(engine, "settles_at"):
        yield from _settling_checks(engine, world, exact)


def _settling_checks(engine: Any, world: Language, exact: ex.Exact) -> Iterator[Check]:
    claim: Claim = engine.claim
    errors: dict[str, dict[int, float]] = {}
    for group in FALLING if claim.bias == "1/n" else GROUPS:
        sized = _sized(engine, group)
        log_law = _lagged(world, exact).sum(-1) if claim.fixed_point == "data" else sized.settles_at(exact)
        if log_law is None:
            return
        settled = policy_with_law(world, log_law)
        for whose, behaviour in _behaviours(claim, world, exact, settled):
            pull = _Enumeration(sized, world, settled, exact, behaviour).pull
            errors.setdefault(whose, {})[group] = pull
    for whose, pulls in errors.items():
        name = f"expected gradient vanishes at {claim.fixed_point}, draws of {whose}"
        if claim.bias == "1/n":
            yield _falling_check(lambda group, seen, pulls=pulls: pulls[group], _sizes(claim), name)
            continue
        for group, pull in pulls.items():
            yield Check(f"{name}, group {group}", pull, 1e3 * TOLERANCE)


# --- enumeration ---


def _sized(engine: Any, group: int) -> Any:
    return replace(engine, group=group)


def _behaviours(claim: Claim, world: Language, exact: ex.Exact, policy: Any) -> list[tuple[str, Tensor]]:
    """The laws that draw: whose, and the log-probability of every completion's tokens (K, T)."""
    if claim.data == "prior":
        return [("the prior", exact.scored.log_prior)]
    if claim.fixed_point == "data":
        return [("the data", _lagged(world, exact))]
    own = ("the policy", _token_log_prob(policy, exact))
    return [own] if claim.data == "on-policy" else [own, ("another law", _lagged(world, exact))]


def _lagged(world: Language, exact: ex.Exact) -> Tensor:
    """A law with the prior's support that is neither the prior nor p*."""
    policy = world.prior.policy(lora=None)
    with torch.no_grad():
        for weight in policy.named_parameters().values():
            weight.add_(0.7 * torch.arange(weight.numel(), dtype=weight.dtype).view_as(weight).sin())
    return _token_log_prob(policy, exact)


def _token_log_prob(policy: Any, exact: ex.Exact) -> Tensor:
    return policy.log_prob(replace(exact.scored.draws, sampler="")).double()


@dataclass(frozen=True)
class _Tables:
    """Every completion's numbers: what a pass of the policy gives, and the evidence."""

    forward: Forward
    scored: Any


class _Enumeration:
    """All tuples of `engine.group` draws of a law: what the engine's loss wants of a policy.

    The state's log Z is put at the truth, and so are the values of prefixes: what is examined is the policy. But a log Z that is
    estimated from the draws is taken as it is in use: it has `seen` draws of another law (None: it is at the truth), and
    observes each batch before its loss.

    Attributes:
        coefficients: expected derivative of the loss with respect to each field of `Forward` (K, T).
        gradient: the same with respect to the policy's weights.
        pull: the largest entry of the expected derivatives: of the policy's weights, the values and the state's weights.
        largest_signal: the largest derivative of any tuple.
    """

    def __init__(
        self,
        engine: Any,
        world: Language,
        policy: Any,
        exact: ex.Exact,
        behaviour: Tensor,
        offset: float = 0.0,
        seen: int | None = 0,
    ) -> None:
        tables = _tables(engine, policy, exact, behaviour, offset)
        states = _states(engine, world, exact, tables.scored, offset, seen)
        fields = [name for name, value in vars(tables.forward).items() if value is not None]
        self.coefficients = {name: torch.zeros_like(getattr(tables.forward, name)) for name in fields}
        self.largest_signal = 0.0
        own = states[0].weights
        of_state = [torch.zeros_like(p) for p in own]
        for index, share, batch, state in _batches(engine, tables.scored, behaviour, states):
            leaves = {name: getattr(tables.forward, name)[index].clone().requires_grad_() for name in fields}
            loss, _ = engine.loss(Forward(**leaves), batch, state)
            signals = torch.autograd.grad(loss, [*leaves.values(), *own], allow_unused=True)
            for name, signal in zip(fields, signals, strict=False):
                if signal is not None:
                    self.coefficients[name].index_add_(0, index, signal * share)
                    self.largest_signal = max(self.largest_signal, float(signal.abs().max()))
            for total, signal in zip(of_state, signals[len(fields) :], strict=True):
                if signal is not None:
                    total.add_(signal * share)
        of_policy = {name: value for name, value in self.coefficients.items() if name in ("log_q", "kl")}
        self.gradient = ex.expected_gradient(policy, exact, of_policy)
        beside = [_by_state(exact, self.coefficients[name]) for name in fields if name not in of_policy]
        self.pull = max(float(value.abs().max()) for value in [*self.gradient.values(), *beside, *of_state])


def _batches(
    engine: Any, scored: Any, behaviour: Tensor, states: list[_Start]
) -> Iterator[tuple[Tensor, float, Any, Any]]:
    """Every tuple of draws with every state that it may find: rows, probability, draws, and the state for their loss."""
    probability = behaviour.sum(-1).exp()
    for rows in itertools.product(range(len(probability)), repeat=engine.group):
        index = torch.tensor(rows)
        share = float(probability[index].prod())
        if share == 0:
            continue
        batch = scored.select(index)
        for state in states:
            yield index, share * state.share, batch, state.at(batch)


def _by_state(exact: ex.Exact, values: Tensor) -> Tensor:
    """Sums over the completions that share the text so far: what is wanted of one entry of a table of values."""
    number: dict[tuple[int, ...], int] = {}
    rows = [[number.setdefault(x[:t], len(number)) for t in range(len(x))] for x in exact.completions]
    parts = [values[row, : len(states)] for row, states in enumerate(rows)]
    index = torch.tensor([state for states in rows for state in states])
    return torch.zeros(len(number), dtype=values.dtype).index_add_(0, index, torch.cat(parts))


def _tables(engine: Any, policy: Any, exact: ex.Exact, behaviour: Tensor, offset: float) -> _Tables:
    draws = replace(exact.scored.draws, sampler="")
    needs = engine.claim.needs
    with torch.no_grad():
        forward = policy.forward(draws, needs - {"values"})
    known = {name: value.double() for name, value in vars(forward).items() if value is not None}
    if "values" in needs:
        values = engine.values_at(exact) if hasattr(engine, "values_at") else _values(exact)
        known["values"] = values + offset * draws.mask
    scored = replace(
        exact.scored, draws=replace(draws, log_q=behaviour), log_evidence=exact.scored.log_evidence + offset
    )
    return _Tables(Forward(**known), scored)


def _values(exact: ex.Exact) -> Tensor:
    """V*(s_t) in nats for every completion and position."""
    tree = Tree(exact)
    values = soft_backup(tree.by_state(tree.log_prior), tree.by_state(tree.fixed_point(soft_backup)))
    return tree.completions(values[tree.state_of])


@dataclass(frozen=True)
class _Start:
    """A state that a batch may find, and how probably.

    Attributes:
        buffers: what it holds then; None for a state that is left alone.
    """

    engine: Any
    state: Any
    share: float = 1.0
    buffers: dict[str, Tensor] | None = None

    @property
    def weights(self) -> list[Tensor]:
        """What is trained of it."""
        return list(self.state.parameters()) if isinstance(self.state, nn.Module) else []

    def at(self, batch: Any) -> Any:
        """The state for the loss of a batch, which it has observed, as in `fit`, where it learns in use."""
        if self.buffers is not None:
            self.state.load_state_dict(self.buffers)
            self.engine.observe(batch, self.state)
        return self.state


def _states(
    engine: Any, world: Language, exact: ex.Exact, scored: Any, offset: float, seen: int | None
) -> list[_Start]:
    """The state at the truth; or all that an earlier batch of `seen` draws of another law may have made of it."""
    if seen is None or not _estimates_log_z(engine, world):
        return [_Start(engine, _state_at_truth(engine, world, exact, scored, offset))]
    law = _lagged(world, exact)
    earlier, log_law = replace(scored, draws=replace(scored.draws, log_q=law)), law.sum(-1)
    found: list[_Start] = []
    for rows in itertools.product(range(len(law)), repeat=seen):
        index = torch.tensor(rows, dtype=torch.long)
        state = engine.init(world.prompts).double()
        if seen:
            engine.observe(earlier.select(index), state)
        buffers = {name: value.clone() for name, value in state.state_dict().items()}
        found.append(_Start(engine, state, float(log_law[index].sum().exp()), buffers))
    return found


def _estimates_log_z(engine: Any, world: Language) -> bool:
    """Whether the engine's state has a log Z that it takes from the draws, and does not train."""
    state = engine.init(world.prompts)
    return isinstance(state, nn.Module) and hasattr(state, "log_z") and not list(state.parameters())


def _state_at_truth(engine: Any, world: Language, exact: ex.Exact, scored: Any, offset: float) -> Any:
    state = engine.init(world.prompts)
    if isinstance(state, nn.Module):
        state = state.double()
        if hasattr(state, "log_z"):
            with torch.no_grad():
                state.log_z.fill_(exact.log_z + offset)  # pyright: ignore[reportCallIssue]
        if hasattr(engine, "rest"):
            engine.rest(exact, state)
    elif hasattr(engine, "observe"):
        engine.observe(scored, state)
    return state


def _distance(gradient: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest difference relative to the largest entry of the truth."""
    largest = max(float(value.abs().max()) for value in truth.values())
    return max(float((gradient[n] - truth[n]).abs().max()) for n in truth) / largest
