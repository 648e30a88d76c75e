"""The KL term: which divergence its gradient descends."""

from __future__ import annotations

from tiltlm.explanation.closed_form import direction, effective_beta, slope_of_loss
from tiltlm.explanation.fixed_points import rest_points
from tiltlm.explanation.rules.finding import FINE, NOISE, TARGET, Case, Finding, Rule


def no_kl(case: Case) -> Finding | None:
    """Without a KL there is nothing to settle against (Korbak et al. 2022: distribution collapse)."""
    if direction(case.objective) != "none":
        return None
    loss = case.objective.loss_kl
    if loss is not None and loss.beta:
        says = "k1 in the loss has expected gradient E[∇log π] = 0: the KL is logged, but nothing is regularised"
        return Finding(
            "loss_kl", says, TARGET, "E_π[∇(log π − log π0)] = 0", "use k2 on the completion, or k1 in the reward"
        )
    says = "no KL, so no posterior: nothing but the learning rate keeps the policy from collapsing onto the best-rewarded text"
    return Finding(
        "beta", says, TARGET, "max E_π[r] is a point mass", "set a positive KL coefficient, in reward units per nat"
    )


def kl_in_loss(case: Case) -> Finding | None:
    """Which divergence a KL in the loss descends; its first update, where pi_old = pi."""
    term = case.objective.loss_kl
    what = slope_of_loss(term)
    if term is None or what == "none":
        return None
    label = f"{term.estimator}{' × ratio' if term.corrected else ''} in the loss, {term.level} level"
    if what == "reverse":
        return Finding("loss_kl", f"{label}: its expected gradient is that of KL(π‖π0)", FINE)
    if what == "own-token reverse":
        says = f"{label}: every token pays for its own KL and none for the KL of what it leads to"
        formula = (
            "Σ_h d_π(h)·∇KL(π(·|h)‖π0(·|h)), d_π held fixed; p* needs V*(h) = β·log E_π0[e^{r/β}|h], this has E_π[r|h]"
        )
        return Finding(
            "loss_kl", says, TARGET, formula, "put k1 into the reward, or k2 of the whole completion into the loss"
        )
    if what in {"forward", "own-token forward"}:
        where = "KL(π0‖π)" if what == "forward" else "Σ_h d_π(h)·∇KL(π0(·|h)‖π(·|h))"
        says = f"{label}: its gradient is the forward KL's, which keeps π0's mass and lets π run towards high rewards"
        beta = effective_beta(case.objective)
        numbers = {}
        if case.objective.scale == "none" and beta > 0 and not case.objective.unit:
            points = rest_points(beta, p0=case.p0, scale="none", forward=True)
            says += f" (0/1 reward, π0 = {case.p0:g}, one decision: {points})"
            numbers = {"forward rest points": points.as_dict()}
        remedy = "put k1 into the reward, or multiply k3 of the completion by the importance ratio"
        return Finding("loss_kl", says, TARGET, f"E[∇k3] = {where}: π = π0/(1 − A/β)", remedy, numbers=numbers)
    says = f"{label}: not the gradient of any divergence from π0 that is known"
    return Finding("loss_kl", says, TARGET, "", "put k1 into the reward")


def kl_in_reward(case: Case) -> Finding | None:
    """k1 in the reward is the reverse KL; other estimators there are not."""
    term = case.objective.reward_kl
    if term is None or term.beta == 0:
        return None
    if term.estimator in {"k1", "rao-blackwell"}:
        return Finding("reward_kl", f"{term.estimator} in the reward: its expected gradient is that of KL(π‖π0)", FINE)
    formula = {
        "k3": "∇KL(π‖π0) − ∇KL(π0‖π)",
        "k2": "E_π[½(log π/π0)²·∇log π], which does not know on which side of π0 a text is",
        "full": "the score half alone; the KL of the current token has no gradient",
    }.get(term.estimator, "")
    says = f"{term.estimator} in the reward: the score of an estimate is not the gradient of the KL"
    return Finding("reward_kl", says, TARGET, formula, "use k1 in the reward")


def kl_twice(case: Case) -> Finding | None:
    """A penalty in both places."""
    reward, loss = case.objective.reward_kl, case.objective.loss_kl
    if not (reward and reward.beta and loss and loss.beta):
        return None
    amount = case.objective.amount
    says = f"a KL in the reward (β {amount(reward.beta)}) and one in the loss (β {amount(loss.beta)})"
    if direction(case.objective) == "unknown":
        return Finding(
            "loss_kl", f"{says}: of two different divergences", TARGET, "", "keep the one in the reward (k1)"
        )
    together = effective_beta(case.objective)
    return Finding("loss_kl", f"{says}: together β {amount(together)}", NOISE, "", "keep one of them")


RULES: tuple[Rule, ...] = (
    no_kl,
    kl_in_loss,
    kl_in_reward,
    kl_twice,
)
