"""The recipe's reward, run as the recipe says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tiltlm.errors import InputError
from tiltlm.evidence.running import safely
from tiltlm.evidence.running.calls import Layer, TextFunction
from tiltlm.workflow.inputs import hash_of, load_reward
from tiltlm.workflow.recipe import Recipe

CACHE = "rewards.sqlite"
"""Where in the run's folder the values of a deterministic reward are kept."""


def reward_of(recipe: Recipe, source: str) -> tuple[TextFunction, str]:
    """The reward function with what `reward_batch`, `reward_workers` and so on ask for, and a hash of its code.

    Where worker processes run it, only they import it.

    Raises:
        InputError: if there is no such file, module or function, or its code fails on import.
    """
    r = recipe
    isolated = bool(r.reward_workers) or r.reward_timeout is not None or r.reward_memory is not None
    loaded, code = (source, code_of(source)) if isolated else load_reward(source)
    fn = safely(
        loaded,
        workers=r.reward_workers,
        timeout=r.reward_timeout,
        memory=r.reward_memory,
        batch=r.reward_batch,
        retries=r.reward_retries,
        cache=r.folder / CACHE if r.reward_cache else False,
        version=f"{source} {code}",
    )
    if isinstance(fn, Layer):
        fn.load()
    return fn, code


def close(reward: Any) -> None:
    """Give back what a reward of `reward_of` holds."""
    if reward is not None and isinstance(reward[0], Layer):
        reward[0].close()


def code_of(source: str) -> str:
    """The hash that `load_reward` gives, without importing the code: for a function that only worker processes run.

    Raises:
        InputError: if there is no such file or module.
    """
    place, _, _ = source.rpartition(":")
    if place.endswith(".py"):
        path = Path(place)
    else:
        try:
            found = importlib.util.find_spec(place) if place else None
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise InputError(
                f"reward {source!r}: there is no module {place!r}; give file.py:function, or install the package"
            )
        path = Path(found.origin or "")
    if not path.is_file():
        raise InputError(f"reward: there is no file {str(path)!r}; give file.py:function")
    return hash_of(path.read_bytes())
