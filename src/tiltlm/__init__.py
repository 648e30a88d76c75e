"""TiltLM: steering and fine-tuning language models as Bayesian inference.

lm     = tl.load("smollm2-135m-instruct")
target = lm.prior(max_new_tokens=24) * tl.Reward(sentiment, beta=0.25, bounds=(-1, 1))
print(tl.plan(target, prompts))
policy = tl.fit(target, prompts, engine=tl.RLOO(group=8), steps=40)
print(tl.certify(policy, target, prompts))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tiltlm.diagnostics.certificate import Certificate, certify
    from tiltlm.diagnostics.frontier import Plan, plan
    from tiltlm.errors import InputError, TiltWarning
    from tiltlm.evidence.reward import Reward
    from tiltlm.inference.decoding.best_of_n import BestOfN
    from tiltlm.inference.decoding.importance import Importance
    from tiltlm.inference.decoding.rejection import Rejection
    from tiltlm.inference.fit import Training, fit
    from tiltlm.inference.training.rloo import RLOO
    from tiltlm.lm.adapters import LoRA
    from tiltlm.lm.load import LanguageModel, load
    from tiltlm.records import Draws, Estimate, Interval, Prompts, Scored, Weighted
    from tiltlm.target import Target

_HOME = {
    "BestOfN": "inference.decoding.best_of_n",
    "Certificate": "diagnostics.certificate",
    "Draws": "records",
    "Estimate": "records",
    "Importance": "inference.decoding.importance",
    "InputError": "errors",
    "Interval": "records",
    "LanguageModel": "lm.load",
    "LoRA": "lm.adapters",
    "Plan": "diagnostics.frontier",
    "Prompts": "records",
    "RLOO": "inference.training.rloo",
    "Rejection": "inference.decoding.rejection",
    "Reward": "evidence.reward",
    "Scored": "records",
    "Target": "target",
    "TiltWarning": "errors",
    "Training": "inference.fit",
    "Weighted": "records",
    "certify": "diagnostics.certificate",
    "fit": "inference.fit",
    "load": "lm.load",
    "plan": "diagnostics.frontier",
}

__all__ = [
    "RLOO",
    "BestOfN",
    "Certificate",
    "Draws",
    "Estimate",
    "Importance",
    "InputError",
    "Interval",
    "LanguageModel",
    "LoRA",
    "Plan",
    "Prompts",
    "Rejection",
    "Reward",
    "Scored",
    "Target",
    "TiltWarning",
    "Training",
    "Weighted",
    "certify",
    "fit",
    "load",
    "plan",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `tiltlm --help` should not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'tiltlm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tiltlm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
