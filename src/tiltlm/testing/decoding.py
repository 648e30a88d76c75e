"""A decoding engine's claim, proved or refuted: its law over all tuples of proposals, and that `sample` follows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from scipy.stats import chi2 as chi_squared
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.records import Draws, Scored
from tiltlm.testing.check import TOLERANCE, Check
from tiltlm.testing.fixtures import Language, small_language
from tiltlm.weights import group_count, resample

REPETITIONS = 6000
SIGNIFICANCE = 1e-4
"""Of the statistical check that `sample` follows the law that was enumerated; its seed is fixed."""


def decoding_checks(engine: Any) -> Iterator[Check]:
    """Every check that a decoding engine's claim calls for."""
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
