"""Where TiltLM keeps what takes long to make: converted models, prepared data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """TILTLM_CACHE, or the user's cache folder (XDG_CACHE_HOME), and in it `tiltlm`."""
    root = os.environ.get("TILTLM_CACHE") or os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(root) / "tiltlm"
