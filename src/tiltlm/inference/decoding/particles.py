"""A population of completions that are extended together, weighted, and resampled: what `SMC` runs on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tiltlm.lm.sample import pick
from tiltlm.protocols import PrefixSampler, TwistWalk, Walk
from tiltlm.records import Prompts, Scored
from tiltlm.target import Target
from tiltlm.weights import ess, group_logsumexp

Resample = Callable[[Float[Tensor, "P N"], Float[Tensor, "P N"]], Int[Tensor, "P N"]]
"""(weights, uniform numbers) -> ancestors; see `tiltlm.weights`."""


class Chance(Protocol):
    """Where a run's randomness comes from: a generator, or a list of all cases that a test goes through."""

    def tokens(self, log_probs: Float[Tensor, "B V"], free: Bool[Tensor, " B"]) -> Int[Tensor, " B"]:
        """A token for every row; of the rows that are not `free`, any."""
        ...

    def ancestors(self, weights: Float[Tensor, "P N"], prompts: Int[Tensor, " P"]) -> Int[Tensor, "P N"]:
        """The slots that the next generation of each of `prompts` is copied from."""
        ...


@dataclass(frozen=True)
class Random:
    """Chance from a generator."""

    rng: Generator
    resample: Resample

    def tokens(self, log_probs: Float[Tensor, "B V"], free: Bool[Tensor, " B"]) -> Int[Tensor, " B"]:
        uniform = torch.rand(len(log_probs), generator=self.rng, dtype=torch.float64)
        return pick(log_probs, uniform.to(log_probs.device))[0].cpu()

    def ancestors(self, weights: Float[Tensor, "P N"], prompts: Int[Tensor, " P"]) -> Int[Tensor, "P N"]:
        return self.resample(weights, torch.rand(weights.shape, generator=self.rng, dtype=torch.float64))


class Particles:
    """`n` completions of every prompt, and all that must follow them when they are resampled.

    Args:
        twist: makes the twist's rows beside those of the prior's walk; None for a population that is weighted at its end only.

    Attributes:
        log_w: log-weight of each row since its prompt was last resampled.
        log_z: log of the product of the mean weights up to then.
        root: the slot in which each row's first token was drawn.
        resampled: how often each prompt was resampled.
        lowest_ess: the smallest effective sample size that each prompt has seen.
    """

    def __init__(
        self,
        target: Target,
        proposal: PrefixSampler,
        prompts: Prompts,
        n: int,
        twist: Callable[[Walk], TwistWalk] | None,
    ) -> None:
        self._target, self._count, self._n = target, len(prompts), n
        prior: PrefixSampler = target.prior  # pyright: ignore[reportAssignmentType]
        self._q = proposal.walk(prompts, n)
        self._prior = self._q if proposal is prior else prior.walk(prompts, n)
        self._twist = twist(self._prior) if twist is not None else None
        self._index = torch.arange(self._count).repeat_interleave(n)
        zeros = torch.zeros(self._count * n, dtype=torch.float64)
        self._log_psi, self._log_evidence, self.log_w = zeros.clone(), zeros.clone(), zeros
        self._rewards: dict[str, Tensor] = {}
        self.log_z = torch.zeros(self._count, dtype=torch.float64)
        self.root = torch.arange(len(zeros)) % n
        self.resampled = torch.zeros(self._count, dtype=torch.long)
        self.lowest_ess = torch.full((self._count,), float(n), dtype=torch.float64)

    @property
    def live(self) -> Bool[Tensor, " B"]:
        return self._q.live

    def extend(self, chance: Chance, fixed: Int[Tensor, " P"] | None = None) -> None:
        """Draw every live row's next token from the proposal, and weigh the row by [pi0 / q] [psi_t / psi_{t-1}].

        A row that is over has psi = exp(r / beta). Without a twist, psi waits for the end: it goes along with q / pi0, so that
        weights are 1 until then.

        Args:
            fixed: the tokens of each prompt's slot 0, where they are given.
        """
        live = self.live
        log_q, log_prior = self._q.log_probs(), self._prior.log_probs()
        free = live.clone()
        if fixed is not None:
            free.view(-1, self._n)[:, 0] = False
        tokens = chance.tokens(log_q, free)
        if fixed is not None:
            tokens.view(-1, self._n)[:, 0] = fixed
        place = tokens.to(log_q.device)[:, None]
        log_ratio = (log_prior.gather(-1, place) - log_q.gather(-1, place)).squeeze(-1).cpu().double()
        for part in self._parts():
            part.extend(tokens, live)
        if self._twist is None:
            log_psi = self._log_psi - log_ratio
            gained = torch.zeros_like(log_ratio)
        else:
            self._judge(live & ~self.live)
            log_psi = torch.where(self.live, self._twist.log_twist().cpu().double(), self._log_evidence)
            gained = log_ratio + log_psi - self._log_psi
        self.log_w = torch.where(live & (self.log_w > -torch.inf), self.log_w + gained, self.log_w)
        self._log_psi = torch.where(live, log_psi, self._log_psi)

    def resample(self, chance: Chance, threshold: float, pinned: bool) -> None:
        """Resample the prompts whose effective sample size is below `threshold` times n and that have something live.

        Args:
            pinned: slot 0 is its own ancestor.
        """
        size = ess(self.log_w, self._index, self._count)
        self.lowest_ess = torch.minimum(self.lowest_ess, size)
        total = group_logsumexp(self.log_w, self._index, self._count)
        going = self.live.view(self._count, self._n).any(-1)
        # a hair below: equal weights must not be resampled for their rounding
        poor = going & (total > -torch.inf) & (size < threshold * self._n - 1e-9)
        if not poor.any():
            return
        chosen = poor.nonzero().flatten()
        ancestors = chance.ancestors(self.log_w.view(self._count, self._n)[chosen].softmax(-1), chosen)
        if pinned:
            ancestors[:, 0] = 0
        rows = torch.arange(self._count * self._n).view(self._count, self._n)
        rows[chosen] = chosen[:, None] * self._n + ancestors
        self._select(rows.flatten())
        self.log_z = self.log_z + torch.where(poor, total - math.log(self._n), 0.0)
        self.log_w = torch.where(poor[self._index], 0.0, self.log_w)
        self.resampled += poor

    def finish(self) -> Scored:
        """The completions with both factors of the target; puts the means of the last weights into `log_z`."""
        if self._twist is None:
            self._judge(torch.ones_like(self.live))
            self.log_w = self._log_evidence - self._log_psi
        total = group_logsumexp(self.log_w, self._index, self._count)
        self.lowest_ess = torch.minimum(self.lowest_ess, ess(self.log_w, self._index, self._count))
        # in these units the mean weight of a prompt's rows is its estimate of Z, resampled or not
        self.log_w = self.log_w + self.log_z[self._index]
        self.log_z = self.log_z + total - math.log(self._n)
        return Scored(
            draws=self._q.draws(),
            log_prior=self._prior.draws().log_q,
            log_evidence=self._log_evidence,
            rewards=self._rewards,
            beta=self._target.beta,
        )

    def _judge(self, rows: Bool[Tensor, " B"]) -> None:
        """Ask the evidence about `rows`, which are over; what has no usable reward counts as impossible."""
        chosen = rows.nonzero().flatten()
        if not len(chosen):
            return
        likelihood = self._target.evidence.log_likelihood(self._prior.draws(chosen))
        self._log_evidence[chosen] = torch.where(likelihood.kept, likelihood.log, -torch.inf).double()
        for name, values in likelihood.rewards.items():
            self._rewards.setdefault(name, torch.full_like(self._log_evidence, torch.nan))[chosen] = values.double()

    def _select(self, rows: Int[Tensor, " B"]) -> None:
        for part in self._parts():
            part.select(rows)
        self._log_psi, self._log_evidence = self._log_psi[rows], self._log_evidence[rows]
        self._rewards = {name: values[rows] for name, values in self._rewards.items()}
        self.root = self.root[rows]

    def _parts(self) -> list[Walk | TwistWalk]:
        walks: list[Walk | TwistWalk] = [self._q] if self._prior is self._q else [self._q, self._prior]
        return walks if self._twist is None else [*walks, self._twist]
