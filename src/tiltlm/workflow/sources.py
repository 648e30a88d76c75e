"""Where a recipe's training completions come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiltlm.inference.ahead import Ahead
from tiltlm.inference.catalogue import decoding_engines, make_engine
from tiltlm.inference.lagging import Lagging
from tiltlm.inference.source import Decoded, Given, Replay, Source
from tiltlm.protocols import Claim
from tiltlm.records import Scored
from tiltlm.workflow.recipe import Recipe


def teacher_of(recipe: Recipe) -> Any:
    """The decoding engine that is learned from, if the recipe names one.

    Raises:
        InputError: for an engine that is not there.
    """
    return None if recipe.teacher is None else make_engine(decoding_engines(), recipe.teacher, {})


def source_of(recipe: Recipe, claim: Claim, given: Callable[[], Scored]) -> Source | None:
    """The source that the recipe asks for; None leaves it to the engine.

    Args:
        claim: of the engine that learns from it.
        given: the completions of the recipe's `data`.
    """
    if recipe.replay:
        return Replay(old=recipe.replay, capacity=max(1024, recipe.replay))
    if recipe.lag:
        return Lagging(recipe.lag)
    if recipe.ahead:
        return Ahead.for_claim(claim)
    if recipe.teacher is not None:
        return Decoded(teacher_of(recipe))
    return Given(given()) if recipe.data is not None else None
