"""The conformance suite: an engine's claim, proved or refuted by enumeration on a tabular model in float64.

Nothing here is sampled where it can be listed: the expected gradient of a training engine is a sum over all tuples
of draws, the law of a decoding engine a sum over all tuples of proposals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import chi2 as chi_squared
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.records import Draws, Forward, Scored
from tiltlm.testing.fixtures import Language, posterior_policy, small_language
from tiltlm.weights import group_count, resample

TOLERANCE = 1e-10
GROUPS = (2, 3)
"""Completions a prompt, and proposals, for which tuples are listed."""
REPETITIONS = 6000
SIGNIFICANCE = 1e-4
"""Of the statistical check that `sample` follows the law that was enumerated; its seed is fixed."""

OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "KL(q||p*)": lambda log_q, log_p: (log_q.exp() * (log_q - log_p)).sum(),
    "KL(p*||q)": lambda log_q, log_p: -(log_p.exp() * log_q).sum(),
}
"""Objectives whose gradient the suite knows, as functions of (log q, log p*)."""


class ClaimRefuted(AssertionError):
    """An engine does not do what its claim says."""


@dataclass(frozen=True)
class Check:
    """One proof or refutation.

    Attributes:
        name: what was compared.
        error: how far the engine is from its claim.
        tolerance: the most that counts as none.
    """

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{'ok ' if self.passed else 'NOT'} {self.name}: {self.error:.2e} (at most {self.tolerance:.0e})"


def check_engine(engine: Any) -> tuple[Check, ...]:
    """Examine an engine and raise if its claim is refuted.

    Raises:
        ClaimRefuted: with every check that failed.
    """
    checks = examine(engine)
    failed = [check for check in checks if not check.passed]
    if failed:
        claim: Claim = engine.claim
        lines = "\n".join(f"  {check}" for check in failed)
        raise ClaimRefuted(
            f"{type(engine).__name__} claims fixed point {claim.fixed_point}, bias {claim.bias}:\n{lines}"
        )
    return checks


def examine(engine: Any) -> tuple[Check, ...]:
    """Every check that the engine's claim calls for. An engine with `loss` trains, one with `sample` decodes."""
    found = tuple(_training_checks(engine) if hasattr(engine, "loss") else _decoding_checks(engine))
    if not found:
        raise ClaimRefuted(f"{type(engine).__name__}: nothing in its claim can be checked: {engine.claim}")
    return found


# --- training engines ---


def _training_checks(engine: Any) -> Iterator[Check]:
    world = small_language()
    claim: Claim = engine.claim
    exact = ex.posterior(world.target, world.prompts)
    optimum = posterior_policy(world)
    for group in GROUPS:
        sized = replace(engine, group=group)
        at_optimum = _Enumeration(sized, world, optimum, exact)
        stationary = _largest(ex.expected_gradient(optimum, exact, at_optimum.expected))
        if claim.fixed_point != "p*":
            # A modest claim must be an honest one too: say p* if it is p*.
            yield Check(f"p* is not stationary, group {group}", TOLERANCE / max(stationary, 1e-300), 1e-3)
            continue
        yield Check(f"expected gradient vanishes at p*, group {group}", stationary, TOLERANCE)
        yield _attraction_check(sized, world, exact)
        if claim.bias == "none":
            yield Check(f"every draw's signal vanishes at p*, group {group}", at_optimum.largest_signal, TOLERANCE)
        if claim.bias == "none" and claim.objective in OBJECTIVES:
            yield from _gradient_checks(sized, world, exact, claim)


def _attraction_check(engine: Any, world: Language, exact: ex.Exact) -> Check:
    """A step from the prior along the expected gradient goes towards p*: p* attracts, it does not only stand still."""
    policy = world.prior.policy(lora=None)
    got = ex.expected_gradient(policy, exact, _Enumeration(engine, world, policy, exact).expected)
    truth = ex.reverse_kl_gradient(policy, exact)
    a, b = (torch.cat([gradient[name].flatten() for name in truth]) for gradient in (got, truth))
    cosine = float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))
    return Check(
        f"goes towards p* (minus the cosine with the gradient of KL(q||p*)), group {engine.group}", -cosine, -0.05
    )


def _gradient_checks(engine: Any, world: Language, exact: ex.Exact, claim: Claim) -> Iterator[Check]:
    """Away from p*: the expected gradient is the objective's, and no offset of a prompt's reward changes it."""
    policy = world.prior.policy(lora=None)
    truth = ex.reverse_kl_gradient(policy, exact, OBJECTIVES[claim.objective])
    for offset in (0.0, 3.0):
        expected = _Enumeration(engine, world, policy, exact, offset).expected
        error = _distance(ex.expected_gradient(policy, exact, expected), truth)
        name = f"expected gradient is that of {claim.objective}, group {engine.group}, reward offset {offset:g}"
        yield Check(name, error, TOLERANCE)


class _Enumeration:
    """All tuples of `engine.group` draws of a policy: what the engine's loss wants of each log-probability.

    Attributes:
        expected: expected coefficient of each completion's token log-probabilities (K, T).
        largest_signal: the largest coefficient of any tuple.
    """

    def __init__(self, engine: Any, world: Language, policy: Any, exact: ex.Exact, offset: float = 0.0) -> None:
        draws = replace(exact.scored.draws, sampler="")
        log_q = policy.log_prob(draws).double()
        scored = replace(
            exact.scored, draws=replace(draws, log_q=log_q), log_evidence=exact.scored.log_evidence + offset
        )
        kl = policy.token_kl(draws).double() if "kl" in engine.claim.needs else None
        state = engine.init(world.prompts)
        probability = log_q.sum(-1).exp()
        self.expected = torch.zeros_like(log_q)
        self.largest_signal = 0.0
        for rows in itertools.product(range(len(draws)), repeat=engine.group):
            index = torch.tensor(rows)
            leaf = log_q[index].clone().requires_grad_()
            forward = Forward(leaf, None if kl is None else kl[index])
            loss, _ = engine.loss(forward, scored.select(index), state)
            (signal,) = torch.autograd.grad(loss, leaf)
            self.expected.index_add_(0, index, signal * probability[index].prod())
            self.largest_signal = max(self.largest_signal, float(signal.abs().max()))


def _largest(gradient: dict[str, Tensor]) -> float:
    return max(float(value.abs().max()) for value in gradient.values())


def _distance(gradient: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest difference relative to the largest entry of the truth."""
    return max(float((gradient[n] - truth[n]).abs().max()) for n in truth) / _largest(truth)


# --- decoding engines ---


def _decoding_checks(engine: Any) -> Iterator[Check]:
    claim: Claim = engine.claim
    for world in (small_language(), _with_ties()):
        exact = ex.posterior(world.target, world.prompts)
        if hasattr(engine, "selection"):
            yield from _law_checks(engine, world, exact, claim)
        yield _sampling_check(engine, world, exact)
    yield from _proposal_checks(engine, small_language(), claim)


def _proposal_checks(engine: Any, world: Language, claim: Claim) -> Iterator[Check]:
    """With another proposal than the prior: an engine that claims p* corrects for it, or refuses it."""
    if claim.fixed_point != "p*":
        return
    proposal = world.prior.policy(lora=None)
    with torch.no_grad():
        for weight in proposal.named_parameters().values():
            weight.add_(2 * torch.arange(weight.numel(), dtype=weight.dtype).view_as(weight).sin())
    exact = ex.posterior(world.target, world.prompts)
    try:
        many = replace(engine, n=4000) if hasattr(engine, "n") else engine
        weighted = many.sample(world.target, world.prompts, proposal=proposal, rng=Generator().manual_seed(2))
    except InputError:
        return
    law = torch.zeros(len(exact.completions), dtype=torch.float64)
    law.index_add_(0, _which(weighted.scored.draws, exact), torch.softmax(weighted.log_w.double(), 0))
    distance = float((law - exact.log_posterior.exp()).abs().sum() / 2)
    yield Check("with another proposal: total variation of the weighted draws from p*", distance, 0.06)


def _with_ties() -> Language:
    """The small language with rewards rounded, so that many are equal."""
    world = small_language()
    reward = world.target.evidence
    fn = reward.fn  # pyright: ignore[reportAttributeAccessIssue]

    def rounded(completion_ids: list[list[int]]) -> list[float]:
        return [float(round(value)) for value in fn(completion_ids)]

    evidence = replace(reward, fn=rounded)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return Language(replace(world.target, evidence=evidence), world.prompts)


def _law_checks(engine: Any, world: Language, exact: ex.Exact, claim: Claim) -> Iterator[Check]:
    laws = {n: enumerated_law(replace(engine, n=n), world, exact) for n in (2, 3, 4)}
    if claim.fixed_point == "p*" and claim.bias == "none":
        for n, law in laws.items():
            yield Check(
                f"law of an accepted draw is p*, {n} proposals", _gap(law, exact.log_posterior.exp()), TOLERANCE
            )
    elif claim.fixed_point == "p*" and claim.bias == "1/n":
        errors = {n: _gap(law, exact.log_posterior.exp()) for n, law in laws.items()}
        slope = math.log(errors[4] / errors[2]) / math.log(2) if errors[2] > 0 else -math.inf
        yield Check("error of the law falls like 1/n (slope in n, should be about -1)", slope, -0.5)
        first_order = max(abs(float(v)) for v in (4 * (laws[4] - exact.log_posterior.exp())).tolist())
        yield Check(
            "error of the law is of order 1/n",
            first_order,
            4 * float(1 + ex.chi2(exact.log_posterior, exact.log_prior)),
        )
    elif claim.fixed_point == "best-of-n":
        for n, law in laws.items():
            yield Check(
                f"law is that of the best of {n}, ties by order", _gap(law, ex.best_of_n_law(exact, n)), TOLERANCE
            )


def enumerated_law(engine: Any, world: Language, exact: ex.Exact) -> Tensor:
    """The law of an engine's output, by listing all tuples of `engine.n` prior draws; conditional on there being one."""
    draws: Draws = exact.scored.draws
    tuples = torch.tensor(list(itertools.product(range(len(draws)), repeat=engine.n)))
    probability = exact.log_prior.exp()[tuples].prod(-1)
    flat = tuples.flatten()
    owner = torch.arange(len(tuples)).repeat_interleave(engine.n)
    prompts = draws.prompts.select([0] * len(tuples))
    chosen: Scored = exact.scored.select(flat)
    chosen = replace(chosen, draws=replace(chosen.draws, prompts=prompts, prompt_index=owner))
    share = engine.selection(world.target, chosen).double() * probability[owner]
    law = torch.zeros(len(draws), dtype=torch.float64).index_add_(0, flat, share)
    return law / law.sum()


def _gap(law: Tensor, truth: Tensor) -> float:
    return float((law - truth).abs().max())


def _sampling_check(engine: Any, world: Language, exact: ex.Exact) -> Check:
    """Pearson's chi-squared test of many independent outputs of `sample` against the law that is claimed."""
    law = _claimed_law(replace(engine, n=4) if hasattr(engine, "n") else engine, world, exact)
    prompts = world.prompts.select([0] * REPETITIONS)
    sized = replace(engine, n=4) if hasattr(engine, "n") else engine
    weighted = sized.sample(world.target, prompts, rng=Generator().manual_seed(0))
    index = weighted.scored.draws.prompt_index
    chosen = resample(weighted.log_w, index, REPETITIONS, 1, Generator().manual_seed(1))[:, 0]
    found = _which(weighted.scored.draws.select(chosen[chosen >= 0]), exact)
    observed = group_count(found, len(law)).double()
    expected = law * observed.sum()
    statistic = float(((observed - expected).square() / expected.clamp(min=1e-12)).sum())
    quantile = float(chi_squared.isf(SIGNIFICANCE, len(law) - 1))
    return Check(f"sample() follows the law (chi-squared over {int(observed.sum())} outputs)", statistic, quantile)


def _which(draws: Draws, exact: ex.Exact) -> Tensor:
    """The number of each draw in the list of all completions."""
    rows = {completion: k for k, completion in enumerate(exact.completions)}
    return torch.tensor([rows[tuple(t[m].tolist())] for t, m in zip(draws.tokens, draws.mask, strict=True)])


def _claimed_law(engine: Any, world: Language, exact: ex.Exact) -> Tensor:
    claim: Claim = engine.claim
    if claim.fixed_point == "p*" and claim.bias == "none":
        return exact.log_posterior.exp()
    if hasattr(engine, "selection"):
        return enumerated_law(engine, world, exact)
    return exact.log_posterior.exp()
