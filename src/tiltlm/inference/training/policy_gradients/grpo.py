"""GRPO and its relatives: group-relative advantages in PPO's surrogate, every habit of the family an option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError, at_least_one, not_negative
from tiltlm.inference.training import settling
from tiltlm.inference.training.policy_gradients.advantages import (
    Advantage,
    batch_standardised,
    centred,
    leave_one_out,
    standardised,
    standardised_population,
    uncentred,
)
from tiltlm.inference.training.policy_gradients.aggregate import (
    Aggregate,
    constant_length,
    sequence_mean,
    token_mean,
    total,
)
from tiltlm.inference.training.policy_gradients.credit import Credit, to_go, whole
from tiltlm.inference.training.policy_gradients.importance import Importance, clipped, sequence_ratio, token_ratio
from tiltlm.inference.training.policy_gradients.kl_terms import (
    Estimator,
    Level,
    Place,
    by_sequence,
    by_token,
    exact,
    in_both,
    in_loss,
    in_reward,
    k1,
    k2,
    k3,
    k3_corrected,
    no_kl,
    token_kl,
)
from tiltlm.posterior.exact import Exact
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored


@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimisation (Shao et al. 2024, eq. 3), by default with the paper's habits.

    A draw's credits are r / beta minus `kl_coefficient` times what its tokens are charged for the KL; its advantages compare them
    with its group's. The loss aggregates -min(ratio A, clip(ratio) A) + `kl_coefficient` penalty over tokens. The coefficient
    is in nats: 1 is the target's own beta where advantages are in units of the reward; where they are divided by a standard
    deviation it is what TRL and verl call beta.

    The claim follows from the options and is about the first update on a batch, where every ratio is 1 and nothing is clipped:
    - all of the KL in the credits (`k1`, `in_reward`): at p* all credits of a prompt are log Z, so every advantage is 0
      however it is normalised and aggregated, and p* is stationary. With `leave_one_out` and `total` the gradient is unbiased.
      With `to_go` they are 0 on average, if tokens weigh evenly (`total`, `constant_length`).
    - the KL in the loss: only `k2` (or `k3_corrected`) `by_sequence` has the gradient of KL(q || pi0), and the advantage shifts
      the balance: `centred` to the temperature beta / (1 - 1/G), a standard deviation to one that depends on the policy.
      Where it settles is computed by `settles_at`.
    - no KL, or `k1` in the loss, whose expected gradient is zero: a point mass.

    Attributes:
        group: completions of each prompt in a step, at least 2.
        advantage: `standardised` (ddof 1), `standardised_population`, `batch_standardised`, `centred`, `leave_one_out`,
            `uncentred`.
        aggregate: `sequence_mean`, `token_mean`, `constant_length`, `total`.
        kl: `k1`, `k2`, `k3`, `k3_corrected`, `exact` or `no_kl`; a function of (log pi / pi0, exact KL, log pi / pi_old).
        place: `in_reward`, `in_loss`, or `in_both`, which with `exact` is the Rao-Blackwellised gradient.
        level: `by_token` or `by_sequence`: what the estimator is applied to.
        credit: `whole`, or the reward `to_go`.
        importance: `token_ratio` or `sequence_ratio`.
        kl_coefficient: weight of the KL against r / beta, in nats.
        clip_low, clip_high: how far below and above 1 a ratio counts.
        max_length: longest completion, the law's `max_new_tokens`; only `constant_length` reads it.
        updates: steps on each batch.
    """

    group: int = 8
    advantage: Advantage = standardised
    aggregate: Aggregate = sequence_mean
    kl: Estimator = k3
    place: Place = in_loss
    level: Level = by_token
    credit: Credit = whole
    importance: Importance = token_ratio
    kl_coefficient: float = 0.04
    clip_low: float = 0.2
    clip_high: float = 0.2
    max_length: int = 64
    updates: int = 1

    def __post_init__(self) -> None:
        if self.group < 2:
            raise InputError(f"group is {self.group}; GRPO compares the completions of a prompt, so take at least 2")
        at_least_one(self, "updates", "max_length")
        not_negative(self, "kl_coefficient")
        if not (0 < self.clip_low <= 1 and self.clip_high > 0):
            raise InputError(
                f"clip_low is {self.clip_low} and clip_high is {self.clip_high}; both must be positive, clip_low at most 1"
            )

    @property
    def claim(self) -> Claim:
        fixed_point, objective, bias = implied(self)
        return Claim(
            fixed_point=fixed_point,
            objective=objective,
            bias=bias if self.updates == 1 else "unknown",
            needs=frozenset({"log_q", "kl"} if self.kl is exact else {"log_q"}),
            zero_variance=_all_in_credits(self) and self.credit is whole and self.advantage is not uncentred,
            source="Shao et al. 2024, eq. 3",
        )

    def init(self, prompts: Prompts) -> None:
        """GRPO carries nothing along."""

    def loss(self, forward: Forward, scored: Scored, state: None = None) -> tuple[Tensor, Info]:
        draws = scored.draws
        kl = token_kl(self.kl, self.level, self.place, forward, scored).times(self.kl_coefficient)
        advantage = self.advantage(self.credit(scored.log_evidence, kl), draws.prompt_index).detach()
        ratio = self.importance(forward.log_q - draws.log_q, draws.mask)
        surrogate = clipped(ratio, advantage, self.clip_low, self.clip_high)
        loss = self.aggregate(kl.penalty - surrogate, draws.mask, self.max_length)
        outside = ((ratio < 1 - self.clip_low) | (ratio > 1 + self.clip_high))[draws.mask]
        return loss, {"advantage": advantage[:, 0].abs(), "ratio": ratio.detach()[draws.mask], "outside_clip": outside}

    def settles_at(self, exact: Exact) -> Float[Tensor, " K"] | None:
        """The law that these settings come to rest at, for batches of one prompt; None where it is not known."""
        name, _, _ = implied(self)
        if name in ("p*", "none"):
            return exact.log_posterior if name == "p*" else None
        if self.place is not in_loss:
            return (exact.log_prior + exact.scored.log_evidence.double() / self.kl_coefficient).log_softmax(0)
        branches = settling.completions if self.level is by_sequence and self.kl in _PHI else settling.prefixes
        phi = _PHI.get(self.kl, settling.reverse)
        penalty = settling.Penalty(branches, phi, self.kl_coefficient, of_states=self.kl not in _PHI)
        return settling.settled_law(exact, self.group, self.advantage, self.aggregate, self.max_length, penalty)


_PHI: Mapping[Estimator, Callable[[Tensor], Tensor]] = {
    k2: settling.reverse,
    k3: settling.forward,
    k3_corrected: settling.reverse,
}
"""Of the estimators of a log-ratio, the divergence that they descend in the loss."""
_UNIT = (leave_one_out, uncentred)
"""Advantages whose expected gradient is that of the mean credit; `centred` has 1 - 1/G of it."""
_EVEN = (total, constant_length)
"""Aggregations in which every token of every batch weighs the same."""
_KNOWN = (
    {leave_one_out, uncentred, centred, standardised, standardised_population, batch_standardised},
    {total, constant_length, sequence_mean, token_mean},
    {whole, to_go},
    {by_token, by_sequence},
    {k1, k2, k3, k3_corrected, exact, no_kl},
    {in_reward, in_loss, in_both},
)

Verdict = tuple[str, str, Literal["none", "1/n", "unknown"]]


def implied(engine: GRPO) -> Verdict:
    """Fixed point, objective and bias of the first update, from the options."""
    chosen = (engine.advantage, engine.aggregate, engine.credit, engine.level, engine.kl, engine.place)
    if not all(option in known for option, known in zip(chosen, _KNOWN, strict=True)):
        return "none", "not known: a behaviour of your own", "unknown"
    if engine.kl is no_kl or engine.kl_coefficient == 0 or (engine.kl is k1 and engine.place is in_loss):
        return "none", "normalised reward without a KL: ends in a point mass", "unknown"
    if engine.place is in_loss:
        return _in_loss(engine)
    return _in_credits(engine)


def _all_in_credits(engine: GRPO) -> bool:
    return engine.kl is k1 and engine.place is in_reward


def _in_credits(engine: GRPO) -> Verdict:
    """The KL in the credits, or in credits and loss."""
    even, unit = engine.aggregate in _EVEN, engine.advantage in _UNIT
    linear = unit or engine.advantage is centred
    split = engine.credit is to_go and engine.level is by_sequence  # charges spread over tokens cannot be cut in time
    if _all_in_credits(engine):
        # To go, a token's credit at p* is V*(s_t), which does not know the token; evenly weighed it wants nothing on average.
        sound = (engine.credit is whole and engine.advantage is not uncentred) or (even and not split)
    else:
        # `centred` shrinks the charge and not the penalty: off by order 1/G, where everything else is exact.
        nearly = engine.advantage is centred and engine.aggregate is total and engine.kl_coefficient == 1
        product_rule = engine.place is in_both and engine.kl in (k1, k3, exact) and not split
        sound = product_rule and ((unit and even) or nearly)
    if not sound:
        return "none", "not known: the KL's terms do not add up to the gradient of one divergence", "unknown"
    if engine.kl_coefficient != 1:
        return "p* at another beta", f"KL(q||pi0 exp(r/({engine.kl_coefficient:g} beta)))", "unknown"
    if engine.aggregate is not total or not linear:
        return "p*", "advantages, zero at p*", "unknown"
    return "p*", "KL(q||p*)", "none" if unit else "1/n"


def _in_loss(engine: GRPO) -> Verdict:
    """The KL in the loss alone: which divergence it descends, and what the advantage and the lengths make of it."""
    c, by_tokens = f"{engine.kl_coefficient:g}", engine.level is by_token
    if engine.advantage is uncentred and engine.aggregate not in _EVEN:
        return "none", "not known: what a length weighs depends on the reward's offset", "unknown"
    if engine.kl is k3:
        name = "own-token forward-KL law" if by_tokens else "forward-KL law"
        return name, f"advantage - {c} KL(pi0||q){' of own tokens' if by_tokens else ''}", "unknown"
    if engine.kl is exact or by_tokens:
        return "own-token-KL law", f"advantage - {c} KL(q||pi0) of own tokens", "unknown"
    return _tilted(engine)


def _tilted(engine: GRPO) -> Verdict:
    """The whole KL(q || pi0) in the loss: a tilt of pi0, by what the advantages come to."""
    c, even = engine.kl_coefficient, engine.aggregate in _EVEN
    if engine.advantage not in (*_UNIT, centred):
        return "self-consistent tilt", f"pi0 exp(E[A|x]/{c:g}), A under the law itself", "unknown"
    if not even:
        return "length-tilted p*", f"pi0 exp((r/beta + kappa|x|)/{c:g})", "unknown"
    if engine.advantage is centred:
        return "p* at another beta", f"pi0 exp((1 - 1/G) r/({c:g} beta))", "unknown"
    if c != 1:
        return "p* at another beta", f"KL(q||pi0 exp(r/({c:g} beta)))", "unknown"
    return "p*", "KL(q||p*)", "none" if engine.aggregate is total else "unknown"


PRESETS: Mapping[str, GRPO] = {
    "grpo": GRPO(),
    "dr-grpo": GRPO(advantage=centred, aggregate=constant_length, kl=no_kl),
    "dr-grpo-kl": GRPO(advantage=centred, aggregate=constant_length, kl=k2, level=by_sequence, kl_coefficient=1.0),
    "dapo": GRPO(aggregate=token_mean, kl=no_kl, clip_high=0.28),
    "gspo": GRPO(importance=sequence_ratio, kl=no_kl, clip_low=3e-4, clip_high=4e-4),
    "reinforce++-baseline": GRPO(advantage=batch_standardised, aggregate=token_mean, kl=k2, kl_coefficient=0.3),
    "grpo-tilt": GRPO(advantage=leave_one_out, aggregate=total, kl=k1, place=in_reward, kl_coefficient=1.0),
}
"""Named settings. `grpo`: DeepSeekMath's (Shao et al. 2024). `dr-grpo`: Liu et al. 2025, without a KL as published; `dr-grpo-kl`
adds one whose gradient is right. `dapo`: Yu et al. 2025, without its dynamic sampling. `gspo`: Zheng et al. 2025, section 5.1.
`reinforce++-baseline`: Hu et al. 2025; the coefficient is ours. `grpo-tilt`: ours, which reaches p*."""
