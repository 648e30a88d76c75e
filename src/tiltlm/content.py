"""What tells one value from another, whatever kind it is of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def content(value: Any) -> str:
    """A value as text that tells it from others and is the same in another process; of an object that is all its `repr` says."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{key!r}: {content(item)}' for key, item in value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}[{', '.join(map(content, value))}]"
    if isinstance(value, set | frozenset):
        return f"set[{', '.join(sorted(map(content, value)))}]"
    if isinstance(value, Tensor):
        return f"{value.dtype}{value.tolist()}"
    if hasattr(value, "__array_interface__"):  # an image, or numpy's, whose repr leaves the middle out
        array = np.asarray(value)
        said = content(array.tolist()) if array.dtype.hasobject else hashlib.sha256(array.tobytes()).hexdigest()
        return f"{array.dtype}{array.shape}{said}"
    said = repr(value)
    return said if isinstance(value, str | bytes) else re.sub(r" at 0x[0-9a-f]+", "", said)
