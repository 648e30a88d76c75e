"""Libraries that some parts are made of, and that TiltLM runs without."""

from __future__ import annotations

import importlib
from typing import Any

from tiltlm.errors import InputError


def require(module: str, package: str, part: str) -> Any:
    """The module, imported on first use.

    Raises:
        InputError: if it is not installed, naming what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"reward {part!r} needs {package}, which is not installed; run: pip install 'tiltlm[rewards]'"
        ) from error
