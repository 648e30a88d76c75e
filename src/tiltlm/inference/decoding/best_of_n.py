"""Best of n."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import Claim, Sampler
from tiltlm.records import Prompts, Scored, Weighted
from tiltlm.target import Target


@dataclass(frozen=True)
class BestOfN:
    """Draw `n` completions, keep the one with the highest reward, the first drawn among equals.

    Its law is not p* but pi0(x) (F(x)^n - F_-(x)^n) / (F(x) - F_-(x)), F and F_- the prior's probabilities of a
    reward at most, and less than, r(x) (Beirami et al. 2024). At its own KL it is close to the best reward there is.

    Where a hard constraint rules out all draws of a prompt, it returns none of them.

    With a proposal it is the same law of that proposal: nothing corrects for who drew.
    """

    n: int = 16
    claim = Claim(fixed_point="best-of-n", objective="law", bias="none", source="Beirami et al. 2024, Lemma 1")

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"n is {self.n}; draw at least 1 completion")

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """`n` draws a prompt, all the weight on the best."""
        scored = target.score((proposal or target.prior).draw(prompts, self.n, rng))
        return Weighted(scored, self.selection(target, scored).log())

    def selection(self, target: Target, scored: Scored) -> Float[Tensor, " B"]:
        """Probability that each of the given draws is the one returned."""
        chosen = torch.zeros(len(scored), dtype=torch.float64)
        best_first = scored.log_evidence.argsort(descending=True, stable=True)  # stable: the first drawn among equals
        by_prompt = best_first[scored.draws.prompt_index[best_first].argsort(stable=True)]
        index = scored.draws.prompt_index[by_prompt]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        winners = by_prompt[first]
        chosen[winners] = (
            scored.log_evidence[winners] > -torch.inf
        ).double()  # the best of what is ruled out is ruled out
        return chosen
