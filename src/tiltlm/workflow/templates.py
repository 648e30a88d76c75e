"""A recipe's template: how the columns of a row become the prompt that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from tiltlm.errors import InputError

SOURCE = "source"
"""The column of what a template's text took the place of."""


def templated(rows: Sequence[Any], template: str | None, column: str, key: str = "template") -> Sequence[Any]:
    """Rows whose `column` is what a Jinja2 template makes of their columns; plain strings are the template's `column`.

    Args:
        template: None leaves the rows as they are.
        key: the recipe's, for messages.

    Returns:
        The rows; what a template's text takes the place of stays in a column `source`, unless that is one of the row's own.

    Raises:
        InputError: for a template that is none, or one that names a column that is not there.
    """
    if template is None:
        return rows
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        compiled = environment.from_string(template)
        wanted = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError as error:
        raise InputError(f"{key} is no Jinja2 template ({error}); mend it") from error
    if not wanted:
        raise InputError(
            f"{key} is {template!r:.60} and names no column; write for example 'Q: {{{{ {column} }}}}\\nA:'"
        )
    written = []
    for number, row in enumerate(rows, 1):
        values = dict(row) if isinstance(row, Mapping) else {column: row}
        missing = next(iter(sorted(wanted - values.keys())), None)
        if missing is not None:
            raise InputError(f"{key} names the column {missing!r}, but row {number} has {', '.join(values)}; mend it")
        try:
            kept = {SOURCE: values[column]} if column in values else {}
            written.append({**kept, **values, column: compiled.render(values)})
        except TemplateError as error:
            raise InputError(f"{key} does not fit row {number} ({error}); mend it") from error
    return written
