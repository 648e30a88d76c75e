"""The conformance suite: an engine's claim, proved or refuted by enumeration on a tabular model in float64.

Nothing here is sampled where it can be listed: the expected gradient of a training engine is a sum over all tuples
of draws, the law of a decoding engine a sum over all tuples of proposals.
"""

from __future__ import annotations

from typing import Any

from tiltlm.protocols import Claim
from tiltlm.testing.check import Check, ClaimRefuted
from tiltlm.testing.decoding import decoding_checks
from tiltlm.testing.training import training_checks


def check_engine(engine: Any) -> tuple[Check, ...]:
    """Examine an engine and raise if its claim is refuted.

    Raises:
        ClaimRefuted: with every check that failed.
    """
    checks = examine(engine)
    failed = [check for check in checks if not check.passed]
    if failed:
        claim: Claim = engine.claim
        lines = "\n".join(f"  {check}" for check in failed)
        raise ClaimRefuted(
            f"{type(engine).__name__} claims fixed point {claim.fixed_point}, bias {claim.bias}:\n{lines}"
        )
    return checks


def examine(engine: Any) -> tuple[Check, ...]:
    """Every check that the engine's claim calls for. An engine with `loss` trains, one with `sample` decodes."""
    found = tuple(training_checks(engine) if hasattr(engine, "loss") else decoding_checks(engine))
    if not found:
        raise ClaimRefuted(f"{type(engine).__name__}: nothing in its claim can be checked: {engine.claim}")
    return found


__all__ = ["Check", "ClaimRefuted", "check_engine", "examine"]
