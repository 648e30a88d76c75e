"""What `plan` predicts, as records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tiltlm.records import Estimate, Interval


@dataclass(frozen=True)
class FrontierPoint:
    """The predicted optimum at one beta, averaged over prompts.

    Attributes:
        reward, kl: E r and KL(p*_beta || pi0) in nats, with intervals for prompts like these.
        log_z: a lower bound in expectation (Jensen).
        ess: effective draws a prompt behind the prediction, mean over prompts.
        pareto_k: median over prompts of the shape of the weights' tail; above 0.7 do not trust.
        needed: draws a prompt that the prediction asks for, MARGIN * exp(KL) of the hardest tenth of the prompts.
        reliable: whether there are that many.
    """

    beta: float
    reward: Interval
    kl: Interval
    log_z: Estimate
    ess: float
    pareto_k: float
    needed: int
    reliable: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "beta": self.beta,
            "reward": self.reward.as_dict(),
            "kl": self.kl.as_dict(),
            "log_z": self.log_z.as_dict(),
            "ess": self.ess,
            "pareto_k": self.pareto_k if math.isfinite(self.pareto_k) else None,
            "needed_samples": self.needed,
            "reliable": self.reliable,
        }


@dataclass(frozen=True)
class BestOfNPoint:
    """Best of n, averaged over prompts: its exact law on the empirical reward distribution.

    Attributes:
        kl: KL to the prior, ties taken into account.
        kl_bound: log n - (n - 1) / n, which the KL never exceeds.
    """

    n: int
    reward: float
    kl: float
    kl_bound: float

    def as_dict(self) -> dict[str, float]:
        return {"n": self.n, "reward": self.reward, "kl": self.kl, "kl_bound": self.kl_bound}


@dataclass(frozen=True)
class PromptPlan:
    """The prediction for one prompt at the chosen beta; intervals over its own draws."""

    prompt: str
    n: int
    prior_reward: float
    reward: Interval
    kl: Interval
    log_z: Estimate
    ess: float
    pareto_k: float
    reliable: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "n": self.n,
            "prior_reward": self.prior_reward,
            "reward": self.reward.as_dict(),
            "kl": self.kl.as_dict(),
            "log_z": self.log_z.as_dict(),
            "ess": self.ess,
            "pareto_k": self.pareto_k if math.isfinite(self.pareto_k) else None,
            "reliable": self.reliable,
        }
