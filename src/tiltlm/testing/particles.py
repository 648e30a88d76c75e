"""SMC's claim, proved or refuted: every token and every ancestor of a small population, with its probability.

The engine's own `run` is what is gone through. It asks a `Chance` for tokens and ancestors; here the answer is every possible
one, each in a population of its own. Systematic, stratified and residual resampling are integrated over their uniform
numbers, in which they are piecewise constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.inference.decoding.particles import Resample
from tiltlm.inference.decoding.smc import PrefixTwist, Run
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.records import Draws
from tiltlm.target import Target
from tiltlm.testing.check import TOLERANCE, Check
from tiltlm.testing.fixtures import Language, language, policy_with_law, posterior_policy, sine_logit, small_language
from tiltlm.weights import multinomial, normalise

FALLING = (2, 3)
"""Particles of the populations over which a bias of order 1/n is measured."""
ALWAYS = 1.0
SOMETIMES = 0.9
"""Thresholds at which two particles are resampled whenever, or only if, their weights differ enough."""


def particle_checks(engine: Any) -> Iterator[Check]:
    """Every check that an SMC engine's claim calls for."""
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    rough = replace(engine, twist=rough_twist(exact), threshold=SOMETIMES)
    for name, twisted in (("its own twist", replace(engine, threshold=SOMETIMES)), ("a rough twist", rough)):
        for whose, proposal in (("the prior", world.prior), ("another proposal", another_law(world, exact))):
            yield from _measure_checks(replace(twisted, particles=2), world, exact, proposal, f"{name}, {whose}")
    claim: Claim = engine.claim
    laws = {n: Every(replace(rough, particles=n), world, exact, world.prior).law for n in FALLING}
    errors = {n: float((law - exact.log_posterior.exp()).abs().max()) for n, law in laws.items()}
    if claim.bias == "1/n":
        slope = math.log(errors[3] / errors[2]) / math.log(3 / 2) if errors[2] > TOLERANCE else -math.inf
        yield Check("error of the law falls like 1/n (slope in n)", slope, -0.5)
    elif claim.bias == "none":
        yield Check("law of a completion resampled at the end is p*", max(errors.values()), TOLERANCE)
    best = replace(engine, twist=table_twist({h: v / exact.beta for h, v in exact.soft_values().items()}), particles=2)
    found = Every(best, world, exact, posterior_policy(world))
    yield Check("with p* and its values every run gives Z", float((found.run.log_z - exact.log_z).abs().max()), 1e-9)
    deep = three_steps()
    exact = ex.posterior(deep.target, deep.prompts)
    twice = replace(engine, twist=rough_twist(exact), threshold=ALWAYS, particles=2)
    yield from _measure_checks(twice, deep, exact, another_law(deep, exact), "three steps, another proposal")


def _measure_checks(engine: Any, world: Language, exact: ex.Exact, proposal: Any, what: str) -> Iterator[Check]:
    found = Every(engine, world, exact, proposal)
    yield Check(f"E[Z-hat f] = Z E_p*[f] for every f, {what}", found.gap, TOLERANCE)
    if not found.run.resampled.any():
        return
    given = Every(engine, world, exact, proposal, conditional=True)
    inverse = float((given.probability * (exact.log_z - given.run.log_z).exp()).sum())
    yield Check(f"E[Z / Z-hat] = 1 given an exact sample, {what}", abs(inverse - 1), TOLERANCE)
    if engine.resample is multinomial:
        # the two laws are then each other's tilt by Z-hat / Z, so that the bounds hold to the last bit
        tilted = float((found.probability * (found.run.log_z - exact.log_z).exp() * found.run.log_z).sum())
        yield Check(f"E log Z-hat given an exact sample, {what}", abs(given.mean_log_z - tilted), TOLERANCE)
    yield Check(f"E log Z-hat is at most log Z, {what}", found.mean_log_z - exact.log_z, 0.0)
    yield Check(f"E log Z-hat given an exact sample is at least log Z, {what}", exact.log_z - given.mean_log_z, 0.0)


def three_steps() -> Language:
    """Token 0 and EOS = 1, at most three of them: 4 strings, and two chances to resample."""
    return language(
        lambda _, prefix: [sine_logit(prefix, a) for a in range(2)],
        lambda x: math.cos(len(x)) + 0.5 * len(x),
        beta=0.6,
        bounds=(-1.0, 2.0),
        vocab_size=2,
        depth=3,
        eos=1,
    )


class Every:
    """All runs of an engine over one prompt of a language.

    Attributes:
        probability: of each run (K,).
        run: the runs, as populations for K copies of the prompt.
        measure: E[mean_i w_i 1(x_i = x)] of every completion x, which should be pi0(x) exp(r(x) / beta).
        law: of one completion resampled by its weight at the end.
    """

    def __init__(
        self, engine: Any, world: Language, exact: ex.Exact, proposal: Any, *, conditional: bool = False
    ) -> None:
        self._exact = exact
        references = torch.arange(len(exact.completions)) if conditional else torch.zeros(1, dtype=torch.long)
        scheme: Resample = multinomial if conditional else engine.resample
        script = _Script(scheme, engine.particles, references)
        if conditional:
            script.probability = exact.log_posterior.exp()
        while True:
            try:
                copies = world.prompts.select([0] * len(script.probability))
                reference = exact.scored.draws.select(script.references) if conditional else None
                self.run: Run = engine.run(world.target, copies, proposal, script.rewound(), reference)
                break
            except _Asked as asked:
                script = asked.answered
        self.probability = script.probability
        which = torch.tensor([self._number[x] for x in _completions(self.run.scored.draws)])
        index, n = self.run.scored.draws.prompt_index, engine.particles
        copies_of = torch.zeros(len(exact.completions), dtype=torch.float64)
        self.measure = copies_of.index_add(0, which, self.probability[index] * self.run.log_w.exp() / n)
        share = normalise(self.run.log_w, index, len(self.probability))
        self.law = copies_of.index_add(0, which, self.probability[index] * share)

    @property
    def _number(self) -> Mapping[tuple[int, ...], int]:
        return {completion: k for k, completion in enumerate(self._exact.completions)}

    @property
    def gap(self) -> float:
        """Largest error of the measure."""
        return float((self.measure - self._exact.log_joint.exp()).abs().max())

    @property
    def mean_log_z(self) -> float:
        return float((self.probability * self.run.log_z).sum())


class _Asked(Exception):
    """A run came to a choice that the script does not have yet; `answered` is the script with every answer."""

    def __init__(self, answered: _Script) -> None:
        self.answered = answered


class _Script:
    """What chance said so far, for each of K copies of a run."""

    def __init__(self, scheme: Resample, particles: int, references: Int[Tensor, " K"]) -> None:
        self.scheme, self.particles, self.references = scheme, particles, references
        self.probability = torch.ones(len(references), dtype=torch.float64)
        self._said: list[Int[Tensor, "K N"]] = []
        self._place = 0

    def rewound(self) -> _Script:
        self._place = 0
        return self

    def tokens(self, log_probs: Float[Tensor, "B V"], free: Tensor) -> Int[Tensor, " B"]:
        def answers(copy: int) -> dict[tuple[int, ...], float]:
            rows = range(copy * self.particles, (copy + 1) * self.particles)
            slots = [log_probs[row].exp().tolist() if free[row] else [1.0] for row in rows]
            found = {}
            for tokens in itertools.product(*(range(len(slot)) for slot in slots)):
                probability = math.prod(slot[token] for slot, token in zip(slots, tokens, strict=True))
                if probability > 0:
                    found[tokens] = probability
            return found

        return self._answer(answers).flatten()

    def ancestors(self, weights: Float[Tensor, "P N"], prompts: Int[Tensor, " P"]) -> Int[Tensor, "P N"]:
        laws: dict[int, dict[tuple[int, ...], float]] = {}
        known: dict[tuple[float, ...], dict[tuple[int, ...], float]] = {}
        for copy, row in zip(prompts.tolist(), weights, strict=True):
            key = tuple(row.tolist())
            known[key] = laws[copy] = known[key] if key in known else ancestor_law(self.scheme, row)
        stay = {tuple(range(self.particles)): 1.0}

        def answers(copy: int) -> dict[tuple[int, ...], float]:
            return laws.get(copy, stay)

        return self._answer(answers)[prompts]

    def _answer(self, answers: Any) -> Int[Tensor, "K N"]:
        if self._place < len(self._said):
            self._place += 1
            return self._said[self._place - 1].clone()
        cases = [(copy, case, p) for copy in range(len(self.probability)) for case, p in answers(copy).items()]
        parent = torch.tensor([copy for copy, _, _ in cases])
        grown = _Script(self.scheme, self.particles, self.references[parent])
        share = torch.tensor([p for _, _, p in cases], dtype=torch.float64)
        grown.probability = self.probability[parent] * share
        grown._said = [*(said[parent] for said in self._said), torch.tensor([case for _, case, _ in cases])]
        raise _Asked(grown)


def ancestor_law(scheme: Resample, weights: Float[Tensor, " N"]) -> dict[tuple[int, ...], float]:
    """The probability of every tuple of ancestors: the scheme integrated over the cells on which it is constant."""
    n = len(weights)
    cumulative = weights.cumsum(0)[:-1]
    left = n * weights - (n * weights).floor()
    rest = left.cumsum(0)[:-1] / left.sum().clamp(min=1e-300)
    edges = torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), cumulative, rest, (n * cumulative).frac()])
    edges = edges.clamp(0, 1).unique()
    middles, widths = (edges[1:] + edges[:-1]) / 2, edges.diff()
    cells = torch.cartesian_prod(*[torch.arange(len(widths))] * n).view(-1, n)
    found = scheme(weights.expand(len(cells), n).contiguous(), middles[cells])
    law: dict[tuple[int, ...], float] = {}
    for case, share in zip(found.tolist(), widths[cells].prod(-1).tolist(), strict=True):
        law[tuple(case)] = law.get(tuple(case), 0.0) + share
    return law


# --- what the suite puts in ---


def table_twist(values: Mapping[tuple[int, ...], float]) -> PrefixTwist:
    """log psi of every prefix from a table."""

    def twist(target: Target, prefixes: Draws) -> Float[Tensor, " B"]:
        return torch.tensor([values[prefix] for prefix in _completions(prefixes)], dtype=torch.float64)

    return twist


def rough_twist(exact: ex.Exact, error: float = 0.8) -> PrefixTwist:
    """The exact soft values in nats, each with an error of its own."""
    soft = exact.soft_values()
    return table_twist({h: v / exact.beta + error * math.sin(1 + 5 * k) for k, (h, v) in enumerate(soft.items())})


def another_law(world: Language, exact: ex.Exact) -> Any:
    """A proposal that is neither the prior nor p*."""
    log_law = exact.log_prior + 0.9 * (3 * torch.arange(len(exact.log_prior), dtype=torch.float64)).sin()
    return policy_with_law(world, log_law.log_softmax(0))


def _completions(draws: Draws) -> list[tuple[int, ...]]:
    return [tuple(t[m].tolist()) for t, m in zip(draws.tokens, draws.mask, strict=True)]


@dataclass(frozen=True)
class TableTwist:
    """The same as a `Twist`, with rows of its own to keep."""

    values: Mapping[tuple[int, ...], float]

    def twist_walk(self, prompts: Any, n: int) -> _TableWalk:
        return _TableWalk(self.values, [()] * (len(prompts) * n))


class _TableWalk:
    def __init__(self, values: Mapping[tuple[int, ...], float], rows: list[tuple[int, ...]]) -> None:
        self._values, self._rows = values, rows

    def log_twist(self) -> Float[Tensor, " B"]:
        return torch.tensor([self._values[row] for row in self._rows], dtype=torch.float64)

    def extend(self, tokens: Int[Tensor, " B"], live: Tensor) -> None:
        ids = zip(self._rows, tokens.tolist(), live.tolist(), strict=True)
        self._rows = [(*row, token) if alive else row for row, token, alive in ids]

    def select(self, rows: Int[Tensor, " B"]) -> None:
        self._rows = [self._rows[i] for i in rows.tolist()]
