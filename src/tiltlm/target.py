"""prior × evidence = posterior: the algebra of targets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.records import Draws, Likelihood, Scored

if TYPE_CHECKING:
    from tiltlm.protocols import Evidence, Prior


@dataclass(frozen=True)
class Target:
    """The posterior p*(x|c) ∝ pi0(x|c) · exp(r(x, c) / beta), known up to Z(c) (Korbak et al. 2022).

    Made by `prior * evidence`; a further `* evidence` multiplies in more.
    """

    prior: Prior
    evidence: Evidence

    def __post_init__(self) -> None:
        if not hasattr(self.evidence, "log_likelihood"):
            raise InputError(
                f"evidence is {type(self.evidence).__name__}, a reward function without a temperature; write "
                f"prior * Reward(function, beta=…)"
            )

    def __mul__(self, evidence: Evidence) -> Target:
        return Target(self.prior, self.evidence + evidence)  # pyright: ignore[reportOperatorIssue]

    @property
    def beta(self) -> float:
        """The evidence's temperature, in reward units per nat."""
        return self.evidence.beta

    def at(self, beta: float) -> Target:
        """The same prior and rewards at another temperature."""
        return replace(self, evidence=self.evidence.at(beta))

    def score(self, draws: Draws) -> Scored:
        """Both factors of the target for each completion.

        Completions that the evidence dropped are left out and counted. Draws of the prior itself are not
        scored again: the log-probability of the law that drew them is on them.
        """
        return self.joined(draws, self.evidence.log_likelihood(draws))

    def joined(self, draws: Draws, likelihood: Likelihood, log_prior: Float[Tensor, "B T"] | None = None) -> Scored:
        """Completions with what the evidence said of them.

        Args:
            log_prior: their log-probabilities under the prior, where they are known.
        """
        kept = likelihood.kept
        whole = bool(kept.all())
        rows = draws if whole else draws.select(kept)
        if log_prior is None:
            log_prior = self.prior.log_prob(rows) if len(rows) else rows.log_q
        elif not whole:
            log_prior = log_prior[kept]
        return Scored(
            draws=rows,
            log_prior=log_prior,
            log_evidence=likelihood.log if whole else likelihood.log[kept],
            rewards={name: value if whole else value[kept] for name, value in likelihood.rewards.items()},
            beta=self.beta,
            dropped=int((~kept).sum()),
        )


def require_finite(scored: Scored) -> Scored:
    """Pass `scored` through, or raise if a log-probability is NaN. The evidence may be: of given completions it is not known."""
    if torch.isnan(scored.log_prior.sum(-1) - scored.draws.log_prob).any():
        raise FloatingPointError("a log-weight is NaN: the model returned NaN logits; try dtype=float32")
    return scored


def require_trainable(gradient_norm: float, scored: Scored) -> None:
    """Raise if the evidence is why a step has no gradient: it is unknown (NaN) or a hard constraint's -inf.

    Losses that do not ask for it, or that leave impossible completions out, have one.
    """
    if torch.isnan(scored.log_evidence).any() and not 0 < gradient_norm < math.inf:
        raise InputError(
            "the given completions have no rewards, and this engine learns from them; give them, source=Given(target.score(draws)), "
            "or take an engine that does without: SFT, or DPO on pairs"
        )
    impossible = scored.log_evidence == -torch.inf
    if impossible.any() and not math.isfinite(gradient_norm):
        raise InputError(
            f"training with this engine needs finite evidence, and {impossible.double().mean():.0%} of this step's completions "
            f"have -inf; soften the constraint, Constraint(fn, penalty=5.0), or train on samples that satisfy it"
        )
