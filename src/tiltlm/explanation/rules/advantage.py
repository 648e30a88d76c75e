"""Baselines, and what advantages are divided by."""

from __future__ import annotations

from tiltlm.explanation.closed_form import direction, shrinkage
from tiltlm.explanation.fixed_points import rest_points
from tiltlm.explanation.rules.finding import FINE, NOISE, TARGET, Case, Finding, Rule


def self_in_baseline(case: Case) -> Finding | None:
    """The group mean holds the draw itself: a factor 1 - 1/G."""
    objective, group = case.objective, case.objective.group
    if objective.baseline != "group mean" or group is None or objective.scale == "group std":
        return None
    if direction(objective) == "none":
        return None
    if group == 1:
        return Finding(
            "baseline",
            "one draw a prompt is its own mean: every advantage is 0",
            TARGET,
            "",
            "draw at least 2 a prompt",
        )
    if shrinkage(objective) == 1:
        says = "a baseline that holds the draw itself shrinks reward and KL alike: a smaller step, the same target"
        return Finding("baseline", says, FINE, "E[(R_i − R̄)∇log π] = (1 − 1/G)·∇J")
    says = f"a baseline that holds the draw itself shrinks the reward by 1 − 1/{group} and leaves the KL: a larger β"
    beta = objective.beta / shrinkage(objective)
    formula = f"E[(r_i − r̄)∇log π] = (1 − 1/G)·∇E r, so β′ = β/(1 − 1/G) = {objective.amount(beta)}"
    remedy = f"leave the draw out of its baseline, or set β to {objective.amount(objective.beta * shrinkage(objective))} for a target at β"
    numbers = {} if objective.unit else {"beta": beta}
    return Finding("baseline", says, TARGET, formula, remedy, numbers=numbers)


def divided_by_std(case: Case) -> Finding | None:
    """The group deviation of GRPO (Mroueh 2025), with rest points for rewards of 0 or 1."""
    objective = case.objective
    if objective.scale != "group std" or direction(objective) == "none":
        return None
    if not objective.kl_outside_scale:
        says = "reward and KL are divided alike: a law with reward − KL constant has every advantage 0 and stays stationary"
        return Finding("scale", says, FINE, "R(x) = r − β·log π/π0 is constant at p*")
    says = "dividing the reward, but not the KL, by each group's deviation gives every prompt a β of its own"
    beta, group = objective.beta / objective.policy_scale, objective.group
    forward = direction(objective) in {"forward", "own-token forward"}
    points = rest_points(beta, p0=case.p0, group=group, ddof=objective.ddof, eps=objective.eps, forward=forward)
    many = rest_points(beta, p0=case.p0, forward=forward)
    who = "very many draws" if group is None else f"{group} draws"
    formula = f"π ∝ π0·exp(A_G(x;π)/β); 0/1 reward, π0 = {case.p0:g}, one decision, {who}: {points}"
    if group is not None and (many.unstable or not many.stable):
        formula += f"; in the limit of many draws {many}"
    if points.unstable or many.unstable:
        says += (
            "; with enough draws there are two regimes, and a prompt that gets past the unstable point runs to p = 1"
        )
    elif not many.stable:
        says += "; with enough draws nothing holds a prompt back, and it runs to p = 1"
    remedy = "do not divide by the deviation, or put the KL (k1) into the reward before the advantage is formed"
    numbers = {"rest points": points.as_dict(), "rest points, many draws": many.as_dict()}
    return Finding("scale", says, TARGET, formula, remedy, numbers=numbers)


def whitened_batch(case: Case) -> Finding | None:
    """One deviation for the whole batch."""
    objective = case.objective
    if objective.scale != "batch std" or direction(objective) == "none":
        return None
    if not objective.kl_outside_scale:
        return Finding(
            "scale", "reward and KL are divided by the batch's deviation alike: the step changes, not the target", FINE
        )
    says = "the reward is divided by the batch's deviation, the KL is not: β is multiplied by it, and moves as it moves"
    return Finding("scale", says, TARGET, "β′ = β·σ_batch", "do not divide, or put the KL (k1) into the reward")


def no_baseline(case: Case) -> Finding | None:
    """REINFORCE as it is."""
    if case.objective.baseline != "none":
        return None
    return Finding("baseline", "no baseline: unbiased, with a large variance", NOISE, "", "use leave-one-out")


def critic(case: Case) -> Finding | None:
    """A learned value and the lambda of its estimate."""
    if case.objective.baseline != "critic":
        return None
    says = "a learned value: no bias once it is right (at p* with V* every residual is 0); until then λ < 1 lets its error in"
    if case.objective.lam == 1:
        return Finding("lam", "a learned value as the baseline, λ = 1: no bias", FINE)
    return Finding("lam", says, NOISE, "", "λ = 1 takes the critic's error out, for more variance")


def odd_baseline(case: Case) -> Finding | None:
    """Baselines that weigh the draws of a group."""
    if case.objective.baseline != "other":
        return None
    says = "this baseline depends on the draw itself through more than a mean; the bias falls like 1/G and has no closed form"
    return Finding("baseline", says, TARGET, "", "use leave-one-out")


RULES: tuple[Rule, ...] = (
    self_in_baseline,
    divided_by_std,
    whitened_batch,
    no_baseline,
    critic,
    odd_baseline,
)
