"""What changes the prior, the reward or beta themselves."""

from __future__ import annotations

from tiltlm.explanation.rules.finding import FINE, TARGET, Case, Finding, Rule


def reward_clip(case: Case) -> Finding | None:
    """Rewards clipped to a range."""
    clip = case.objective.reward_clip
    if clip is None:
        return None
    says = f"rewards outside [{clip[0]:g}, {clip[1]:g}] count as its ends; inside, nothing changes"
    return Finding("reward_clip", says, TARGET, "π ∝ π0·exp(clip(r)/β)", "no clip, or a range that holds every reward")


def reward_whitening(case: Case) -> Finding | None:
    """Rewards divided by their own deviation."""
    kind = case.objective.reward_whitening
    if kind == "none":
        return None
    if kind == "score":
        says = "the reward is divided by its own deviation, so β is in units of it, and moves while the deviation does"
        return Finding("reward_whitening", says, TARGET, "β′ = β·σ_r", "give the reward as it is")
    says = "token rewards (KL included) are divided by their deviation s and their mean m put back: s cancels, m pays for length"
    formula = "π ∝ π0·exp((r + m(s − 1)|x|)/β)"
    return Finding("reward_whitening", says, TARGET, formula, "do not whiten; a whitened advantage is harmless")


def shaping(case: Case) -> Finding | None:
    """Penalties added to the reward."""
    parts = case.objective.shaping
    if not parts:
        return None
    says = f"the reward that counts is r plus {', '.join(parts)}"
    return Finding(
        "shaping", says, TARGET, "π ∝ π0·exp((r + penalty)/β)", "count it as part of your reward, or take it out"
    )


def temperature(case: Case) -> Finding | None:
    """Temperatures of drawing and scoring."""
    drawn, scored = case.objective.sampling.temperature, case.objective.scoring_temperature
    if drawn != scored:
        says = f"drawn at temperature {drawn:g}, scored at {scored:g}: the gradient is weighed by a law that is not the policy"
        return Finding(
            "sampling", says, TARGET, "E_μ[A∇log π], μ ≠ π, vanishes elsewhere", "use one temperature for both"
        )
    if drawn == case.objective.prior_temperature:
        if drawn == 1:
            return None
        says = f"the prior is the model at temperature {drawn:g}, and so is the policy: serve it at that temperature"
        return Finding("sampling", says, FINE, f"π_T ∝ π0_T·exp(r/β), T = {drawn:g}")
    says = f"drawn and scored at temperature {drawn:g}: a posterior of the tempered prior, which holds at that temperature only"
    return Finding(
        "sampling", says, TARGET, f"π_T ∝ π0_T·exp(r/β), T = {drawn:g}", "train at 1, or serve at the same temperature"
    )


def truncated_sampling(case: Case) -> Finding | None:
    """Draws from a part of the support."""
    law = case.objective.sampling
    cuts = [
        f"{name} {value:g}" for name, value in (("top-p", law.top_p), ("min-p", law.min_p)) if value not in {1, None}
    ]
    cuts += [f"top-k {law.top_k}"] if law.top_k else []
    cuts += [f"repetition penalty {law.repetition_penalty:g}"] if law.repetition_penalty != 1 else []
    if not cuts:
        return None
    says = f"drawn with {', '.join(cuts)}, scored with every token: what is cut is never drawn, so nothing holds its mass down"
    return Finding("sampling", says, TARGET, "E_μ[A∇log π], μ the cut law", "draw from the whole law")


def masked_truncated(case: Case) -> Finding | None:
    """Completions cut at the limit."""
    if not case.objective.mask_truncated:
        return None
    says = "completions cut at the limit carry no gradient: neither reward nor KL controls how much mass they have"
    return Finding("mask_truncated", says, TARGET, "", "let them count, with a reward of their own")


def moving_reference(case: Case) -> Finding | None:
    """A reference that follows the policy."""
    objective = case.objective
    if not objective.sync_every:
        return None
    how = "becomes the policy" if objective.sync_mix == 1 else f"moves {objective.sync_mix:g} of the way to the policy"
    says = f"every {objective.sync_every} steps the reference {how}: the tilts add up and the target never stops moving"
    formula = "k resets: π0·exp(k·r/β), that is temperature β/k"
    return Finding("sync_every", says, TARGET, formula, "keep the reference at π0, and choose β instead")


def adaptive_beta(case: Case) -> Finding | None:
    """A controller that changes beta."""
    target = case.objective.kl_target
    if target is None:
        return None
    says = f"a controller changes β until the KL is {target:g}: the β that is written is only where it starts"
    formula = "p* at β† with KL(p*_β†‖π0) = target (libraries average that KL over tokens)"
    return Finding("kl_target", says, TARGET, formula, "fix β; `tiltlm plan --kl-budget` finds the one for a KL")


def entropy_bonus(case: Case) -> Finding | None:
    """An entropy bonus beside the KL."""
    eta = case.objective.entropy
    if not eta:
        return None
    says = (
        f"an entropy bonus of {eta:g} flattens the law beyond what π0 and r say; with the tokens' mean no closed form"
    )
    formula = "with the entropy of whole completions: π ∝ π0^(β/(β+η))·exp(r/(β+η))"
    return Finding("entropy", says, TARGET, formula, "take it out; the KL already keeps the policy spread")


def dropped_groups(case: Case) -> Finding | None:
    """Prompts left out by their rewards (dynamic sampling)."""
    if not case.objective.drops_uniform_groups:
        return None
    says = "prompts whose completions all score alike are left out, and their KL with them: β depends on how hard a prompt is"
    return Finding("drops_uniform_groups", says, TARGET, "", "keep them: their KL is part of the target")


def unmodelled(case: Case) -> Finding | None:
    """Options that no closed form covers."""
    parts = case.objective.unmodelled
    if not parts:
        return None
    return Finding("unmodelled", f"changes the first update in a way without a closed form: {'; '.join(parts)}", TARGET)


RULES: tuple[Rule, ...] = (
    reward_clip,
    reward_whitening,
    shaping,
    temperature,
    truncated_sampling,
    masked_truncated,
    moving_reference,
    adaptive_beta,
    entropy_bonus,
    dropped_groups,
    unmodelled,
)
