"""PPO with a value head on the language model, the KL per token in the reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from torch import Tensor, nn

from tiltlm.errors import InputError, at_least_one
from tiltlm.inference.training.policy_gradients.aggregate import (
    Aggregate,
    constant_length,
    sequence_mean,
    token_mean,
    total,
)
from tiltlm.inference.training.policy_gradients.importance import clipped
from tiltlm.inference.training.policy_gradients.kl_terms import KLTerm, rao_blackwell, sampled
from tiltlm.inference.training.policy_gradients.reinforce import needs_of
from tiltlm.posterior.exact import Exact, kl
from tiltlm.posterior.values import Tree
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored

# --- advantages as they are, or whitened ---

Scale = Callable[[Float[Tensor, "B T"], Bool[Tensor, "B T"]], Float[Tensor, "B T"]]


def as_they_are(advantage: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """In nats."""
    return advantage


def whitened(advantage: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Minus their mean, over their deviation, over all tokens of the batch.

    At p* with V = V* they are 0 and stay 0. Elsewhere the step's length no longer says how far p* is, and its direction is
    biased, because a draw is part of its own mean.
    """
    inside = advantage[mask]
    centred = inside - inside.mean()
    return torch.zeros_like(advantage).masked_scatter(mask, centred * (centred.square().mean() + 1e-8).rsqrt())


# --- controllers of the KL's coefficient ---

Controller = Callable[[float, float, float], float]
"""(coefficient, measured KL, its target) -> coefficient."""


def fixed(coefficient: float, measured: float, target: float) -> float:
    """No controller: the target's own beta."""
    return coefficient


def proportional(coefficient: float, measured: float, target: float) -> float:
    """Up by as much as 2% a batch while the KL is above its target, down while it is below (Ziegler et al. 2019)."""
    return coefficient * (1 + 0.1 * min(0.2, max(-0.2, measured / target - 1)))


class PPOState(nn.Module):
    """What PPO carries along.

    Attributes:
        kl_coefficient: weight of the KL against r / beta; 1 unless a controller moves it.
        begun: the batch in work, and V of its states as it was when the batch was new.
    """

    kl_coefficient: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kl_coefficient", torch.ones((), dtype=torch.float64))
        self.begun: tuple[Scored, Tensor] | None = None

    def values_at_start(self, scored: Scored, values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """V before the first update on this batch; a batch is known again by being the same object."""
        if self.begun is None or self.begun[0] is not scored:
            self.begun = scored, values.detach().clone()
        return self.begun[1]


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation (Schulman et al. 2017, eq. 7; for language models Ziegler et al. 2019, eq. 2).

    In nats, a token earns -c log pi_old / pi0 and the last one r / beta besides; c is 1 unless a controller moves it. Advantages
    are GAE(gamma, lam) on V, the values' targets V + advantage, both from before the first update on the batch.

    What is proved. On the first update of a batch, with gamma = lam = 1 and `total`, the expected gradient is that of
    KL(q || p*) whatever V is. At p* with V = V* = log E_pi0[exp(r / beta) | s] every token's temporal difference is 0, so
    p* and V* stand still together, for any lam, aggregation, clip and number of updates. With lam < 1 and another V, and from the
    second update on, where the ratio of a token does not see how likely the states before it have become and clipped tokens
    drop out, the gradient is biased by an unknown amount: the claim then says so. `rao_blackwell` is unbiased as `sampled` is, but
    at p* its advantages vanish only on average, so there the claim is p* only for unwhitened advantages and even aggregation.

    Attributes:
        group: completions of each prompt in a step; 1 is enough, because V is the baseline.
        updates: steps on each batch.
        gamma: discount; below 1 the fixed point is another law, which `settles_at` gives.
        lam: lambda of the advantage estimate.
        clip_low, clip_high: how far below and above 1 a token's ratio counts.
        value_clip: how far V may move on a batch before its error stops counting, in nats; inf for no limit.
        scale: advantages `as_they_are`, or `whitened`.
        aggregate: `total`, `constant_length`, `sequence_mean` or `token_mean`.
        kl: `sampled`, or `rao_blackwell`.
        controller: `fixed`, or `proportional`, which moves the KL's coefficient c until the KL is `kl_target`: then the fixed
            point is pi0 exp(r / (c beta)), not p*.
        kl_target: nats a completion; only a controller reads it.
        max_length: the law's `max_new_tokens`, by which `constant_length` and the values' loss are divided.
    """

    group: int = 8
    updates: int = 4
    gamma: float = 1.0
    lam: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = math.inf
    scale: Scale = as_they_are
    aggregate: Aggregate = total
    kl: KLTerm = sampled
    controller: Controller = fixed
    kl_target: float = 6.0
    max_length: int = 64

    def __post_init__(self) -> None:
        at_least_one(self, "group", "updates", "max_length")
        for name in ("gamma", "lam"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1 (1 is exact)")
        for name in ("clip_low", "clip_high", "value_clip", "kl_target"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def claim(self) -> Claim:
        fixed_point, objective, bias = _verdict(self)
        return Claim(
            fixed_point=fixed_point,
            objective=objective,
            bias=bias,
            needs=needs_of(self.kl) | {"values"},
            zero_variance=self.kl is sampled,
            source="Schulman et al. 2017, eq. 7; Ziegler et al. 2019, eq. 2",
        )

    def init(self, prompts: Prompts) -> PPOState:
        return PPOState()

    def observe(self, scored: Scored, state: PPOState) -> None:
        if self.controller is not fixed:
            measured = float((scored.draws.log_q - scored.log_prior).sum(-1).double().mean())
            state.kl_coefficient.fill_(self.controller(float(state.kl_coefficient), measured, self.kl_target))

    def loss(self, forward: Forward, scored: Scored, state: PPOState) -> tuple[Tensor, Info]:
        assert forward.values is not None
        draws, mask = scored.draws, scored.draws.mask
        term = self.kl(forward, scored).times(state.kl_coefficient)
        before = state.values_at_start(scored, forward.values)
        difference = residuals(scored, term.charge, before, self.gamma)
        advantage = discounted(difference, self.gamma * self.lam).detach()
        ratio = (forward.log_q - draws.log_q).exp()
        surrogate = clipped(ratio, self.scale(advantage, mask), self.clip_low, self.clip_high)
        policy_loss = self.aggregate(term.penalty - surrogate, mask, self.max_length)
        error = value_error(forward.values, before, before + advantage, self.value_clip)
        outside = ((ratio < 1 - self.clip_low) | (ratio > 1 + self.clip_high))[mask]
        # An even weight for every state: a mean over the batch's tokens would tilt V towards what short batches return.
        return policy_loss + constant_length(error, mask, self.max_length) / 2, {
            "advantage": advantage[mask].abs(),
            "value_error": error.detach()[mask],
            "outside_clip": outside,
            "kl_coefficient": state.kl_coefficient.clone(),
        }

    # --- where it comes to rest ---

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"] | None:
        """The law of these settings' fixed point; None where it is not known."""
        if _verdict(self)[0] == "none":
            return None
        return _soft_law(exact, self.gamma, self._coefficient(exact))[0]

    def values_at(self, exact: Exact) -> Float[Tensor, "K T"]:
        """V at the fixed point, in nats: the soft values of the law that it settles at."""
        return _soft_law(exact, self.gamma, self._coefficient(exact))[1]

    def rest(self, exact: Exact, state: PPOState) -> None:
        """Put the KL's coefficient where the controller comes to rest."""
        state.kl_coefficient.fill_(self._coefficient(exact))

    def _coefficient(self, exact: Exact) -> float:
        """The c at which the KL of the fixed point is the controller's target."""
        if self.controller is fixed:
            return 1.0

        def excess(log_c: float) -> float:
            return kl(_soft_law(exact, self.gamma, math.exp(log_c))[0], exact.log_prior) - self.kl_target

        try:
            return math.exp(brentq(excess, -6.0, 12.0, xtol=1e-14))  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise InputError(
                f"kl_target is {self.kl_target:g} nats, which no beta of this target reaches; lower kl_target"
            ) from error


def residuals(
    scored: Scored, charge: Float[Tensor, "B T"], values: Float[Tensor, "B T"], gamma: float
) -> Float[Tensor, "B T"]:
    """Temporal differences -charge_t + [t last] r / beta + gamma V(s_{t+1}) - V(s_t); after the last token V is 0."""
    mask = scored.draws.mask
    follows = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    later = torch.nn.functional.pad(values[:, 1:], (0, 1)) * follows
    reward = torch.where(mask & ~follows, scored.log_evidence[:, None], 0.0)
    return (reward - charge + gamma * later - values) * mask


def discounted(values: Float[Tensor, "B T"], factor: float) -> Float[Tensor, "B T"]:
    """sum_{u >= t} factor^(u - t) values_u (Schulman et al. 2016, eq. 16)."""
    if factor == 1:
        return values.flip(-1).cumsum(-1).flip(-1)
    sums, later = [], torch.zeros_like(values[:, 0])
    for column in reversed(values.unbind(-1)):
        later = column + factor * later
        sums.append(later)
    return torch.stack(sums[::-1], -1)


def value_error(values: Tensor, before: Tensor, target: Tensor, clip: float) -> Tensor:
    """Squared error, or that of V held within `clip` of where it was, whichever is larger: no reward for moving further."""
    held = before + (values - before).clamp(-clip, clip)
    return torch.maximum((values - target) ** 2, (held - target) ** 2)


Verdict = tuple[str, str, Literal["none", "unknown"]]


def _verdict(engine: PPO) -> Verdict:
    """Fixed point, objective and bias of the first update, from the options."""
    even = engine.aggregate in (total, constant_length)
    known = engine.scale in (as_they_are, whitened) and engine.kl in (sampled, rao_blackwell)
    if not known or not (even or engine.aggregate in (sequence_mean, token_mean)):
        return "none", "not known: a behaviour of your own", "unknown"
    if engine.kl is rao_blackwell and not (even and engine.scale is as_they_are and engine.gamma == 1):
        return "none", "not known: the two halves of the KL's gradient weigh differently", "unknown"
    if engine.gamma != 1:
        return "discounted soft law", f"reward and KL discounted by {engine.gamma:g} a token", "unknown"
    if engine.controller is not fixed:
        return (
            "p* at another beta",
            f"KL(q||pi0 exp(r/(c beta))), c such that its KL is {engine.kl_target:g}",
            "unknown",
        )
    exact = engine.lam == 1 and engine.updates == 1 and engine.aggregate is total and engine.scale is as_they_are
    return "p*", "KL(q||p*)", "none" if exact else "unknown"


def _soft_law(exact: Exact, gamma: float, c: float) -> tuple[Float[Tensor, " K"], Float[Tensor, "K T"]]:
    """The law pi(a|s) prop. to pi0(a|s) exp(gamma V(s') / c), V(s) = c log E_pi0 exp(gamma V(s') / c), and V of every state.

    At the end stands r / beta, undiscounted. With gamma = 1 it is pi0 exp(r / (c beta)). It is where every temporal difference
    vanishes.
    """
    tree = Tree(exact)

    def soft(log_prior: Float[Tensor, "S A"], q: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
        return c * (log_prior + q / c).logsumexp(-1)

    q = tree.fixed_point(lambda log_prior, q: gamma * soft(log_prior, q))
    values = soft(tree.by_state(tree.log_prior), tree.by_state(q))
    return tree.log_law(q / c), tree.completions(values[tree.state_of])


PRESETS: Mapping[str, Any] = {
    "ppo-adaptive-kl": PPO(controller=proportional, kl_target=0.5),
}
"""Named settings: `ppo-adaptive-kl` moves beta until the KL is 0.5 nats, which is not p*."""
