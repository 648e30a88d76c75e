"""Controlled decoding: the prior tilted by the expected reward, which is not the posterior."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tiltlm.inference.training.values.temporal import per_completion, squared
from tiltlm.posterior.exact import Exact
from tiltlm.posterior.values import Tree, prior_backup
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class ControlledDecoding:
    """Fit Q(s_t, a_t) to r / beta at every token of prior draws: Q = E_pi0[r / beta | s + a] (CD-FUDGE, Mudgal et al. 2024).

    The law pi0 exp(Q), normalised token by token, is the best for one tilted token followed by the prior. As a law of whole
    completions it is not p*: by Jensen's inequality E[r / beta | s] <= V*(s), and the difference depends on the prefix.
    `SoftValueRegression` fits exp(r / beta) instead and reaches p*.

    Attributes:
        group: completions of each prompt in a step.
    """

    group: int = 16
    updates: int = 1
    claim = Claim(
        fixed_point="pi0 exp(E_pi0[r / beta | s + a]), token by token",
        objective="E_pi0 of the squared error of r / beta",
        bias="none",
        data="prior",
        needs=frozenset({"q"}),
        source="Mudgal et al. 2024, CD-FUDGE",
    )

    def init(self, prompts: Prompts) -> None:
        """Everything is in the critic."""

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        """The law it ends at, by backward induction."""
        tree = Tree(exact)
        return tree.log_law(tree.fixed_point(prior_backup))

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        assert forward.q is not None
        difference = forward.q - scored.log_evidence.to(forward.q.dtype)[:, None]
        return per_completion(squared(difference), scored), {"error": difference.detach()[scored.draws.mask].abs()}
