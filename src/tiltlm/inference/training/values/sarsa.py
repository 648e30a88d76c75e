"""SARSA: the expected evidence of the law that draws, without a KL."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tiltlm.inference.training.values.temporal import lambda_return, per_completion, require_rates, squared
from tiltlm.posterior.exact import Exact
from tiltlm.posterior.values import Tree, tilted_backup
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class SARSA:
    """Classical SARSA (Rummery & Niranjan 1994): Q(s_t, a_t) goes to Q(s_{t+1}, a_{t+1}).

    What later tokens pay in KL is left out of the value, so the law pi0 exp(Q) that draws next is not p*: it settles where Q
    is the expected evidence of that very law, which leans too far towards prefixes whose good ends the prior hardly writes.
    `SoftSARSA` is the version that reaches p*.

    Attributes:
        group, updates, trace, target_rate: as of `SoftSARSA`.
    """

    group: int = 8
    updates: int = 2
    trace: float = 0.9
    target_rate: float = 0.2
    claim = Claim(
        fixed_point="pi0 exp(Q), Q = E[r / beta] under itself",
        objective="Bellman error of the law that draws",
        bias="none",
        data="on-policy",
        needs=frozenset({"q", "q_target"}),
        source="Rummery & Niranjan 1994; Sutton & Barto 2018, eq. 6.7",
    )

    def __post_init__(self) -> None:
        require_rates(self.trace, self.target_rate)

    def init(self, prompts: Prompts) -> None:
        """Everything is in the critic."""

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        """The law it ends at, by backward induction."""
        tree = Tree(exact)
        return tree.log_law(tree.fixed_point(tilted_backup))

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        assert forward.q is not None
        assert forward.q_target is not None
        difference = forward.q - lambda_return(forward.q_target, forward.q_target, scored, self.trace)
        return per_completion(squared(difference), scored), {"td_error": difference.detach()[scored.draws.mask].abs()}
