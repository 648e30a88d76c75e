"""The answer: what a configuration converges to, and why."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tiltlm.errors import InputError
from tiltlm.explanation.closed_form import Law, law_of
from tiltlm.explanation.findings import by_severity, findings
from tiltlm.explanation.implied import implied_law
from tiltlm.explanation.laws import tilted
from tiltlm.explanation.objective import Objective
from tiltlm.explanation.readers.reading import Reading
from tiltlm.explanation.rules.finding import FINE, NOISE, TARGET, Finding
from tiltlm.explanation.tree import tree
from tiltlm.posterior.exact import Exact, kl

WIDTH = 110
LINES = 40


@dataclass(frozen=True)
class Explanation:
    """What an RL configuration converges to.

    Attributes:
        fixed_point: "p*" (at `beta`), "p* of ..." for a posterior of another prior or reward, the name of another law,
            "none", or "unknown" where no closed form is known.
        formula: the law in plain text.
        beta: the beta of that law; None where it is not one number.
        configured_beta: what the configuration says; None where a plan will choose it.
        findings: what each setting does, what changes the target first.
        source: the format that was read.
        ignored: keys that are not about the objective.
        suggestions: keys that look like misspelt ones, with the spelling that was probably meant.
        numbers: further figures, by what they are of.
    """

    fixed_point: str
    formula: str
    beta: float | None
    configured_beta: float | None
    findings: tuple[Finding, ...]
    source: str
    ignored: tuple[str, ...] = ()
    suggestions: tuple[tuple[str, str], ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self._headline(), *_wrap(self.formula, "  ")]
        lines += [f"  {name}: {value:.6g}" for name, value in self.numbers.items() if isinstance(value, float)]
        lines += [
            line
            for key, meant in self.suggestions
            for line in _wrap(f"{key} is not a field; did you mean {meant}?", "! ")
        ]
        tail = self._tail()
        body: list[str] = []
        left = 0
        for finding in self.findings:
            if finding.severity == FINE:
                continue
            block = _block(finding)
            if left or len(lines) + len(body) + len(block) + len(tail) + 2 > LINES:
                left += 1
                continue
            body += block
        if left:
            body += [f"  … and {left} more findings in the JSON"]
        return "\n".join([*lines, *([""] if body else []), *body, *tail])

    def _headline(self) -> str:
        source = f"{self.source}: " if self.source else ""
        if self.fixed_point == "none":
            return f"{source}no fixed point: this does not converge to a posterior"
        if self.fixed_point == "unknown":
            return f"{source}converges to no law that is known in closed form"
        if self.configured_beta is None:
            return f"{source}converges to {self.fixed_point}; β follows from the plan"
        if self.beta is None:
            return f"{source}converges to {self.fixed_point}"
        at = f"{source}converges to {self.fixed_point} at β = {self.beta:.6g}"
        same = abs(self.beta - self.configured_beta) <= 1e-12 * abs(self.beta)
        return at if same else f"{at}, not at the {self.configured_beta:g} that is configured"

    def _tail(self) -> list[str]:
        fine = [finding for finding in self.findings if finding.severity == FINE]
        text = "; ".join(f"{_short(finding)}" for finding in fine)
        return textwrap.wrap(f"harmless: {text}", WIDTH, subsequent_indent="  ", max_lines=5) if fine else []

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "fixed_point": self.fixed_point,
            "formula": self.formula,
            "beta": self.beta,
            "configured_beta": self.configured_beta,
            "source": self.source,
            "findings": [vars(finding) for finding in self.findings],
            "ignored": list(self.ignored),
            "suggestions": [{"key": key, "meant": meant} for key, meant in self.suggestions],
            "numbers": dict(self.numbers),
        }


def verdict(reading: Reading, p0: float = 0.2, exact: Exact | None = None) -> Explanation:
    """Judge what was read.

    Args:
        p0: the prior's success probability, for numbers about rewards of 0 or 1.
        exact: a language that can be listed, to find the law on.

    Raises:
        InputError: for a p0 outside (0, 1), or an objective that `implied_law` does not model where `exact` is given.
    """
    law: Law = law_of(reading.objective)
    found = [*findings(reading.objective, p0), *reading.findings]
    return Explanation(
        fixed_point=law.name,
        formula=law.formula,
        beta=law.beta,
        configured_beta=reading.beta,
        findings=tuple(replace(one, setting=reading.setting(one.field)) for one in by_severity(found)),
        source=reading.source,
        ignored=reading.ignored,
        suggestions=reading.suggestions,
        numbers={} if exact is None else figures(reading, exact),
    )


def figures(reading: Reading, exact: Exact) -> dict[str, float]:
    """Where an objective settles on a language that can be listed, beside p* at the beta that is configured.

    Raises:
        InputError: if `implied_law` does not model the objective, or its beta is left to a plan.
    """
    objective = reading.objective
    if not isinstance(objective, Objective):
        return {}
    if reading.beta is None:
        raise InputError("beta is left to the plan; give a number, for figures on a language")
    law, lengths = implied_law(objective, exact), tree(exact).lengths
    posterior = tilted(exact, reading.beta)
    return {
        "E r there": exact.mean_reward(law),
        "E r at p*": exact.mean_reward(posterior),
        "E|x| there": float((law.exp() * lengths).sum()),
        "E|x| at p*": float((posterior.exp() * lengths).sum()),
        "KL(π‖p*)": kl(law, posterior),
    }


_MARK = {TARGET: "✗", NOISE: "~", FINE: "·"}


def _block(finding: Finding) -> list[str]:
    setting = f"{finding.setting}: " if finding.setting else ""
    lines = _wrap(f"{setting}{finding.says}", f"{_MARK[finding.severity]} ")
    if finding.formula:
        lines += _wrap(finding.formula, "    ")
    if finding.remedy:
        lines += _wrap(f"→ {finding.remedy}", "    ")
    return lines


def _short(finding: Finding) -> str:
    return f"{finding.setting or finding.field} ({finding.says})"


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=" " * (len(indent) + 2))
