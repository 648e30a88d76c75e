"""Public tools for testing engines and models: tabular languages, and the conformance suite.

from tiltlm.testing import check_engine
check_engine(MyEngine())
"""

from tiltlm.testing.conformance import Check, ClaimRefuted, check_engine, examine
from tiltlm.testing.fixtures import (
    Language,
    fixture_a,
    fixture_b,
    language,
    policy_with_law,
    posterior_policy,
    small_language,
)
from tiltlm.testing.tabular import TabularConfig, TabularLM, tabular_tokenizer

__all__ = [
    "Check",
    "ClaimRefuted",
    "Language",
    "TabularConfig",
    "TabularLM",
    "check_engine",
    "examine",
    "fixture_a",
    "fixture_b",
    "language",
    "policy_with_law",
    "posterior_policy",
    "small_language",
    "tabular_tokenizer",
]
