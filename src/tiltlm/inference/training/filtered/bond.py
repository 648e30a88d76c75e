"""BOND: distil best-of-n from both sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.win_rate import best_of_n_reward
from tiltlm.inference.training.filtered.raft import Best, weighted_likelihood
from tiltlm.inference.training.preferences.pairs import log_ratio
from tiltlm.posterior.exact import Exact, best_of_n_law
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored
from tiltlm.weights import group_count


@dataclass(frozen=True)
class BOND:
    """Jeffreys' divergence (1 - b) KL(pi_n || q) + b KL(q || pi_n) to the law pi_n of best-of-n (Sessa et al. 2024, eq. 13).

    Everything is estimated from one group of M prior draws. The forward part is the likelihood of the best of n, averaged over
    all subsets of n, and without bias. The backward part is a policy gradient, E_q[log(q / pi_n) grad log q], as an average over
    the prior draws weighted by q / pi0; near the optimum that ratio is at most n, because pi_n <= n pi0. It needs
    log(pi_n / pi0) = (n - 1) r_BOND, whose F and F_- are the group's shares of rewards at most, and less than, the
    completion's, itself among them (Theorem 1 and eq. 8, with ties as `best_of_n_law` breaks them). The logarithm of a share is
    biased by about 1 / M, and so is this part.

    What it settles at depends on the order of the rewards alone: n takes the place of the target's beta. The paper's
    iteration with a moving anchor (J-BOND) is left out, since it aims at another n with every step.

    Attributes:
        group: prior draws of each prompt in a step, M; at least n, better several times as many.
        n: draws of the best-of-n that is distilled; at least 2.
        backward: the share b of KL(q || pi_n).
    """

    group: int = 16
    n: int = 2
    backward: float = 0.5
    updates = 1

    def __post_init__(self) -> None:
        if self.n < 2:
            raise InputError(f"n is {self.n}; the best of fewer than 2 draws is the prior")
        if self.group < self.n:
            raise InputError(f"group is {self.group}, but the best of n = {self.n} is taken of it; draw at least n")
        if not 0 <= self.backward <= 1:
            raise InputError(f"backward is {self.backward}; it is a share between 0 and 1, for example 0.5")

    @property
    def claim(self) -> Claim:
        """The law of best-of-n; without the backward part there is no bias."""
        return Claim(
            fixed_point="best-of-n",
            objective="Jeffreys divergence to best-of-n",
            bias="1/n" if self.backward else "none",
            data="prior",
            source="Sessa et al. 2024, eq. 13",
        )

    def init(self, prompts: Prompts) -> None:
        """BOND carries nothing along."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        """A loss whose gradient is the divergence's; its value is not the divergence."""
        forward_part, _ = weighted_likelihood(forward, scored, Best(self.n)(scored))
        ratio = log_ratio(forward, scored).detach()
        log_density = (self.n - 1) * self._reward(scored)  # log pi_n / pi0
        coefficient = ratio.exp() * (ratio - log_density)
        backward_part = (coefficient * forward.log_q.sum(-1)).mean()
        loss = (1 - self.backward) * forward_part + self.backward * backward_part
        return loss, {"kl_best_of_n": coefficient}

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        return best_of_n_law(exact, self.n).log()

    def _reward(self, scored: Scored) -> Float[Tensor, " B"]:
        """r_BOND of each draw, from the shares of its group."""
        index, reward = scored.draws.prompt_index, scored.log_evidence
        peers = (index[:, None] == index[None, :]).double()
        count = group_count(index, int(index.max()) + 1)[index]
        upto = (peers * (reward[None, :] <= reward[:, None])).sum(-1) / count
        less = (peers * (reward[None, :] < reward[:, None])).sum(-1) / count
        return torch.where(reward > -torch.inf, best_of_n_reward(upto, less, self.n), -torch.inf)


PRESETS = {"best-of-n-distillation": BOND(backward=0.0), "vbon": BOND(backward=1.0)}
