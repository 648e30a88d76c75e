"""What single settings do to the target, collected from the rules.

The statements are those that the enumeration tests prove (tests/test_explain_laws.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tiltlm.explanation.objective import Claimed, Objective, PairLoss, Sampling
from tiltlm.explanation.rules import advantage, kl, target, update
from tiltlm.explanation.rules.finding import FINE, NOISE, TARGET, Case, Finding

RULES = (*kl.RULES, *advantage.RULES, *update.RULES, *target.RULES)


def findings(objective: Objective | PairLoss | Claimed, p0: float = 0.2) -> tuple[Finding, ...]:
    """Everything there is to say of an objective, what changes the target first.

    Args:
        p0: the prior's success probability, for numbers about rewards of 0 or 1.
    """
    if isinstance(objective, PairLoss):
        return tuple(_pair_findings(objective))
    if isinstance(objective, Claimed):
        t = objective.temperature
        law = Objective(sampling=Sampling(t), scoring_temperature=t, prior_temperature=t)
        tempered = target.temperature(Case(law))
        return () if tempered is None or objective.refused else (tempered,)
    case = Case(objective, p0)
    return by_severity(finding for rule in RULES if (finding := rule(case)) is not None)


def by_severity(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """What changes the target first."""
    return tuple(sorted(found, key=lambda finding: (TARGET, NOISE, FINE).index(finding.severity)))


def _pair_findings(pair: PairLoss) -> Iterator[Finding]:
    if pair.kind == "ipo":
        says = "IPO's optimum tilts by the win rate, which is bounded and depends on whom a text is compared with"
        yield Finding(
            "kind", says, TARGET, "π ∝ π0·exp(E[2P(x≻x′) − 1]/(2τ))", "use the sigmoid loss with noisy labels"
        )
    elif pair.kind == "sigmoid" and pair.labels == "reward":
        says = "the better of two rewards always wins, so no finite margin is enough: the loss falls as π leaves π0"
        yield Finding(
            "labels", says, TARGET, "−log σ(βΔ) → 0 as Δ → ∞", "draw the label with P = σ(r − r′), or use RLOO"
        )
    elif pair.kind == "sigmoid":
        says = "exact where pairs cover every text; mass on texts in no pair is not controlled"
        yield Finding("labels", says, NOISE, "", "draw pairs from the policy as well")
