"""Our policy gradients in the words of `Objective`, behaviour by behaviour.

The engines work in nats: the credit is r / beta, the KL has a coefficient c. In units of the reward that is a KL of c beta; where a
standard deviation divides the credit, beta cancels in it, and a KL outside weighs c against an advantage without a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from tiltlm.explanation.closed_form import law_of
from tiltlm.explanation.objective import Baseline, Estimator, KLTerm, Length, Objective, Sampling, Scale
from tiltlm.inference.training.policy_gradients import advantages, aggregate, baselines, credit, importance, kl_terms
from tiltlm.inference.training.policy_gradients.grpo import GRPO
from tiltlm.inference.training.policy_gradients.ppo import PPO, as_they_are, fixed, proportional, whitened
from tiltlm.inference.training.policy_gradients.reinforce import Reinforce
from tiltlm.inference.training.policy_gradients.rloo import RLOO
from tiltlm.protocols import Claim

P_STARS = ("p*", "p* at another beta")
"""What claims call posteriors."""


def knows(engine: Any) -> bool:
    """Whether it is one of the policy gradients below."""
    return type(engine) in _WORDS


def objective_of(engine: Any, beta: float | None, temperature: float = 1.0) -> Objective:
    """What a policy gradient does, at a beta; in multiples of beta where that is None.

    p* is said of nothing that the engine itself does not claim it of, because its claim is proved for the small batches that
    are drawn, and a law here may be that of large ones.
    """
    objective = _WORDS[type(engine)](engine, beta)
    return replace(
        _within(engine.claim, objective),
        sampling=Sampling(temperature),
        scoring_temperature=temperature,
        prior_temperature=temperature,
    )


def _within(claim: Claim, objective: Objective) -> Objective:
    # Divided by a deviation, every prompt or batch has a beta of its own; that is called so, and is no p*.
    own = objective.scale != "none" and objective.kl_outside_scale
    if law_of(objective).name.startswith("p*") and not own and claim.fixed_point not in P_STARS:
        return replace(objective, unmodelled=(f"the engine claims {claim.fixed_point}: {claim.objective}",))
    return objective


# --- the words ---

_LENGTHS: Mapping[Any, Length] = {
    aggregate.total: "sum",
    aggregate.constant_length: "constant",
    aggregate.sequence_mean: "sequence mean",
    aggregate.token_mean: "batch mean",
}
_CREDITS = {credit.whole: (), credit.to_go: ()}
"""Which part of the KL a token answers for changes the noise, not the law; where it does, the claim says so."""
_TERMS: Mapping[Any, Estimator] = {kl_terms.sampled: "k1", kl_terms.rao_blackwell: "rao-blackwell"}
_BASELINES: Mapping[Any, Baseline] = {
    baselines.no_baseline: "none",
    baselines.of_the_others: "leave-one-out",
    baselines.of_the_group: "group mean",
    baselines.of_earlier_draws: "earlier draws",
}
_ADVANTAGES: Mapping[Any, tuple[Baseline, Scale, int]] = {
    advantages.uncentred: ("none", "none", 1),
    advantages.leave_one_out: ("leave-one-out", "none", 1),
    advantages.centred: ("group mean", "none", 1),
    advantages.standardised: ("group mean", "group std", 1),
    advantages.standardised_population: ("group mean", "group std", 0),
    advantages.batch_standardised: ("group mean", "batch std", 1),
}
_ESTIMATORS: Mapping[Any, Estimator] = {
    kl_terms.k1: "k1",
    kl_terms.k2: "k2",
    kl_terms.k3: "k3",
    kl_terms.k3_corrected: "k3",
    kl_terms.exact: "full",
}
_RATIOS: Mapping[Any, Literal["token", "sequence"]] = {
    importance.token_ratio: "token",
    importance.sequence_ratio: "sequence",
}
_PLACES = (kl_terms.in_reward, kl_terms.in_loss, kl_terms.in_both)


def _rloo(engine: RLOO, beta: float | None) -> Objective:
    return Objective(
        reward_kl=KLTerm(_or_one(beta), _TERMS.get(engine.kl, "k1"), "sequence"),
        group=engine.group,
        unit=_unit(beta),
        unmodelled=_own(engine, credit=_CREDITS, kl=_TERMS),
    )


def _reinforce(engine: Reinforce, beta: float | None) -> Objective:
    objective = replace(
        _rloo(RLOO(2, engine.credit, engine.kl), beta),
        baseline=_BASELINES.get(engine.baseline, "other"),
        group=engine.group,
        unmodelled=_own(engine, credit=_CREDITS, kl=_TERMS, baseline=_BASELINES),
    )
    if engine.kl is kl_terms.rao_blackwell and engine.baseline is baselines.of_the_group:
        halves = KLTerm(_or_one(beta), "full")  # one passes through the baseline, the other does not
        return replace(objective, reward_kl=halves, loss_kl=halves)
    return objective


def _ppo(engine: PPO, beta: float | None) -> Objective:
    scales: Mapping[Any, Scale] = {as_they_are: "none", whitened: "batch std"}
    targets: Mapping[Any, float | None] = {fixed: None, proportional: engine.kl_target}
    return Objective(
        reward_kl=KLTerm(_or_one(beta), _TERMS.get(engine.kl, "k1"), "token"),
        baseline="critic",
        scale=scales.get(engine.scale, "none"),
        group=engine.group,
        length=_LENGTHS.get(engine.aggregate, "sum"),
        gamma=engine.gamma,
        lam=engine.lam,
        clip=(engine.clip_low, engine.clip_high),
        updates=engine.updates,
        kl_target=targets.get(engine.controller, engine.kl_target),
        unit=_unit(beta),
        unmodelled=_own(engine, kl=_TERMS, scale=scales, aggregate=_LENGTHS, controller=targets),
    )


def _grpo(engine: GRPO, beta: float | None) -> Objective:
    baseline, scale, ddof = _ADVANTAGES.get(engine.advantage, ("other", "none", 1))
    scaled, corrected = scale != "none", engine.kl is kl_terms.k3_corrected
    inside, outside = _kl_of(engine, _or_one(beta), scaled)
    return Objective(
        reward_kl=inside,
        loss_kl=outside,
        baseline=baseline,
        scale=scale,
        ddof=ddof,
        eps=advantages.EPS * beta if scaled and beta is not None else 0.0,  # added to a deviation in nats
        group=engine.group,
        length=_LENGTHS.get(engine.aggregate, "sum"),
        clip=(engine.clip_low, engine.clip_high),
        # k3_corrected's ratio is its own, token by token or whole, whichever the policy term has.
        importance="token" if corrected else _RATIOS.get(engine.importance, "token"),
        updates=engine.updates,
        unit="" if scaled and outside is not None else _unit(beta),
        unmodelled=_own(
            engine,
            advantage=_ADVANTAGES,
            aggregate=_LENGTHS,
            credit=_CREDITS,
            importance=_RATIOS,
            kl={**_ESTIMATORS, kl_terms.no_kl: "none"},
            place=dict.fromkeys(_PLACES),
            level={kl_terms.by_token: "token", kl_terms.by_sequence: "sequence"},
        ),
    )


def _kl_of(engine: GRPO, beta: float, scaled: bool) -> tuple[KLTerm | None, KLTerm | None]:
    """The KL in the reward and in the loss."""
    c, kind = engine.kl_coefficient, _ESTIMATORS.get(engine.kl)
    if kind is None or c == 0:
        return None, None
    # The exact KLs of a completion's states have the gradient of the single ones, however they are spread over its tokens.
    level = "sequence" if engine.level is kl_terms.by_sequence and kind != "full" else "token"
    inside = KLTerm(c * beta, kind, level)
    outside = KLTerm(c if scaled else c * beta, kind, level, engine.kl is kl_terms.k3_corrected)
    if engine.place is kl_terms.in_reward:
        return inside, None
    if engine.place is kl_terms.in_loss:
        return None, outside
    unit = engine.advantage in (advantages.leave_one_out, advantages.uncentred)
    even = engine.aggregate in (aggregate.total, aggregate.constant_length)
    return (replace(inside, estimator="rao-blackwell"), None) if kind == "full" and unit and even else (inside, outside)


_WORDS: Mapping[type, Callable[[Any, float | None], Objective]] = {
    RLOO: _rloo,
    Reinforce: _reinforce,
    PPO: _ppo,
    GRPO: _grpo,
}


def _or_one(beta: float | None) -> float:
    return 1.0 if beta is None else beta


def _unit(beta: float | None) -> str:
    return "β" if beta is None else ""


def _own(engine: Any, **known: Mapping[Any, Any]) -> tuple[str, ...]:
    """Behaviours of somebody's own, for which there are no words."""
    names = [name for name, functions in known.items() if getattr(engine, name) not in functions]
    return tuple(
        f"{name} is {getattr(getattr(engine, name), '__name__', '?')}, a behaviour of your own" for name in names
    )
