"""Markov chain Monte Carlo on completions: propose, accept or stay."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from tiltlm.errors import InputError, TiltWarning
from tiltlm.inference.decoding.kernels import Kernel, SuffixResampling
from tiltlm.inference.decoding.mixing import chain_ess, split_r_hat
from tiltlm.inference.decoding.proposal import prefix_proposal
from tiltlm.protocols import Claim, Sampler
from tiltlm.records import Draws, Prompts, Scored, Weighted
from tiltlm.target import Target
from tiltlm.weights import group_mean

MIXED = 1.1
"""R-hat above which chains have not mixed (Gelman et al. 2013, section 11.4)."""


@dataclass(frozen=True)
class MCMC:
    """Metropolis-Hastings by suffix resampling (QuEST, Faria et al. 2024), or by any other kernel.

    Each step a kernel g proposes x' for the completion x, which is accepted with probability
    min(1, [g(x | x') / g(x' | x)] [pi0(x') exp(r' / beta)] / [pi0(x) exp(r / beta)]) (Hastings 1970).

    By default x is cut at a place drawn uniformly from its |x| tokens and the rest is drawn anew from the proposal q. From the
    prior the probability is then exp((r' - r) / beta) |x| / |x'|: the lengths are there because x' could have been cut at |x'|
    places. The stationary law is p* for any q that can draw all of its completions; how near the chains are after so many steps is
    what `r_hat` tells. With `kernel=masked_edits(model, prior)` half of the steps change a word in the middle instead, as a masked
    language model fills it in.

    With `Power` evidence this is power sampling (Karan & Du 2025), with the lengths.

    The result holds every chain's states after the warm-up, equally weighted; diagnostics are `r_hat` (split; the larger
    of those of the log-evidence and the unnormalised log-posterior), `ess` (the smaller), and `acceptance`.

    Attributes:
        chains: independent chains for each prompt, each started from a draw of the proposal.
        steps: states kept of each chain.
        warmup: steps before those.
        kernel: what a step proposes.
    """

    chains: int = 4
    steps: int = 64
    warmup: int = 32
    kernel: Kernel = field(default_factory=SuffixResampling)
    claim = Claim(fixed_point="p*", objective="law", bias="unknown", source="Faria et al. 2024; Hastings 1970")

    def __post_init__(self) -> None:
        for name, least in (("chains", 1), ("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not hasattr(self.kernel, "propose"):
            raise InputError(f"kernel is {self.kernel!r:.60}; take SuffixResampling() or masked_edits(model, prior)")

    @property
    def cost(self) -> int:
        """Completions of a prompt, whole ones at the start and redrawn ones after; those of the warm-up too."""
        return self.chains * (1 + self.warmup + self.steps)

    def within(self, draws: int) -> MCMC:
        """Chains as long as `draws` completions of a prompt pay for, a third of each to warm up; fewer chains if they are few."""
        chains = max(1, min(self.chains, draws // 2))
        moves = max(1, draws // chains - 1)
        return replace(self, chains=chains, steps=moves - moves // 3, warmup=moves // 3)

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """`chains` times `steps` completions of every prompt.

        Raises:
            InputError: if the proposal cannot redraw suffixes, or draws from other completions than the prior.
        """
        sampler = prefix_proposal(target, proposal, "MCMC", "redraw")
        state = judged(target, sampler.draw(prompts, self.chains, rng))
        done = getattr(sampler, "progress", None)
        states: list[Scored] = []
        accepted = torch.zeros(len(state), dtype=torch.float64)
        for step in range(self.warmup + self.steps):
            move = self.kernel.propose(sampler, state.draws, rng)
            proposed = judged(target, move.draws)
            if done is not None:
                done(len(state))
            uniform = torch.rand(len(state), generator=rng, dtype=torch.float64)
            accept = uniform.log() < self.log_acceptance(state, proposed, move.log_ratio)
            rows = torch.arange(len(state)) + len(state) * accept.long()
            state = Scored.concatenate([state, proposed]).select(rows)
            if step >= self.warmup:
                states.append(state)
                accepted += accept.double()
        return self._weighted(states, prompts, accepted / self.steps)

    def log_acceptance(self, current: Scored, proposed: Scored, log_ratio: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """log of the acceptance probability, before it is cut off at 0. A chain that is where the posterior has nothing goes anywhere.

        Args:
            log_ratio: the kernel's log g(x|x') - log g(x'|x).
        """
        here, there = current.log_target.double(), proposed.log_target.double()
        return torch.where(here > -torch.inf, there - here + log_ratio, 0.0)

    def _weighted(self, states: list[Scored], prompts: Prompts, accepted: Float[Tensor, " B"]) -> Weighted:
        shape = len(states), len(prompts), self.chains
        traces = [
            torch.stack([values(state).double() for state in states]).view(shape).transpose(1, 2)
            for values in (lambda s: s.log_evidence, lambda s: s.log_target)
        ]
        r_hat = torch.stack([split_r_hat(trace) for trace in traces]).amax(0)
        size = torch.stack([chain_ess(trace) for trace in traces]).amin(0)
        # a chain that never found the posterior's support is at -inf, and there is no variance to speak of
        lost = torch.stack([trace == -torch.inf for trace in traces]).any(0).flatten(0, 1).any(0)
        r_hat, size = torch.where(lost, torch.inf, r_hat), torch.where(lost, 0.0, size)
        apart = r_hat > MIXED
        if apart.any():
            warnings.warn(
                f"the chains of {int(apart.sum())} of {len(prompts)} prompts have not mixed (R-hat up to {float(r_hat.max()):.2f}, "
                f"above {MIXED}): raise steps and warmup, or give a proposal nearer the posterior, such as a trained policy",
                TiltWarning,
                stacklevel=3,
            )
        scored = Scored.concatenate(states)
        log_w = torch.where(scored.log_weight > -torch.inf, 0.0, -torch.inf).double()
        index = torch.arange(len(prompts)).repeat_interleave(self.chains)
        acceptance = group_mean(accepted, index, len(prompts))
        chain = torch.arange(self.chains).repeat(len(prompts) * len(states))
        return Weighted(scored, log_w, None, {"r_hat": r_hat, "ess": size, "acceptance": acceptance}, chain)


def judged(target: Target, draws: Draws) -> Scored:
    """Draws with both factors of the target, all of them: what has no usable reward counts as impossible."""
    likelihood = target.evidence.log_likelihood(draws)
    return Scored(
        draws=draws,
        log_prior=target.prior.log_prob(draws),
        log_evidence=torch.where(likelihood.kept, likelihood.log, -torch.inf),
        rewards=likelihood.rewards,
        beta=target.beta,
    )


__all__ = ["MCMC", "judged"]
