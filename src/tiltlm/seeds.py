"""Random generators by purpose, so that no two parts of a run share their random numbers by accident."""

from __future__ import annotations

import hashlib

from torch import Generator


def generator(seed: int, purpose: str, number: int = 0) -> Generator:
    """A generator of its own for every seed, purpose and number."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))
