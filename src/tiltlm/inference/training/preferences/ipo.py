"""Identity preference optimisation: a regression on preferences, and the win-rate tilt that it ends at."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.training.preferences.pairs import Label, bradley_terry, compare, log_ratio, winner
from tiltlm.posterior.exact import Exact
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class IPO:
    """Squared distance of the log-ratios' difference from 1 / (2 tau), for the preferred against the other (Azar et al. 2024,
    eq. 17).

    Its minimum over pairs of the prior is pi0(x) exp(E_{x' ~ pi0} P(x > x') / tau) / Z, the posterior whose reward is the
    probability of beating a draw of the prior, and not p*. tau is the target's beta, which is then a temperature in units of
    that probability. For pairs of another law the win rate is that against this law, so that the result changes with the data;
    hence only pairs of the prior are taken. Of a data set of which one knows that, say so: `Given(pairs, origin="prior")`.

    Attributes:
        group: completions of each prompt in a step, at least 2. Given pairs are all taken.
        label: what the difference of two rewards says of a pair, where pairs are not given: `bradley_terry`, or `winner` for
            the tilt by the rank, which `prior * WinRate(...)` has for its posterior.
    """

    group: int = 4
    label: Label = bradley_terry
    updates = 1
    claim = Claim(
        fixed_point="win-rate tilt",
        objective="squared preference error",
        bias="none",
        data="prior",
        source="Azar et al. 2024, eq. 17",
    )

    def __post_init__(self) -> None:
        if self.group < 2:
            raise InputError(f"group is {self.group}; IPO compares completions of one prompt: draw at least 2")

    def init(self, prompts: Prompts) -> None:
        """IPO carries nothing along."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        """Mean squared error of the pairs, in squared nats."""
        pairs, preferred = compare(scored, self.label)
        first, second = log_ratio(forward, scored)[pairs].unbind(-1)
        margin, goal = first - second, 1 / (2 * scored.beta)
        loss = (preferred * (margin - goal) ** 2 + (1 - preferred) * (margin + goal) ** 2).mean()
        return loss, {"margin": (margin * (2 * preferred - 1)).detach()}

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"]:
        """log of pi0 exp(win rate / tau) / Z."""
        wins = self.label(exact.reward[:, None] - exact.reward[None, :]) @ exact.log_prior.exp()
        return (exact.log_prior + wins / exact.beta).log_softmax(0)


PRESETS = {"ipo-winner": IPO(label=winner)}
