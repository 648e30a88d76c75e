"""Draws that another program made of the same law: how far its law is from ours, and what corrects for that.

A program such as vLLM runs the same weights with other kernels, so that the law mu which it samples is not quite the law q
that we score, train and certify (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
Both log-probabilities of every drawn token are known: the program reports log mu, and one pass of our own model gives log q.
A completion x that was drawn from mu then counts for q with the weight

    w(x) = min(q(x) / mu(x), TRUNCATE),        E_mu[w f] = E_q[f] - error,   |error| <= lost * sup|f|,   lost = E_mu[(q / mu - TRUNCATE)+]

of the whole completion, not of its tokens: a product of per-token weights that are each truncated has no such bound. Truncation
(Ionides 2008) keeps the variance finite; what it leaves out is measured as `lost`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.records import Draws

TRUNCATE = 2.0
"""The largest weight that a completion may have."""
LEAST_CEILING = 1.25
"""The least that `ceilings` gives: below it nothing would be saved."""
ENOUGH = 32
"""Completions from which a batch's weights can be judged: of fewer, one large weight is most of them by chance."""


@dataclass(frozen=True)
class Mismatch:
    """How far the law that drew a batch is from the law that its draws count for.

    Attributes:
        mean: mean over tokens of |log q - log mu|, in nats; of those that our law can draw at all, which with top-k may not be all.
        largest: the largest of all of them.
        kl: mean over completions of log mu - log q: an estimate of KL(mu || q), in nats; infinite where our law cannot draw one.
        ess: effective sample size of the completions' weights, as a share of their number; 1 where the laws are equal.
        lost: probability of our law that truncated weights leave out.
    """

    mean: float
    largest: float
    kl: float
    ess: float
    lost: float

    @staticmethod
    def of(draws: Draws) -> Mismatch:
        """Measured on draws with `log_mu`."""
        ratio, gaps = log_ratio(draws), _token_ratio(draws).abs()[draws.mask]
        share = (2 * ratio.logsumexp(0) - (2 * ratio).logsumexp(0)).exp() / max(1, len(ratio))
        return Mismatch(
            mean=float(gaps[gaps.isfinite()].mean().nan_to_num(nan=0.0)),
            largest=float(gaps.max()) if len(gaps) else 0.0,
            kl=float(-ratio.mean()),
            ess=float(share.nan_to_num(nan=0.0)),  # no weight at all is no sample at all
            lost=float((ratio.exp() - TRUNCATE).clamp(min=0).mean()),
        )

    def metrics(self) -> dict[str, float]:
        """As a training run logs them."""
        return {f"mismatch/{name}": value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Tolerance:
    """Where a mismatch stops being rounding. Beyond it weights do not correct, and something is wrong.

    The defaults pass the rounding of half precision over some hundred tokens, and nothing that is another model.

    Attributes:
        mean: largest mean |log q - log mu| of a token, in nats.
        ess: least effective share of a batch, of those with at least `ENOUGH` completions.
        lost: largest probability that truncation may leave out, of such a batch.
    """

    mean: float = 0.1
    ess: float = 0.5
    lost: float = 0.1

    def __post_init__(self) -> None:
        if not (self.mean > 0 and 0 < self.ess < 1 and 0 < self.lost < 1):
            raise InputError(
                f"mean is {self.mean}, ess is {self.ess} and lost is {self.lost}; mean must be positive, the others between 0 and 1"
            )

    def require(self, draws: Draws, whose: str) -> None:
        """Refuse draws whose law is too far from the one they are to count for.

        Args:
            whose: what drew them, for the message.

        Raises:
            InputError: with what was measured, and what may be wrong.
        """
        found = Mismatch.of(draws)
        least, most = (self.ess, self.lost) if len(draws) >= ENOUGH else (1e-9, math.inf)
        if found.mean <= self.mean and found.ess >= least and found.lost <= most:
            return
        raise InputError(
            f"{whose} draws from another law than the model here: a token's log-probability differs by {found.mean:.3g} nats on "
            f"average and {found.largest:.3g} at most, and {found.ess:.0%} of the draws count (at most {self.mean:g}, at least "
            f"{self.ess:.0%} are allowed, and {self.lost:.0%} lost to truncation, here {found.lost:.1%}); see that it serves the same "
            f"model in the same precision, with the newest adapter and logprobs-mode processed_logprobs"
        )


def row_weights(draws: Draws) -> Float[Tensor, " B"] | None:
    """What each completion counts for; None where the draws are of the law that is on them."""
    if draws.log_mu is None:
        return None
    return log_ratio(draws).clamp(max=math.log(TRUNCATE)).exp()


def ceilings(log_ratio: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """For each draw the largest ratio among the others, at least `LEAST_CEILING` and at most `TRUNCATE`.

    It does not look at the draw itself, so that given the others `accept` keeps the draw with a probability in proportion to
    min(q, ceiling mu) / mu; and it is seldom surpassed, by one draw in as many as there are.
    """
    if len(log_ratio) < 2:
        return torch.full_like(log_ratio, TRUNCATE)
    first, second = log_ratio.topk(2).values
    others = torch.full_like(log_ratio, float(first))
    others[log_ratio.argmax()] = second
    return others.exp().clamp(LEAST_CEILING, TRUNCATE)


def accept(
    log_ratio: Float[Tensor, " B"], ceiling: Float[Tensor, " B"], uniform: Float[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """Which draws of mu to keep, so that the kept ones are draws of q: rejection with the ratio's ceiling (von Neumann 1951).

    They are draws of min(q, ceiling mu), normalised: of q itself wherever q <= ceiling mu.
    """
    return uniform < log_ratio.exp() / ceiling


def log_ratio(draws: Draws) -> Float[Tensor, " B"]:
    """log q - log mu of each completion."""
    return _token_ratio(draws).sum(-1)


def _token_ratio(draws: Draws) -> Float[Tensor, "B T"]:
    assert draws.log_mu is not None
    return draws.log_q.double() - draws.log_mu.double()
