"""MCMC's claim, proved or refuted: the whole kernel matrix, and its stationary law."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.posterior import exact as ex
from tiltlm.testing.check import Check
from tiltlm.testing.fixtures import Language, fixture_b, small_language
from tiltlm.testing.particles import another_law

STATIONARY = 1e-12


def kernel_checks(engine: Any) -> Iterator[Check]:
    """p* is the stationary law of the engine's kernel, from the prior and from another proposal."""
    for world in (small_language(), fixture_b()):
        exact = ex.posterior(world.target, world.prompts)
        for whose, proposal in (("the prior", world.prior), ("another proposal", another_law(world, exact))):
            kernel = kernel_matrix(engine, exact, _token_log_prob(proposal, exact))
            error = float((stationary_law(kernel) - exact.log_posterior.exp()).abs().sum() / 2)
            name = f"{len(exact.completions)} strings, proposals of {whose}"
            yield Check(f"total variation of the stationary law from p*, {name}", error, STATIONARY)


def kernel_matrix(engine: Any, exact: ex.Exact, log_q: Float[Tensor, "K T"]) -> Float[Tensor, "K K"]:
    """The probability that one step of the engine takes each completion (row) to each other (column).

    The engine's own `cut` and `log_acceptance` are used: the first at the middles of the cells on which it is constant.

    Args:
        log_q: log-probabilities of every completion's tokens under the proposal.
    """
    completions = exact.completions
    count, longest = len(completions), max(map(len, completions))
    cells = math.lcm(*range(1, longest + 1))
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    here, there, probability = [], [], []
    for x, completion in enumerate(completions):
        keep = engine.cut(torch.full((cells,), len(completion)), middles)
        for cut, times in zip(*(part.tolist() for part in keep.unique(return_counts=True)), strict=True):
            alike = [y for y, other in enumerate(completions) if other[:cut] == completion[:cut]]
            here += [x] * len(alike)
            there += alike
            probability += (log_q[alike, cut:].sum(-1).exp() * times / cells).tolist()
    rows, columns = torch.tensor(here), torch.tensor(there)
    draws = exact.scored.draws
    scored = replace(exact.scored, draws=replace(draws, log_q=log_q, sampler=""))
    accept = engine.log_acceptance(scored.select(rows), scored.select(columns)).clamp(max=0).exp()
    moved = torch.tensor(probability, dtype=torch.float64) * accept
    kernel = torch.zeros(count, count, dtype=torch.float64)
    kernel.index_put_((rows, columns), moved, accumulate=True)
    return kernel + torch.diag(1 - kernel.sum(-1))


def stationary_law(kernel: Float[Tensor, "K K"]) -> Float[Tensor, " K"]:
    """The law that a step leaves as it is."""
    count = len(kernel)
    system = torch.cat([kernel.T - torch.eye(count, dtype=kernel.dtype), torch.ones(1, count, dtype=kernel.dtype)])
    right = torch.zeros(count + 1, 1, dtype=kernel.dtype)
    right[-1] = 1
    return torch.linalg.lstsq(system, right).solution[:, 0]


def law_after(engine: Any, world: Language, exact: ex.Exact) -> Float[Tensor, " K"]:
    """The law of one of the states that the engine returns, its chains started from the prior."""
    kernel = kernel_matrix(engine, exact, _token_log_prob(world.prior, exact))
    law, total = exact.log_prior.exp(), torch.zeros(len(kernel), dtype=torch.float64)
    for step in range(engine.warmup + engine.steps):
        law = law @ kernel
        if step >= engine.warmup:
            total += law
    return total / engine.steps


def _token_log_prob(proposal: Any, exact: ex.Exact) -> Float[Tensor, "K T"]:
    return proposal.log_prob(replace(exact.scored.draws, sampler="")).double()
