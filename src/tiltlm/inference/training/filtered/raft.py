"""Filtered fine-tuning: maximum likelihood on what a selection keeps of a group of draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.posterior.exact import Exact, best_of_n_law
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored
from tiltlm.weights import best_of_subsets, group_count, normalise

Bias = Literal["none", "1/n"]


class Selection(Protocol):
    """Which of a prompt's draws are learned from, and with what weight.

    Attributes:
        fixed_point: the name of the law that is selected from prior draws.
        bias: how far that law is from the one named.
    """

    fixed_point: ClassVar[str]
    bias: ClassVar[Bias]

    def __call__(self, scored: Scored) -> Float[Tensor, " B"]:
        """Weights that sum to one within each prompt, or to zero where nothing is kept."""
        ...

    def law(self, exact: Exact, n: int) -> Float[Tensor, " K"]:
        """log of the law that is selected from groups of `n` prior draws."""
        ...


@dataclass(frozen=True)
class Best:
    """The best of n draws, the first drawn among equals.

    From a group of M >= n it takes the mean over all subsets of n: the draw with k worse ones is the best of C(k, n - 1) of
    the C(M, n) subsets. That is unbiased for any M, and steadier than one subset. Nothing is kept of a prompt with fewer than
    n draws, and no draw whose evidence is -inf.

    Attributes:
        n: None for the whole group.
    """

    n: int | None = None
    fixed_point: ClassVar[str] = "best-of-n"
    bias: ClassVar[Bias] = "none"

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise InputError(f"n is {self.n}; the best is taken of at least 1 draw")

    def __call__(self, scored: Scored) -> Float[Tensor, " B"]:
        index, reward = scored.draws.prompt_index, scored.log_evidence
        # Ascending within each prompt; of equals the first drawn comes last, as the better one.
        backwards = torch.arange(len(index) - 1, -1, -1)
        order = backwards[reward[backwards].argsort(stable=True)]
        order = order[index[order].argsort(stable=True)]
        counts = group_count(index, int(index.max()) + 1).tolist()
        weights = torch.zeros(len(index), dtype=torch.float64)
        weights[order] = torch.cat([best_of_subsets(count, self.n or count) for count in counts])
        return torch.where(reward > -torch.inf, weights, 0.0)

    def law(self, exact: Exact, n: int) -> Float[Tensor, " K"]:
        """log of the law of best-of-n; where evidence is -inf, conditional on the best being possible."""
        law = best_of_n_law(exact, self.n or n).log()
        return torch.where(exact.reward > -torch.inf, law, -torch.inf).log_softmax(0)


@dataclass(frozen=True)
class Above:
    """Every draw with a reward of at least `threshold`, alike: rejection sampling of the filtered prior."""

    threshold: float
    fixed_point: ClassVar[str] = "filtered prior"
    bias: ClassVar[Bias] = "none"

    def __call__(self, scored: Scored) -> Float[Tensor, " B"]:
        kept = self._keeps(scored.beta * scored.log_evidence.double())
        index = scored.draws.prompt_index
        return normalise(torch.where(kept, 0.0, -torch.inf), index, int(index.max()) + 1)

    def law(self, exact: Exact, n: int) -> Float[Tensor, " K"]:
        """log of pi0 1[r >= threshold] / Z."""
        return torch.where(self._keeps(exact.reward), exact.log_prior, -torch.inf).log_softmax(0)

    def _keeps(self, reward: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
        # A reward of 1 may have become 1 - 1e-16 on its way through r / beta.
        return reward >= self.threshold - 1e-9 * max(1.0, abs(self.threshold))


@dataclass(frozen=True)
class Tilted:
    """Every draw in proportion to exp(r / beta): the posterior over the group as it was drawn."""

    fixed_point: ClassVar[str] = "p*"
    bias: ClassVar[Bias] = "1/n"

    def __call__(self, scored: Scored) -> Float[Tensor, " B"]:
        index = scored.draws.prompt_index
        return normalise(scored.log_evidence.double(), index, int(index.max()) + 1)

    def law(self, exact: Exact, n: int) -> Float[Tensor, " K"]:
        return exact.log_posterior


best, above, tilted = Best(), Above, Tilted()


@dataclass(frozen=True)
class RAFT:
    """Maximum likelihood on the selected of a group of prior draws (Dong et al. 2023).

    The minimum is the law that the selection makes of the prior: that of best-of-n for `best` (best-of-n distillation),
    pi0 1[r >= tau] / Z for `above(tau)` (ReST, Gulcehre et al. 2023), and p* for `tilted`, up to the bias 1 / group of weights
    that are normalised by their own sum. The draws are the prior's, however long it trains, and so is the target.

    Attributes:
        group: prior draws of each prompt in a step.
        select: what is kept of them.
    """

    group: int = 8
    select: Selection = best
    updates = 1

    def __post_init__(self) -> None:
        _require_group(self.group, self.select)

    @property
    def claim(self) -> Claim:
        """The selection's law."""
        law = self.select.fixed_point
        return Claim(law, f"KL({law}||q)", bias=self.select.bias, data="prior", source="Dong et al. 2023")

    def init(self, prompts: Prompts) -> None:
        """RAFT carries nothing along."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        """Minus the selection's mean of log q, averaged over prompts."""
        return weighted_likelihood(forward, scored, self.select(scored))

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        return self.select.law(exact, self.group)


@dataclass(frozen=True)
class IteratedRAFT:
    """The same on draws of the policy itself, round after round. The reference moves along, and so there is no fixed point.

    Each round selects from what the last one made, so that selections compose: k rounds of `tilted` are the temperature
    beta / k, k rounds of the best of n the best of n^k, and the prior is forgotten. Only `above` is the same after one round
    as after many. To iterate towards p*, weigh by the prior as well: `EM`.

    Attributes:
        group: draws of each prompt in a step.
        select: what is kept of them.
    """

    group: int = 8
    select: Selection = best
    updates = 1
    claim = Claim(
        fixed_point="none",
        objective="a moving reference: after k rounds of exp(r/beta), temperature beta/k",
        data="on-policy",
        source="Dong et al. 2023; Singh et al. 2024",
    )

    def __post_init__(self) -> None:
        _require_group(self.group, self.select)

    def init(self, prompts: Prompts) -> None:
        """It carries nothing along: not even the prior."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        """Minus the selection's mean of log q, averaged over prompts."""
        return weighted_likelihood(forward, scored, self.select(scored))


def weighted_likelihood(forward: Forward, scored: Scored, weights: Float[Tensor, " B"]) -> tuple[Tensor, Info]:
    """-sum_i w_i log q(x_i), averaged over prompts; and the share of the draws that have weight."""
    kept = weights > 0  # what is not kept may be impossible for the policy, and 0 times -inf is no number
    prompts = len(scored.draws.prompt_index.unique())
    loss = -(weights[kept] * forward.log_q.sum(-1)[kept]).sum() / prompts
    return loss, {"kept": kept.double()}


def _require_group(group: int, select: Selection) -> None:
    if not callable(select):
        raise InputError(f"select is {select!r}; give best, tilted or above(threshold)")
    least = (select.n or 1) if isinstance(select, Best) else 1
    if group < least:
        raise InputError(f"group is {group}; {select} needs at least {least} completions a prompt")


PRESETS = {
    "rest": RAFT(select=above(0.0)),
    "soft-raft": RAFT(select=tilted),
    "iterated-soft-raft": IteratedRAFT(select=tilted),
}
