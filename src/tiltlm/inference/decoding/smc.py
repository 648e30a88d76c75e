"""Sequential Monte Carlo: completions grown together, weighted on the way, and resampled where the weights have grown apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tiltlm.errors import InputError, TiltWarning, at_least_one
from tiltlm.estimates import Estimate
from tiltlm.inference.decoding.particles import Chance, Particles, Random, Resample
from tiltlm.inference.decoding.proposal import prefix_proposal
from tiltlm.protocols import Claim, PrefixSampler, Sampler, Twist, TwistWalk, Walk
from tiltlm.records import Draws, Prompts, Scored, Weighted
from tiltlm.target import Target
from tiltlm.weights import ess, multinomial, residual, stratified, systematic

PrefixTwist = Callable[[Target, Draws], Float[Tensor, " B"]]
"""log psi of prefixes, given as draws of the prior that have neither ended nor been cut."""


def prefix_evidence(target: Target, prefixes: Draws) -> Float[Tensor, " B"]:
    """A twist for rewards that make sense on unfinished texts: the evidence's own log-likelihood of the prefix.

    It costs one call of the reward a token. A hard constraint must not rule out a prefix that could still become legal.
    """
    likelihood = target.evidence.log_likelihood(prefixes)
    return torch.where(likelihood.kept, likelihood.log, 0.0)


@dataclass(frozen=True)
class Run:
    """What one run of SMC over some prompts leaves.

    Attributes:
        log_w: log-weights; the mean weight of a prompt's rows is its estimate of Z.
        log_z: log of that mean.
        resampled: how often each prompt was resampled.
        lowest_ess: the smallest effective sample size on the way.
        roots: how many of the first tokens drawn have descendants at the end.
    """

    scored: Scored
    log_w: Float[Tensor, " B"]
    log_z: Float[Tensor, " P"]
    resampled: Int[Tensor, " P"]
    lowest_ess: Float[Tensor, " P"]
    roots: Int[Tensor, " P"]


@dataclass(frozen=True)
class SMC:
    """Twisted sequential Monte Carlo (Zhao et al. 2024; Naesseth et al. 2019).

    Every completion's weight grows by w_t = [pi0 / q]_t [psi_t / psi_{t-1}] with each token, psi_0 = 1 and
    psi_T = exp(r / beta). The product over resamplings of the mean weights is an unbiased estimate of Z, whatever the proposal
    q and the twist psi > 0; weighted, the completions stand for p*, with a bias of order 1 / particles. With
    psi_t = E_pi0[exp(r / beta) | x_1:t] and q in proportion to pi0 psi every run gives Z itself.

    Without a twist nothing is known before a completion's end, and SMC is importance sampling; it warns.

    Each prompt is resampled for itself, its rows' caches following. The result's diagnostics are `ess` of the last weights,
    `lowest_ess` on the way, `resampled` (times, mean over repeats) and `roots`, how many of the `particles` first tokens have
    descendants at the end: where that is 1, the completions are cousins, whatever the ESS.

    Attributes:
        particles: completions of each prompt.
        twist: a `Twist` such as a critic, or a function of prefixes such as `prefix_evidence`.
        resample: systematic, stratified, multinomial or residual.
        threshold: resample where the effective sample size falls below this share of the particles; 0 never does.
        repeats: independent runs. The estimate of Z is their mean, its standard error their spread (NaN with one run).
        rows: most completions in the model at a time, in whole populations.
    """

    particles: int = 32
    twist: Twist | PrefixTwist | None = None
    resample: Resample = systematic
    threshold: float = 0.5
    repeats: int = 1
    rows: int = 256
    claim = Claim(fixed_point="p*", objective="law", bias="1/n", source="Zhao et al. 2024; Del Moral 2004")

    def __post_init__(self) -> None:
        at_least_one(self, "particles", "repeats", "rows")
        if not (self.twist is None or hasattr(self.twist, "twist_walk") or callable(self.twist)):
            raise InputError(
                f"twist is {self.twist!r}; give a critic, a function of prefixes such as prefix_evidence, or None"
            )
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold is {self.threshold}; it is a share of the particles, between 0 and 1")

    @property
    def cost(self) -> int:
        """Completions of a prompt."""
        return self.particles * self.repeats

    def within(self, draws: int) -> SMC:
        """As many particles as `draws` completions of a prompt pay for."""
        return replace(self, particles=max(1, draws // self.repeats))

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """Weighted completions of every prompt, `particles` times `repeats` of them, with the estimate of log Z.

        Raises:
            InputError: if the proposal cannot be stopped at any token, or draws from other completions than the prior.
        """
        sampler = prefix_proposal(target, proposal, "SMC", "walk")
        if self.twist is None:
            warnings.warn(
                "SMC has no twist, so that nothing is known of a completion before its end: this is importance sampling; give "
                "twist= a critic or prefix_evidence, or use Importance",
                TiltWarning,
                stacklevel=2,
            )
        places = [p for p in range(len(prompts)) for _ in range(self.repeats)]
        runs, parts = [], []
        for some in self._waves(places):
            run = self.run(target, prompts.select(some), sampler, Random(rng, self.resample))
            runs.append(run)
            parts.append(run.scored.among(prompts, some))
        scored, log_w = Scored.concatenate(parts), torch.cat([run.log_w for run in runs])
        log_z = torch.cat([run.log_z for run in runs]).view(len(prompts), self.repeats)
        every = {
            name: torch.cat([getattr(run, name) for run in runs]).double().view(len(prompts), self.repeats)
            for name in ("resampled", "lowest_ess", "roots")
        }
        return Weighted(
            scored,
            log_w,
            tuple(_mean_of_runs(row, self.particles) for row in log_z),
            {
                "ess": ess(log_w, scored.draws.prompt_index, len(prompts)),
                "lowest_ess": every["lowest_ess"].amin(-1),
                "resampled": every["resampled"].mean(-1),
                "roots": every["roots"].sum(-1),
            },
            torch.arange(self.repeats).repeat_interleave(self.particles).repeat(len(prompts)),
        )

    def log_z_runs(
        self, target: Target, prompts: Prompts, runs: int, *, proposal: Sampler | None = None, rng: Generator
    ) -> Float[Tensor, "P R"]:
        """log of the estimate of Z in each of `runs` independent runs; its expectation is at most log Z."""
        sampler = prefix_proposal(target, proposal, "SMC", "walk")
        places = [p for p in range(len(prompts)) for _ in range(runs)]
        found = [
            self.run(target, prompts.select(some), sampler, Random(rng, self.resample)).log_z
            for some in self._waves(places)
        ]
        return torch.cat(found).view(len(prompts), runs)

    def log_z_given(
        self, target: Target, exact: Draws, *, proposal: Sampler | None = None, rng: Generator
    ) -> Float[Tensor, " M"]:
        """log of the estimate of Z in a conditional run for each of `exact`, which are exact posterior samples.

        The sample keeps slot 0 throughout, through all resampling, which is multinomial here whatever `resample` says: the
        conditional forms of the other schemes are not the same with a slot pinned. The expectation is at least log Z, and
        that of exp(-log Z-hat) is 1 / Z (Andrieu et al. 2010; Zhao et al. 2024, Prop. 5.1).
        """
        sampler = prefix_proposal(target, proposal, "SMC", "walk")
        found = []
        for some in self._waves(list(range(len(exact)))):
            reference = exact.select(torch.tensor(some))
            prompts = exact.prompts.select(reference.prompt_index.tolist())
            found.append(self.run(target, prompts, sampler, Random(rng, multinomial), reference).log_z)
        return torch.cat(found)

    def run(
        self, target: Target, prompts: Prompts, proposal: PrefixSampler, chance: Chance, reference: Draws | None = None
    ) -> Run:
        """One population for each prompt.

        Args:
            reference: a completion for slot 0 of each prompt, in their order: a conditional run.
        """
        n = self.particles
        particles = Particles(target, proposal, prompts, n, self._twist_of(target, prompts))
        given = None
        if reference is not None:
            room = target.prior.law.max_new_tokens - reference.tokens.shape[1]
            given = torch.nn.functional.pad(reference.tokens, (0, room))
        step = 0
        while particles.live.any():
            particles.extend(chance, None if given is None else given[:, step])
            particles.resample(chance, self.threshold, pinned=given is not None)
            step += 1
        scored = particles.finish()
        roots = torch.tensor([len(row.unique()) for row in particles.root.view(-1, n)])
        return Run(scored, particles.log_w, particles.log_z, particles.resampled, particles.lowest_ess, roots)

    def _twist_of(self, target: Target, prompts: Prompts) -> Callable[[Walk], TwistWalk] | None:
        twist, n = self.twist, self.particles
        if twist is None:
            return None
        start: Any = getattr(twist, "twist_walk", None)
        if start is not None:
            return lambda _: start(prompts, n)
        return lambda prior: _PrefixWalk(target, twist, prior)  # pyright: ignore[reportArgumentType]

    def _waves(self, places: Sequence[int]) -> Iterator[list[int]]:
        """Populations that are in the model together."""
        together = max(1, self.rows // self.particles)
        for start in range(0, len(places), together):
            yield list(places[start : start + together])


@dataclass(frozen=True)
class _PrefixWalk:
    """A function of prefixes as a twist: it looks at the rows of the prior's walk, which moves by itself."""

    target: Target
    twist: PrefixTwist
    prior: Walk

    def log_twist(self) -> Float[Tensor, " B"]:
        live = self.prior.live
        rows = live.nonzero().flatten()
        log_psi = torch.zeros(len(live), dtype=torch.float64)
        if len(rows):
            log_psi[rows] = self.twist(self.target, self.prior.draws(rows)).double()
        return log_psi

    def extend(self, tokens: Int[Tensor, " B"], live: Bool[Tensor, " B"]) -> None:
        """The prior's walk has the tokens."""

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """The prior's walk has the rows."""


def _mean_of_runs(log_z: Float[Tensor, " R"], particles: int) -> Estimate:
    """log of the mean estimate of Z over runs; the standard error is the delta method's."""
    count = len(log_z)
    value = float(log_z.logsumexp(0)) - math.log(count)
    spread = float((log_z - value).exp().std()) if count > 1 and value > -math.inf else math.nan
    return Estimate(value, spread / math.sqrt(count), count * particles, "lower")


__all__ = ["SMC", "PrefixTwist", "Run", "multinomial", "prefix_evidence", "residual", "stratified", "systematic"]
