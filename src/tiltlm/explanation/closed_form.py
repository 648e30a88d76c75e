"""Which law an objective settles at, as a name, a formula and an effective beta; or that none is known.

The law is put together from four answers: which KL the gradient really is of, how much of it passes through the baseline and
its division, how lengths weigh, and what moves the target itself. Where the answers combine to something without a closed
form, the name is "unknown"; nothing is called p* that the enumeration in `implied` refutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tiltlm.explanation.objective import Claimed, KLTerm, Objective, PairLoss

Direction = Literal["none", "reverse", "forward", "own-token reverse", "own-token forward", "unknown"]


@dataclass(frozen=True)
class Law:
    """Where an objective settles.

    Attributes:
        name: "p*", "p* of ..." for a posterior of another prior or reward, another law's name, "none" or "unknown".
        formula: the law, in plain text.
        beta: the beta of the formula, where it is one number; None where it depends on the batch or there is none.
    """

    name: str
    formula: str
    beta: float | None = None


def law_of(objective: Objective | PairLoss | Claimed) -> Law:
    """The law that `objective` settles at, as far as a closed form is known."""
    if isinstance(objective, Claimed):
        return _claimed_law(objective)
    return _pair_law(objective) if isinstance(objective, PairLoss) else _gradient_law(objective)


def _gradient_law(objective: Objective) -> Law:
    towards = direction(objective)
    if towards == "none":
        return Law("none", "π → all mass on the completions of highest reward; π0 drops out")
    if objective.baseline == "group mean" and objective.group == 1:
        return Law("the prior", "π = π0: the mean of one draw is the draw, so every advantage is 0")
    if objective.sync_every:
        return _moving(objective, towards)
    reasons = (
        *(["the KL term is not the gradient of one divergence"] if towards == "unknown" else []),
        *without_closed_form(objective),
    )
    if reasons or (objective.kl_target is not None and towards != "reverse"):
        return Law("unknown", f"not known in closed form: {'; '.join(reasons or ('a controller moves β',))}")
    return _settled(objective, towards) if objective.kl_target is None else _controlled(objective)


def _controlled(objective: Objective) -> Law:
    """Where a controller moves beta until the KL is its target."""
    until = f"such that KL(π‖π0) meets the target {objective.kl_target:g}"
    if objective.gamma != 1:
        return Law("discounted soft law at the controller's β", f"{_settled(objective, 'reverse').formula}; β {until}")
    return Law("p* at the controller's β", f"π ∝ π0·exp(r/β†), β† {until}")


# --- which divergence the KL terms descend ---


def direction(objective: Objective) -> Direction:
    """The divergence from the prior that the expected gradient of the KL terms belongs to."""
    reward, loss = _slope_of_reward(objective.reward_kl), slope_of_loss(objective.loss_kl)
    if "unknown" in (reward, loss):
        return "reverse" if _cancels(objective) else "unknown"
    if reward == "none":
        return loss
    if loss in {"none", reward}:
        return reward
    return "unknown"


def slope_of_loss(term: KLTerm | None) -> Direction:
    """The divergence that one term in the loss descends, at pi_old = pi."""
    if term is None or term.beta == 0:
        return "none"
    if term.estimator == "rao-blackwell":
        return "reverse"
    what = _IN_LOSS.get((term.estimator, term.corrected), "unknown")
    if term.level == "sequence" or what in {"none", "unknown"}:
        return what
    return "own-token reverse" if what == "reverse" else "own-token forward"


_IN_LOSS: dict[tuple[str, bool], Direction] = {
    ("k1", False): "none",
    ("k1", True): "reverse",
    ("k2", False): "reverse",
    ("k3", False): "forward",
    ("k3", True): "reverse",
    ("full", False): "reverse",
}
"""By estimator, and whether the ratio is in front: the gradient's divergence for a completion's log-ratio."""


def _slope_of_reward(term: KLTerm | None) -> Direction:
    if term is None or term.beta == 0:
        return "none"
    return "reverse" if term.estimator in {"k1", "rao-blackwell"} else "unknown"


def _cancels(objective: Objective) -> bool:
    """k3 in reward and loss alike, which is the product rule: what each misses is what the other adds."""
    reward, loss = objective.reward_kl, objective.loss_kl
    if reward is None or loss is None or loss.corrected or reward.level != loss.level:
        return False
    unbiased = reward.estimator == loss.estimator == "k3" and reward.beta == loss.beta
    return unbiased and objective.scale == "none" and objective.policy_scale == 1 and shrinkage(objective) == 1


# --- how the reward is weighed against it ---


def shrinkage(objective: Objective) -> float:
    """1 - 1/G where the baseline holds the draw itself and some KL stays outside; else 1.

    A normalised advantage A_G has that factor in it already.
    """
    if objective.scale == "group std":
        return 1.0
    if objective.baseline == "group mean" and objective.group is not None and objective.kl_outside_baseline:
        return 1 - 1 / objective.group
    return 1.0


def effective_beta(objective: Objective) -> float:
    """The beta at which the KL's weight against the reward is what the objective gives it, deviations apart."""
    shrink = shrinkage(objective) * objective.policy_scale
    inside = objective.reward_kl.beta if objective.reward_kl is not None else 0.0
    outside = objective.loss_kl.beta if objective.loss_kl is not None else 0.0
    if slope_of_loss(objective.loss_kl) == "none":
        outside = 0.0
    if _cancels(objective):
        return inside
    if objective.baseline_on == "reward":
        return inside / shrinkage(objective) + outside / shrink if shrink else math.inf
    return inside + outside / shrink if shrink else math.inf


def without_closed_form(objective: Objective) -> tuple[str, ...]:
    """The parts of an objective for which no law is known."""
    sampling, loss = objective.sampling, objective.loss_kl
    kl_in_loss = loss is not None and loss.beta != 0
    kl_in_reward = objective.reward_kl is not None and objective.reward_kl.beta != 0
    per_length = objective.length == "sequence mean"
    cut = sampling.top_p < 1 or sampling.top_k or sampling.min_p or sampling.repetition_penalty != 1
    reasons = {
        "draws come from a truncated law, scores from the whole one": cut,
        "draws and scores use different temperatures": sampling.temperature != objective.scoring_temperature,
        "truncated completions carry no gradient": objective.mask_truncated,
        "an entropy bonus": objective.entropy,
        "prompts are dropped by their rewards": objective.drops_uniform_groups,
        "a completion's ratio weighs the KL of its tokens": objective.importance == "sequence" and ratio_weighted(loss),
        "the baseline depends on the draw": objective.baseline == "other",
        "reward and KL weigh lengths differently": kl_in_loss and lengths_apart(objective),
        "rewards are discounted, the KL is not": objective.gamma != 1 and kl_in_loss,
        "token rewards are whitened beside a KL in the loss": objective.reward_whitening == "tokens" and kl_in_loss,
        "1/|x| weighs a KL that no baseline centres": per_length and kl_in_reward and objective.baseline_on == "reward",
        "1/|x| weighs a KL in the reward and one in the loss": per_length and kl_in_reward and kl_in_loss,
        "1/|x| weighs discounted or whitened token rewards": per_length
        and (objective.gamma != 1 or objective.reward_whitening == "tokens"),
        "rewards are discounted and whitened": objective.gamma != 1 and objective.reward_whitening == "tokens",
    }
    return (*(reason for reason, holds in reasons.items() if holds), *objective.unmodelled)


def ratio_weighted(term: KLTerm | None) -> bool:
    """Whether the importance ratio stands in front of a KL in the loss."""
    return term is not None and term.corrected and term.beta != 0


def lengths_apart(objective: Objective) -> bool:
    """Whether the policy term and the KL in the loss are averaged over tokens in different ways.

    A sum, a constant and a large batch's tokens differ by a number that both would share; when only one has it, the number
    goes into beta.
    """
    return objective.loss_kl_length not in {None, objective.length}


# --- the formulas ---


def _settled(objective: Objective, towards: Direction) -> Law:
    prior, reward = symbols(objective)
    beta = effective_beta(objective)
    divisor, per_prompt = _divisor(objective)
    shown = f"{objective.amount(beta)}·{divisor}" if divisor else objective.amount(beta)
    shown = f"({shown})" if "·" in shown else shown
    known = None if divisor or objective.unit else beta
    if objective.gamma != 1:
        formula = f"π(a|h) ∝ {prior}(a|h)·exp(γV(ha)/β), V(h) = β·log E_{prior}[exp(γV(ha)/β)], β = {shown}"
        return Law(
            "discounted soft law", f"{formula}, γ = {objective.gamma:g}, V({reward} at the end) = {reward}", known
        )
    if objective.reward_whitening == "tokens":
        return Law("length-tilted p*", f"π ∝ {prior}·exp(({reward} + m(s−1)·|x|)/β), β = {shown}", known)
    if objective.length == "sequence mean" and not _all_inside(objective):
        if per_prompt:
            return Law("unknown", "not known in closed form: 1/|x| weighs an advantage that is normalised by the group")
        return _per_length(objective, towards, prior, reward, shown, known)
    if per_prompt:
        reward, tail = "A_G(x; π)", ", A_G(x; π) = E[(r₁ − mean)/(std + ε) | x₁ = x]"
    else:
        tail = ""
    advantage = reward if per_prompt else f"({reward} − E_π {reward})"
    formulas = {
        "reverse": f"π(x|c) ∝ {prior}(x|c)·exp({reward}/{shown})",
        "forward": f"π = {prior} / (1 − {advantage}/{shown})",
        "own-token reverse": f"π(a|h) ∝ {prior}(a|h)·exp(E_π[{reward}|h,a]/{shown})",
        "own-token forward": f"π(a|h) = {prior}(a|h) / (1 − (E_π[{reward}|h,a] − E_π[{reward}|h])/{shown})",
    }
    return Law(_name(towards, prior, objective, per_prompt, divisor), formulas[towards] + tail, known)


_NAMES = {
    "forward": "forward-KL law",
    "own-token reverse": "own-token-KL law",
    "own-token forward": "own-token forward-KL law",
}


def symbols(objective: Objective) -> tuple[str, str]:
    """How the prior and the reward of the law are written: tempered, clipped, shaped."""
    prior = _prior(objective.scoring_temperature)
    reward = f"(r + {' + '.join(objective.shaping)})" if objective.shaping else "r"
    if objective.reward_clip is not None:
        inside = reward if objective.baseline_on == "total" else f"{reward} − b"  # centred before it is clipped
        reward = f"clip({inside}, {objective.reward_clip[0]:g}, {objective.reward_clip[1]:g})"
    return prior, reward


def _prior(temperature: float) -> str:
    return "π0" if temperature == 1 else f"π0^[T={temperature:g}]"


def _name(towards: Direction, prior: str, objective: Objective, per_prompt: bool, divisor: str) -> str:
    at = " at a β of each prompt's own" if per_prompt else f" at β·{divisor}" if divisor else ""
    if objective.unit and not at and effective_beta(objective) != 1:
        at = f" at {objective.amount(effective_beta(objective))}"
    if towards != "reverse":
        return f"{_NAMES[towards]}{at}"
    changed = []
    if prior != "π0":
        changed.append(f"the prior at temperature {objective.scoring_temperature:g}")
    if objective.reward_clip is not None:
        changed.append("the clipped reward")
    if objective.shaping:
        changed.append("the reward with its penalties")
    return f"p* of {' and '.join(changed)}{at}" if changed else f"p*{at}"


def _divisor(objective: Objective) -> tuple[str, bool]:
    """What multiplies beta beyond a number, and whether the advantage is normalised prompt by prompt."""
    outside = objective.kl_outside_scale
    if outside and objective.scale == "group std":
        return "", True  # any other division of the reward cancels in it
    parts = ["σ_r"] if objective.reward_whitening == "score" else []
    parts += ["σ_batch"] if outside and objective.scale == "batch std" else []
    return "·".join(parts), False


EXACT_BASELINES = frozenset({"leave-one-out", "group mean", "critic"})
"""Baselines whose expectation is the prompt's own mean."""


def _all_inside(objective: Objective) -> bool:
    """Every stationary completion has reward - KL constant, so its weight does not matter."""
    lone = slope_of_loss(objective.loss_kl) == "none"
    return lone and objective.baseline in EXACT_BASELINES and objective.baseline_on == "total"


def _per_length(
    objective: Objective, towards: Direction, prior: str, reward: str, shown: str, known: float | None
) -> Law:
    centred = objective.baseline in EXACT_BASELINES
    base = f"E_π {reward}" if centred else "b"
    bonus = "κ = β·KL(π‖π0)/E_π|x|" if centred and towards == "reverse" else "κ such that π sums to 1"
    bonus += "" if centred else ", b the baseline"
    # The KL of a whole state is weighed by what the state expects, a token's own by what follows the token.
    whole = objective.loss_kl is not None and objective.loss_kl.estimator == "full"
    weight = "E_π[1/|x| | h]" if whole else "E_π[1/|x| | h,a]"
    formulas = {
        "reverse": f"π = {prior}·exp(({reward} − {base} + κ|x|)/{shown}), {bonus}",
        "forward": f"π = {prior} / (1 − ({reward} − {base} + κ|x|)/{shown}), {bonus}",
        "own-token reverse": f"log π/{prior}(a|h) = (E_π[A/|x| | h,a] − c(h)) / ({shown}·{weight}), A = {reward} − {base}",
        "own-token forward": f"{shown}·{weight}·(1 − {prior}/π(a|h)) = E_π[A/|x| | h,a] − c(h), A = {reward} − {base}",
    }
    names = {
        "reverse": "length-tilted p*",
        "forward": "length-tilted forward-KL law",
        "own-token reverse": "length-weighted own-token-KL law",
        "own-token forward": "length-weighted own-token forward-KL law",
    }
    return Law(names[towards], formulas[towards], known)


def _moving(objective: Objective, towards: Direction) -> Law:
    every, mix = objective.sync_every, objective.sync_mix
    if towards != "reverse" or without_closed_form(objective):
        return Law("none", f"the reference follows the policy every {every} steps, so the target keeps moving")
    shown = objective.amount(effective_beta(objective))
    if mix == 1:
        return Law("none", f"after k rounds π ∝ π0·exp(k·r/{shown}): temperature {shown}/k, which ends in collapse")
    formula = f"after k updates about π ∝ π0·exp((1 + {mix:g}·k)·r/{shown}) (exact for a mix of log-probabilities)"
    return Law("none", f"{formula}, which ends in collapse")


def _pair_law(pair: PairLoss) -> Law:
    if pair.beta <= 0:
        return Law("none", "without β the margins have nothing to stop them")
    if pair.kind == "ipo":
        over = "π" if pair.online else "the data's law"
        formula = f"π ∝ π0·exp(E_x'~{over}[2P(x≻x') − 1]/(2·{pair.beta:g}))"
        return Law("win-rate tilt", formula, pair.beta)
    if pair.kind != "sigmoid":
        return Law("unknown", f"not known in closed form: loss {pair.kind!r}")
    if pair.labels == "reward":
        return Law(
            "none", "labels that only compare rewards are certain, so every margin grows: π → the highest reward"
        )
    return Law("p*", f"π ∝ π0·exp(r/{pair.beta:g}), r the Bradley–Terry reward behind the labels", pair.beta)


def _claimed_law(claimed: Claimed) -> Law:
    if claimed.refused:
        return Law("none", f"not trained: {claimed.refused}")
    if claimed.fixed_point != "p*":
        objective = claimed.claim.objective.replace("pi0", "π0")
        formula = objective if claimed.fixed_point == "none" else f"where this is least: {objective}"
        return Law(claimed.fixed_point.replace("pi0", "π0"), formula)
    prior = _prior(claimed.temperature)
    name = "p*" if claimed.temperature == 1 else f"p* of the prior at temperature {claimed.temperature:g}"
    shown = "β" if claimed.beta is None else f"{claimed.beta:.6g}"
    return Law(name, f"π(x|c) ∝ {prior}(x|c)·exp(r/{shown})", claimed.beta)
