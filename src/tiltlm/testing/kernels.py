"""MCMC's claim, proved or refuted: the whole kernel matrix, and its stationary law."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.inference.decoding.kernels import edited
from tiltlm.posterior import exact as ex
from tiltlm.records import Draws
from tiltlm.testing.check import Check, ClaimRefuted
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


@dataclass(frozen=True)
class Transitions:
    """Every way in which a kernel takes a completion to another, one a row.

    Attributes:
        here, there: the completions' numbers.
        probability: of being proposed that way.
        log_ratio: what the kernel says of the way back.
    """

    here: Int[Tensor, " N"]
    there: Int[Tensor, " N"]
    probability: Float[Tensor, " N"]
    log_ratio: Float[Tensor, " N"]


def kernel_matrix(engine: Any, exact: ex.Exact, log_q: Float[Tensor, "K T"]) -> Float[Tensor, "K K"]:
    """The probability that one step of the engine takes each completion (row) to each other (column).

    The engine's own kernel and `log_acceptance` are used.

    Args:
        log_q: log-probabilities of every completion's tokens under the proposal.
    """
    count = len(exact.completions)
    scored = replace(exact.scored, draws=replace(exact.scored.draws, log_q=log_q, sampler=""))
    ways = transitions(engine.kernel, exact.completions, scored.draws)
    accept = (
        engine.log_acceptance(scored.select(ways.here), scored.select(ways.there), ways.log_ratio).clamp(max=0).exp()
    )
    kernel = torch.zeros(count, count, dtype=torch.float64)
    kernel.index_put_((ways.here, ways.there), ways.probability * accept, accumulate=True)
    return kernel + torch.diag(1 - kernel.sum(-1))


def transitions(kernel: Any, completions: Sequence[tuple[int, ...]], draws: Draws) -> Transitions:
    """All that a kernel may propose: by where it cuts, by its edits, or by those that it mixes.

    Args:
        draws: the completions with their log-probabilities under the proposal.

    Raises:
        ClaimRefuted: for a kernel that says none of this.
    """
    if hasattr(kernel, "kernels"):
        parts = [transitions(part, completions, draws) for part in kernel.kernels]
        weighed = [share * part.probability for share, part in zip(kernel.shares, parts, strict=True)]
        joined = (torch.cat([getattr(part, name) for part in parts]) for name in ("here", "there", "log_ratio"))
        here, there, log_ratio = joined
        return Transitions(here, there, torch.cat(weighed), log_ratio)
    if hasattr(kernel, "cut"):
        return _redraws(kernel, completions, draws)
    if hasattr(kernel, "edits"):
        return _edits(kernel, completions, draws)
    raise ClaimRefuted(f"{type(kernel).__name__} has neither cut() nor edits(): what it proposes cannot be listed")


def _redraws(kernel: Any, completions: Sequence[tuple[int, ...]], draws: Draws) -> Transitions:
    """The kernel's own `cut` is used at the middles of the cells on which it is constant."""
    cells = math.lcm(*range(1, max(map(len, completions)) + 1))
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    here, there, probability = [], [], []
    for x, completion in enumerate(completions):
        keep = kernel.cut(torch.full((cells,), len(completion)), middles)
        for cut, times in zip(*(part.tolist() for part in keep.unique(return_counts=True)), strict=True):
            alike = [y for y, other in enumerate(completions) if other[:cut] == completion[:cut]]
            here += [x] * len(alike)
            there += alike
            probability += (draws.log_q[alike, cut:].sum(-1).exp() * times / cells).tolist()
    rows, columns = torch.tensor(here), torch.tensor(there)
    ratio = kernel.log_ratio(draws.select(rows), draws.select(columns))
    return Transitions(rows, columns, torch.tensor(probability, dtype=torch.float64), ratio)


def _edits(kernel: Any, completions: Sequence[tuple[int, ...]], draws: Draws) -> Transitions:
    """Every edit, with every token that the masked model may put there. What leads out of the support is not accepted."""
    number, longest = {x: k for k, x in enumerate(completions)}, max(map(len, completions))
    here, there, probability, ratios = [], [], [], []
    every = [(x, edit) for x, completion in enumerate(completions) for edit in kernel.edits(completion, longest)]
    index = draws.prompt_index[[x for x, _ in every]].tolist()
    laws = kernel.log_fill(draws.prompts, index, [completions[x] for x, _ in every], [edit for _, edit in every])
    for (x, edit), log_m in zip(every, laws, strict=True):
        tokens = [0] if edit.kind == "delete" else log_m.isfinite().nonzero().flatten().tolist()
        for token in tokens:
            new = edited(completions[x], edit, token)
            if tuple(new) in number:
                here.append(x)
                there.append(number[tuple(new)])
                chosen = 1.0 if edit.kind == "delete" else float(log_m[token].exp())
                probability.append(edit.probability * chosen)
                ratios.append(kernel.log_ratio(log_m[None], [completions[x]], [new], [edit]))
    rows, columns = torch.tensor(here), torch.tensor(there)
    return Transitions(rows, columns, torch.tensor(probability, dtype=torch.float64), torch.cat(ratios))


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
