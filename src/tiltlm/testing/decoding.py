"""A decoding engine's claim, proved or refuted: its law over all tuples of proposals, and that `sample` follows it."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from scipy.stats import chi2 as chi_squared
from scipy.stats import norm
from torch import Generator, Tensor

from tiltlm.errors import InputError, TiltWarning
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.records import Draws, Scored
from tiltlm.testing.check import TOLERANCE, Check
from tiltlm.testing.fixtures import Language, language, small_language
from tiltlm.testing.kernels import kernel_checks, law_after
from tiltlm.testing.particles import ALWAYS, Every, another_law, particle_checks, rough_twist
from tiltlm.weights import group_count, normalise, resample

REPETITIONS = 6000
POPULATIONS = 600
"""Outputs whose average is compared with p* where another proposal draws."""
SIGNIFICANCE = 1e-4
"""Of the statistical checks, that `sample` follows the law that was enumerated and of its log Z; their seed is fixed."""


def decoding_checks(engine: Any) -> Iterator[Check]:
    """Every check that a decoding engine's claim calls for."""
    if hasattr(engine, "particles"):
        yield from particle_checks(engine)
        yield _particle_sampling_check(engine)
    elif hasattr(engine, "log_acceptance"):
        yield from kernel_checks(engine)
        yield _chain_sampling_check(engine)
    else:
        yield from _choice_checks(engine)


def _choice_checks(engine: Any) -> Iterator[Check]:
    """Of an engine that weights independent draws."""
    claim: Claim = engine.claim
    for world, ties in ((small_language(), False), (_with_ties(), True)):
        exact = ex.posterior(world.target, world.prompts)
        ready = _with_value(engine, world, exact)
        if hasattr(engine, "selection"):
            yield from _law_checks(ready, world, exact, claim)
        if not ties or claim.fixed_point == "best-of-n":  # others do not compare rewards
            yield _sampling_check(ready, world, exact)
    if not hasattr(engine, "value"):  # which is its proposal
        yield from _proposal_checks(engine, small_language(), claim)
    yield from _evidence_checks(engine)


def _with_value(engine: Any, world: Language, exact: ex.Exact) -> Any:
    """The engine with a critic, where it needs one and has none: a law that is not p*."""
    return replace(engine, value=another_law(world, exact)) if hasattr(engine, "value") else engine


def _drawn_by(engine: Any, exact: ex.Exact) -> Tensor:
    """log-probabilities (K, T) of every completion's tokens under the law that the engine draws from."""
    if getattr(engine, "value", None) is None:
        return exact.scored.log_prior.double()
    return engine.value.log_prob(replace(exact.scored.draws, sampler="")).double()


def _particle_sampling_check(engine: Any) -> Check:
    """`sample` on two particles against the law of all its runs."""
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    sized = replace(engine, particles=2, twist=rough_twist(exact), threshold=ALWAYS, repeats=1)
    return _sampling_check(sized, world, exact, Every(sized, world, exact, world.prior).law)


def _chain_sampling_check(engine: Any) -> Check:
    """`sample` on short chains against the law that so many steps of the kernel lead to."""
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    sized = replace(engine, chains=1, steps=2, warmup=1)
    return _sampling_check(sized, world, exact, law_after(sized, world, exact))


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
        many = replace(engine, n=32) if hasattr(engine, "n") else engine
        prompts = world.prompts.select([0] * POPULATIONS)
        weighted = many.sample(world.target, prompts, proposal=proposal, rng=Generator().manual_seed(2))
    except InputError:
        return
    law = torch.zeros(len(exact.completions), dtype=torch.float64)
    share = normalise(weighted.log_w.double(), weighted.scored.draws.prompt_index, POPULATIONS) / POPULATIONS
    law.index_add_(0, _which(weighted.scored.draws, exact), share)
    distance = float((law - exact.log_posterior.exp()).abs().sum() / 2)
    yield Check("with another proposal: total variation of the weighted draws from p*", distance, 0.06)


def _evidence_checks(engine: Any) -> Iterator[Check]:
    """What an estimate of log Z says it is in expectation, a lower bound, an upper one or log Z itself, where heavy draws are rare."""
    world = _with_a_rare_reward()
    exact = ex.posterior(world.target, world.prompts)
    ready = _with_value(engine, world, exact)
    sized = replace(ready, n=64) if hasattr(ready, "n") else ready
    weighted = sized.sample(world.target, world.prompts.select([0] * POPULATIONS), rng=Generator().manual_seed(3))
    if weighted.log_z is None:
        return
    gap = torch.tensor([estimate.value for estimate in weighted.log_z], dtype=torch.float64) - exact.log_z
    above = float(gap.mean() / (gap.std() / math.sqrt(len(gap))).clamp(min=TOLERANCE))
    error, name = {
        "lower": (above, "at most log Z"),
        "upper": (-above, "at least log Z"),
        "point": (abs(above), "log Z"),
    }[weighted.log_z[0].kind]
    yield Check(f"log_z is {name} on average (standard errors beyond)", error, float(norm.isf(SIGNIFICANCE)))


def _with_a_rare_reward() -> Language:
    """Three completions, of which one has a tenth of the prior and nearly all of the posterior."""
    return language(
        lambda prompt, prefix: [math.log(0.45), math.log(0.45), math.log(0.1)],
        lambda x: float(x[0] == 2),
        beta=0.1,
        bounds=(0.0, 1.0),
        depth=1,
    )


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
    elif hasattr(engine, "settles_at"):
        for n, law in laws.items():
            named = engine.settles_at(exact).exp()
            yield Check(f"law is the {claim.fixed_point} law that it names, {n} proposals", _gap(law, named), TOLERANCE)


def enumerated_law(engine: Any, world: Language, exact: ex.Exact) -> Tensor:
    """The law of an engine's output, by listing all tuples of the `engine.n` draws it makes; conditional on there being one."""
    log_q = _drawn_by(engine, exact)
    draws: Draws = replace(exact.scored.draws, log_q=log_q, sampler="")
    tuples = torch.tensor(list(itertools.product(range(len(draws)), repeat=engine.n)))
    probability = log_q.sum(-1).exp()[tuples].prod(-1)
    flat = tuples.flatten()
    owner = torch.arange(len(tuples)).repeat_interleave(engine.n)
    prompts = draws.prompts.select([0] * len(tuples))
    chosen: Scored = replace(exact.scored, draws=draws).select(flat)
    chosen = replace(chosen, draws=replace(chosen.draws, prompts=prompts, prompt_index=owner))
    share = engine.selection(world.target, chosen).double() * probability[owner]
    law = torch.zeros(len(draws), dtype=torch.float64).index_add_(0, flat, share)
    return law / law.sum()


def _gap(law: Tensor, truth: Tensor) -> float:
    return float((law - truth).abs().max())


def _sampling_check(engine: Any, world: Language, exact: ex.Exact, law: Tensor | None = None) -> Check:
    """Pearson's chi-squared test of many independent outputs of `sample` against the law that is claimed."""
    sized = replace(engine, n=4) if hasattr(engine, "n") else engine
    law = _claimed_law(sized, world, exact) if law is None else law
    prompts = world.prompts.select([0] * REPETITIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TiltWarning)  # so few particles or steps deserve one
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
