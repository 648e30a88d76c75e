"""What a decoding engine costs, in completions drawn for a prompt.

An engine whose field `n` is that number needs nothing more. One that counts otherwise says so itself, with a property `cost` and
a method `within(draws)` that gives the same engine at that cost or less.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def cost(engine: Any) -> int:
    """Completions of a prompt that `engine` draws, at most."""
    return engine.cost if hasattr(engine, "cost") else engine.n


def within(engine: Any, draws: int) -> Any:
    """The same engine, drawing at most `draws` completions of a prompt (at least as many as it needs to draw any)."""
    return engine.within(draws) if hasattr(engine, "within") else replace(engine, n=max(1, draws))
