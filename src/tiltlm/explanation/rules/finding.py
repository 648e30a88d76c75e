"""What a finding is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from tiltlm.explanation.objective import Objective

Severity = Literal["changes the target", "adds bias or variance", "harmless"]
TARGET: Severity = "changes the target"
NOISE: Severity = "adds bias or variance"
FINE: Severity = "harmless"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one setting does.

    Attributes:
        field: the field of `Objective`.
        says: what it does, in a sentence.
        severity: whether it changes the target.
        formula: the same as a formula, where one helps.
        remedy: what to change to have p* again; empty where nothing needs to.
        setting: how the configuration that was read calls it, with its value.
        numbers: values that are known in closed form.
    """

    field: str
    says: str
    severity: Severity
    formula: str = ""
    remedy: str = ""
    setting: str = ""
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a rule looks at: the objective, and the prior's success probability for numbers about 0/1 rewards."""

    objective: Objective
    p0: float = 0.2


Rule = Callable[[Case], Finding | None]
