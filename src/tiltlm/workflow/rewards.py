"""A recipe's functions of texts, run as the recipe says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tiltlm.errors import InputError
from tiltlm.evidence.running import safely
from tiltlm.evidence.running.calls import Layer, TextFunction
from tiltlm.workflow.inputs import hash_of, load_function
from tiltlm.workflow.recipe import Recipe

CACHE = "rewards.sqlite"
"""Where in the run's folder the values of a deterministic reward are kept."""


class FunctionLoader:
    """Functions of texts by their source, each once, with what `reward_batch`, `reward_workers` and so on ask for around them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.loaded: dict[str, tuple[TextFunction, str]] = {}

    def __call__(self, source: str, what: str) -> tuple[TextFunction, str]:
        """The function, and a hash of its code. Where worker processes run it, only they import it.

        Args:
            what: the recipe's key, for messages.

        Raises:
            InputError: if there is no such file, module or function, or its code fails on import.
        """
        if source not in self.loaded:
            self.loaded[source] = self._load(source, what)
        return self.loaded[source]

    def close(self) -> None:
        """Give back what the functions hold, worker processes and files; a later call takes it anew."""
        for fn, _ in self.loaded.values():
            if isinstance(fn, Layer):
                fn.close()

    def _load(self, source: str, what: str) -> tuple[TextFunction, str]:
        r = self.recipe
        isolated = bool(r.reward_workers) or r.reward_timeout is not None or r.reward_memory is not None
        if isolated and Path(source).is_dir():
            raise InputError(
                f"{what} is the reward model {source!r}, which runs in this process; leave out reward_workers, reward_timeout and "
                f"reward_memory"
            )
        loaded, code = (source, code_of(source, what)) if isolated else load_function(source, what)
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


def code_of(source: str, what: str) -> str:
    """The hash that `load_function` gives, without importing the code: for a function that only worker processes run.

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
                f"{what} {source!r}: there is no module {place!r}; give file.py:function, or install the package"
            )
        path = Path(found.origin or "")
    if not path.is_file():
        raise InputError(f"{what}: there is no file {str(path)!r}; give file.py:function")
    return hash_of(path.read_bytes())
