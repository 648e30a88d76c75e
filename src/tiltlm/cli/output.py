"""What commands write: lines for people on the console, and the same as a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

console = Console()
stderr = Console(stderr=True)


def speak_only(main: bool) -> None:
    """Of several processes only the main one writes to the screen."""
    console.quiet = stderr.quiet = not main


def say(text: object, *, style: str = "", aside: bool = False) -> None:
    """A line as it is: no markup, no highlighting, no wrapping.

    Args:
        aside: to stderr, for what is not the result.
    """
    (stderr if aside else console).print(str(text), style=style, highlight=False, markup=False, soft_wrap=True)


def require_writable(*files: Path | None) -> None:
    """Raise before the work if one of the files could not be written after it.

    Raises:
        InputError: saying why.
    """
    for file in files:
        if file is not None:
            from tiltlm.workflow.files import require_writable_file

            require_writable_file(file)


def write_result(file: Path | None, values: Mapping[str, Any]) -> None:
    """The result as JSON, where `--json` asked for it."""
    if file is not None:
        from tiltlm.workflow.files import write_json

        write_json(file, values)
