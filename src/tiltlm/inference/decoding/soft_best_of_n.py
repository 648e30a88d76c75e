"""Soft best-of-n."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator

from tiltlm.inference.decoding.importance import Importance
from tiltlm.protocols import Sampler
from tiltlm.records import Prompts, Weighted
from tiltlm.target import Target
from tiltlm.weights import resample


@dataclass(frozen=True)
class SoftBestOfN(Importance):
    """Draw `n` completions, pick one in proportion to exp(r / beta) (Verdun et al. 2025).

    It is importance resampling (`Importance`, whose law it has: `posterior.exact.sir_law` gives it in closed form) with
    the choice made. With a proposal other than the prior the choice is in proportion to pi0 exp(r / beta) / q, so that it
    still approaches p*.
    """

    n: int = 16

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """`n` draws a prompt, all the weight on the one that is picked."""
        weighted = super().sample(target, prompts, proposal=proposal, rng=rng)
        chosen = resample(weighted.log_w, weighted.scored.draws.prompt_index, len(prompts), 1, rng)[:, 0]
        log_w = torch.full((len(weighted.scored),), -torch.inf, dtype=torch.float64)
        log_w[chosen[chosen >= 0]] = 0.0
        return replace(weighted, log_w=log_w)
