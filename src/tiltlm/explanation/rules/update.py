"""How a batch becomes an update: lengths, discounts, ratios, clips."""

from __future__ import annotations

from tiltlm.explanation.closed_form import EXACT_BASELINES, lengths_apart, slope_of_loss
from tiltlm.explanation.rules.finding import FINE, NOISE, TARGET, Case, Finding, Rule


def length_mean(case: Case) -> Finding | None:
    """1/|x| a completion, GRPO as published."""
    objective = case.objective
    if objective.length != "sequence mean":
        return None
    kl_inside = slope_of_loss(objective.loss_kl) == "none"
    if kl_inside and objective.baseline_on == "total" and objective.baseline in EXACT_BASELINES:
        says = "dividing by |x| weighs completions, but a law with reward − KL constant stays stationary; long texts learn slower"
        return Finding("length", says, NOISE, "", "divide by a constant")
    says = "dividing each completion's loss by its length pays for length: a hidden bonus of κ reward units a token"
    formula = (
        "π ∝ π0·exp((r + κ|x|)/β), κ = β·KL(π‖π0)/E_π|x| (sequence-level KL; for a KL of single tokens no closed form)"
    )
    return Finding("length", says, TARGET, formula, "divide by a constant, or by the tokens of the whole batch")


def length_batch(case: Case) -> Finding | None:
    """The batch's tokens, as DAPO has it."""
    if case.objective.length != "batch mean":
        return None
    says = "divided by the batch's tokens: the same for all in a large batch; a bias of order 1/(completions) in a small one"
    return Finding("length", says, NOISE if (case.objective.group or 99) < 4 else FINE)


def lengths_differ(case: Case) -> Finding | None:
    """Policy and KL put together differently."""
    objective = case.objective
    kl = objective.loss_kl is not None and objective.loss_kl.beta
    if not kl or not lengths_apart(objective):
        return None
    says = f"the policy term is put together as {objective.length}, the KL as {objective.loss_kl_length}: β depends on the length"
    return Finding("loss_kl_length", says, TARGET, "", "put both together in the same way")


def discounted(case: Case) -> Finding | None:
    """A discount of later tokens."""
    gamma = case.objective.gamma
    if gamma == 1:
        return None
    says = (
        f"γ = {gamma:g} discounts the reward at the end and the KL of later tokens: early tokens hardly see the reward"
    )
    formula = "V(h) = β·log E_π0[exp(γV(ha)/β)]; a text of T tokens sees about γ^(T−1)·r at its first token"
    return Finding("gamma", says, TARGET, formula, "set γ to 1")


def clipped(case: Case) -> Finding | None:
    """The clip of PPO and its relatives."""
    objective = case.objective
    if objective.clip is None:
        return None
    low, high = objective.clip
    if objective.updates == 1:
        return Finding(
            "clip", f"the clip [1 − {low:g}, 1 + {high:g}] is inactive: one update a batch, every ratio is 1", FINE
        )
    uneven = ", and more for rises than for falls" if high > low else ""
    says = f"from the second update on, ratios outside [1 − {low:g}, 1 + {high:g}] lose their gradient{uneven}"
    return Finding(
        "clip", says, NOISE, "the update is then not a gradient of J", "fewer updates a batch, or smaller steps"
    )


def several_updates(case: Case) -> Finding | None:
    """More than one update a batch."""
    objective = case.objective
    if objective.updates <= 1:
        return None
    says = f"{objective.updates} updates on one batch: draws are stale from the second on; "
    if not objective.kl_outside_baseline and not objective.kl_outside_scale:
        return Finding("updates", f"{says}a law with every advantage 0 stays stationary all the same", NOISE)
    says += "so is the balance of reward and KL; the shift is of the order of the step"
    return Finding("updates", says, NOISE, "", "one update a batch, or smaller steps")


def sequence_ratio(case: Case) -> Finding | None:
    """One importance ratio a completion, as in GSPO."""
    objective = case.objective
    if objective.importance != "sequence":
        return None
    if objective.loss_kl is not None and objective.loss_kl.corrected and objective.loss_kl.beta:
        says = "a completion's ratio is put in front of every token's KL: not the reverse KL's gradient even on the first update"
        return Finding("importance", says, TARGET, "", "use the ratio of each token, or put the KL into the reward")
    says = "one ratio a completion: on the first update the same gradient as one a token"
    return Finding("importance", says, FINE)


def policy_scale(case: Case) -> Finding | None:
    """A constant in front of the policy term alone."""
    scale = case.objective.policy_scale
    if scale == 1:
        return None
    says = f"the policy term is multiplied by {scale:g} already on the first update, the KL is not"
    if not case.objective.kl_outside_baseline:
        return Finding("policy_scale", f"the policy term is multiplied by {scale:g}: a smaller step", FINE)
    formula = f"β′ = β/{scale:g} = {case.objective.beta / scale:.6g}"
    return Finding("policy_scale", says, TARGET, formula, "raise the upper bound of the ratio to 1 or more")


RULES: tuple[Rule, ...] = (
    length_mean,
    length_batch,
    lengths_differ,
    discounted,
    clipped,
    several_updates,
    sequence_ratio,
    policy_scale,
)
