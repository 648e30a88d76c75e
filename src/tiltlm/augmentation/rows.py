"""Rows with TRL's columns, plain or conversational: finding the texts in them, and putting others in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiltlm.errors import InputError

Row = Mapping[str, Any]

ABOUT_THE_PAIR = ("margin", "score", "score_chosen", "score_rejected")
"""Columns that speak of the very completions of a row; they go when a completion is replaced by another."""


def is_preference(row: Row) -> bool:
    """Whether the row has chosen and rejected."""
    return row.get("chosen") is not None and row.get("rejected") is not None


def require_preference(row: Row, number: int, who: str) -> None:
    """Raise if the row is no preference.

    Raises:
        InputError: naming the row's columns.
    """
    if not is_preference(row):
        raise InputError(
            f"row {number} has the columns {', '.join(row) or 'none'}, but {who} is for preferences; give chosen and rejected, "
            f"or leave {who} out"
        )


def text_of(value: Any, number: int) -> str:
    """The text of a prompt or completion: itself, or what its last message says.

    Raises:
        InputError: if it is neither a text nor a list of messages.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and isinstance(value[-1], Mapping):
        content = value[-1].get("content")
        if isinstance(content, str):
            return content
    raise InputError(f"row {number} has {value!r:.60} where a text or a list of messages belongs; mend that row")


def with_text(value: Any, text: str) -> Any:
    """The same prompt or completion with another text; of messages, only the last one changes."""
    return text if isinstance(value, str) else [*value[:-1], {**value[-1], "content": text}]


def prompt_of(row: Row, number: int) -> str:
    """What tells the prompt of a row from another: all that is before the completion."""
    if row.get("prompt") is not None:
        return str(row["prompt"])
    for name in ("messages", "chosen"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            return str(list(value[:-1]))
    raise InputError(f"row {number} has no prompt, and no conversation that holds one; give a prompt column")


def editable(row: Row, number: int) -> list[str]:
    """The texts that an edit may change: both completions of a preference, the prompt of a demonstration.

    A demonstration's answer is what the model learns to say, so that it is left as it is.

    Raises:
        InputError: if the row is neither kind.
    """
    if is_preference(row):
        return [text_of(row["chosen"], number), text_of(row["rejected"], number)]
    if row.get("prompt") is not None:
        return [text_of(row["prompt"], number)]
    messages = row.get("messages")
    if isinstance(messages, Sequence) and len(messages) >= 2:
        return [text_of(messages[:-1], number)]
    raise InputError(
        f"row {number} has the columns {', '.join(row) or 'none'}; give prompt, chosen and rejected, or prompt and completion, "
        f"or messages"
    )


def edited(row: Row, texts: Sequence[str]) -> dict[str, Any]:
    """The row with other texts where `editable` found them."""
    if is_preference(row):
        pair = {name: with_text(row[name], text) for name, text in zip(("chosen", "rejected"), texts, strict=True)}
        return {**row, **pair}
    if row.get("prompt") is not None:
        return {**row, "prompt": with_text(row["prompt"], texts[0])}
    return {**row, "messages": [*with_text(row["messages"][:-1], texts[0]), row["messages"][-1]]}


def without_scores(row: Row) -> dict[str, Any]:
    """The row without the columns that speak of its very completions."""
    return {name: value for name, value in row.items() if name not in ABOUT_THE_PAIR}
