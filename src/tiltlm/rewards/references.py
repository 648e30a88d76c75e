"""What a task's answers are compared with: columns of the data, one or several references a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tiltlm.errors import InputError
from tiltlm.evidence.parts import Part


@dataclass(frozen=True)
class AgainstReference(Part):
    """A part that compares a completion with the references in a column.

    Attributes:
        column: holds a text for each prompt, or a list of texts, of which the best counts.
    """

    column: str = "answer"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,)

    def references(self, columns: dict[str, Sequence[Any]]) -> list[list[str]]:
        """The references of each completion.

        Raises:
            InputError: for one that has none.
        """
        return [self._references(value) for value in columns[self.column]]

    def best(
        self, texts: Sequence[str], columns: dict[str, Sequence[Any]], compare: Callable[[str, str], float]
    ) -> list[float]:
        """The largest of `compare(text, reference)` for each completion."""
        pairs = zip(texts, self.references(columns), strict=True)
        return [max(compare(text, reference) for reference in references) for text, references in pairs]

    def _references(self, value: Any) -> list[str]:
        found = list(value) if isinstance(value, list | tuple) else [value]
        if not found or any(item is None for item in found):
            raise InputError(
                f"column {self.column!r} of reward {self.label!r} holds {value!r}; give at least one reference"
            )
        return [str(item) for item in found]
