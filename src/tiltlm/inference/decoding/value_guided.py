"""Value-guided decoding: each token from the prior tilted by a value function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.inference.decoding.importance import Importance
from tiltlm.posterior.exact import Exact
from tiltlm.protocols import Claim, Sampler
from tiltlm.records import Prompts, Scored, Weighted
from tiltlm.target import Target


@dataclass(frozen=True)
class ValueGuided:
    """Draw each token from pi_Q(a|s), in proportion to pi0(a|s) exp Q(s, a), Q in nats (Zhou et al. 2025; Mudgal et al. 2024).

    With Q* = log E_pi0[exp(r / beta) | s, a] this is p* itself. With any other Q it is pi_Q, a policy whose distance from p*
    nothing bounds: values that are learned without the soft maximum (E_pi0[r | s, a], as in controlled decoding) are such a Q.
    `correct` weights the draws by pi0 exp(r / beta) / pi_Q, which makes them importance samples of p*. For a correction
    within the completion, use SMC with the critic both as proposal and as twist.

    Attributes:
        value: the critic, a sampler of pi_Q such as `prior.critic()` trained by a value engine.
        n: draws a prompt.
        correct: weight the draws towards p*.
    """

    value: Sampler | None = None
    n: int = 16
    correct: bool = True

    @property
    def claim(self) -> Claim:
        """p* with the weights, pi_Q without."""
        if self.correct:
            return Claim(fixed_point="p*", objective="law", bias="1/n", source="Rubin 1987")
        return Claim(fixed_point="value-guided", objective="law", bias="none", source="Zhou et al. 2025, Thm 2.2")

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"n is {self.n}; draw at least 1 completion")

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """`n` draws of pi_Q a prompt, with their weights.

        Raises:
            InputError: without a value function, or with a further proposal beside it.
        """
        critic = self._critic(proposal)
        weighted = Importance(self.n).sample(target, prompts, proposal=critic, rng=rng)
        if self.correct:
            return weighted
        return Weighted(weighted.scored, torch.zeros_like(weighted.log_w), weighted.log_z)

    def selection(self, target: Target, scored: Scored) -> Float[Tensor, " B"]:
        """Probability that each of the given draws, of pi_Q, is the one returned."""
        if self.correct:
            return Importance(self.n).selection(target, scored)
        index = scored.draws.prompt_index
        return 1.0 / index.bincount().double()[index]

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        """log pi_Q over all completions, or log p* with the weights."""
        return exact.log_posterior if self.correct else exact.log_prob(self._critic(None))

    def _critic(self, proposal: Sampler | None) -> Sampler:
        if (self.value is None) == (proposal is None):
            raise InputError(
                "value-guided decoding draws from its critic alone: give value= (or the critic as proposal=), and not both"
            )
        return self.value or proposal  # pyright: ignore[reportReturnType]
