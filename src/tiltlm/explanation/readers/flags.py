"""Command lines in shell scripts: words, line continuations, variables that the script itself sets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from tiltlm.errors import InputError

_ASSIGNED = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(\S.*?)?\s*$")
_USED = re.compile(r"\$\{([A-Za-z_]\w*)(?::?-([^}]*))?\}|\$([A-Za-z_]\w*)")


def words(script: str | Sequence[str]) -> list[str]:
    """The words of a command line or shell script, comments gone and its own variables filled in.

    A variable that the script does not set keeps its name, such as $KL.

    Raises:
        InputError: if quotes do not match.
    """
    if not isinstance(script, str):
        return [str(word) for word in script]
    joined = re.sub(r"\\\s*\n", " ", script)
    known: dict[str, str] = {}
    for line in joined.splitlines():
        if match := _ASSIGNED.match(line):
            known[match[1]] = _filled((match[2] or "").strip("\"'"), known)
    try:
        return shlex.split(_filled(joined, known), comments=True)
    except ValueError as error:
        raise InputError(f"the command line cannot be read: {str(error).lower()}; close the quotes") from None


def _filled(text: str, known: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return known.get(match[1] or match[3], match[2] if match[2] is not None else match[0])

    return _USED.sub(value, text)
