"""What an engine may ask of its proposal."""

from __future__ import annotations

from typing import Any

from tiltlm.errors import InputError
from tiltlm.protocols import PrefixSampler, Sampler
from tiltlm.target import Target


def prefix_proposal(target: Target, proposal: Sampler | None, engine: str, method: str) -> PrefixSampler:
    """The proposal, or the prior, as a sampler that can be stopped at any token.

    Args:
        method: what the engine calls of it: "walk" or "redraw".

    Raises:
        InputError: if it has no such method, or draws from another set of completions than the prior.
    """
    chosen: Any = proposal if proposal is not None else target.prior
    for role, sampler in (("proposal", chosen), ("prior", target.prior)):
        if not hasattr(sampler, method):
            raise InputError(
                f"the {role} is a {type(sampler).__name__}, which has no {method}(): {engine} must stop it at any token; use "
                f"Importance"
            )
    require_same_support(target, chosen)
    return chosen


def require_same_support(target: Target, proposal: Sampler) -> None:
    """Refuse a proposal whose completions end elsewhere than the prior's, or that leaves out some of them."""
    ours, theirs = target.prior.law, proposal.law
    for name in ("max_new_tokens", "stop"):
        if getattr(ours, name) != getattr(theirs, name):
            raise InputError(
                f"the proposal has {name} {getattr(theirs, name)!r} and the prior {getattr(ours, name)!r}; give both the same"
            )
    if theirs.top_k is not None and theirs.top_k != ours.top_k:
        raise InputError(
            f"the proposal has top_k {theirs.top_k}, which leaves out completions that the posterior has; draw without top_k"
        )
