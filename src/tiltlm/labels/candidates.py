"""The completions that may be compared: texts, and the pairs of them that a question may be about."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.records import Draws, Prompts, Text


@dataclass(frozen=True)
class Candidates:
    """B completions of P prompts, and the M pairs of them that may be asked about.

    Attributes:
        prompts: each prompt, a text or messages.
        completions: the texts, of all prompts together.
        prompt_index: the prompt of each completion.
        pairs: two completions of one prompt in each row, with different texts.
        columns: the prompts' further columns by name, for rewards that ask for them.
    """

    prompts: tuple[Text, ...]
    completions: tuple[str, ...]
    prompt_index: Int[Tensor, " B"]
    pairs: Int[Tensor, "M 2"]
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.pairs):
            raise InputError("there are no pairs to ask about; give at least one prompt two different completions")
        self._require_in_range()
        owners = self.prompt_index[self.pairs]
        wrong = (owners[:, 0] != owners[:, 1]).nonzero().flatten().tolist()
        if wrong:
            raise InputError(
                f"pair {wrong[0]} compares completions of the prompts {owners[wrong[0]].tolist()}; rewards of different "
                f"prompts cannot be compared, pair completions of one prompt"
            )

    def _require_in_range(self) -> None:
        known = {"prompt_index": (self.prompt_index, len(self.prompts)), "pairs": (self.pairs, len(self.completions))}
        for name, (places, count) in known.items():
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < count:
                what = "prompts" if name == "prompt_index" else "completions"
                raise InputError(
                    f"{name} goes from {int(places.min())} to {int(places.max())}, and there are {count} {what}; count them from 0"
                )
        if len(self.prompt_index) != len(self.completions):
            raise InputError(
                f"prompt_index has {len(self.prompt_index)} values for {len(self.completions)} completions; give one a completion"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def owner(self) -> Int[Tensor, " M"]:
        """The prompt of each pair."""
        return self.prompt_index[self.pairs[:, 0]]

    def differences(self, members: Float[Tensor, "K B"]) -> Float[Tensor, "K M"]:
        """Each member's r(first) - r(second), in float64.

        What a member adds to all completions of a prompt cancels here: Bradley–Terry data cannot know it.

        Raises:
            InputError: if there is not one finite reward a member and completion.
        """
        if members.ndim != 2 or members.shape[1] != len(self.completions):
            raise InputError(
                f"members have the shape {tuple(members.shape)}; give rewards of shape (members, {len(self.completions)}), "
                f"one a completion"
            )
        if not members.isfinite().all():
            raise InputError(
                "members hold rewards that are not finite; mend the reward posterior that they are draws of"
            )
        values = members.detach().to(torch.float64)
        return values[:, self.pairs[:, 0]] - values[:, self.pairs[:, 1]]

    @classmethod
    def of_draws(cls, draws: Draws) -> Candidates:
        """All pairs of different completions that a sampler drew for the same prompt; of equal ones the first is kept."""
        groups: list[list[str]] = [[] for _ in range(len(draws.prompts))]
        for text, owner in zip(draws.texts, draws.prompt_index.tolist(), strict=True):
            groups[owner].append(text)
        return cls.of_groups(draws.prompts.texts, groups, draws.prompts.columns)

    @classmethod
    def of_groups(
        cls,
        prompts: Sequence[Text],
        completions: Sequence[Sequence[str]],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Candidates:
        """All pairs of different completions within each prompt's list.

        Raises:
            InputError: if no prompt has two different completions.
        """
        groups = [list(dict.fromkeys(group)) for group in completions]
        kept = [place for place, group in enumerate(groups) if len(group) > 1]
        texts, owner, pairs = [], [], []
        for new, place in enumerate(kept):
            rows = range(len(texts), len(texts) + len(groups[place]))
            pairs += itertools.combinations(rows, 2)
            texts += groups[place]
            owner += [new] * len(groups[place])
        return cls(
            tuple(prompts[place] for place in kept),
            tuple(texts),
            torch.tensor(owner, dtype=torch.long),
            torch.tensor(pairs, dtype=torch.long).view(-1, 2),
            {name: tuple(values[place] for place in kept) for name, values in (columns or {}).items()},
        )

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Candidates:
        """Rows with `prompt` and `completions` (a list of texts); further columns go with the prompt.

        Raises:
            InputError: naming the row and what is wrong with it.
        """
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get("prompt"), str | list | tuple) or not row["prompt"]:
                raise InputError(
                    f"row {number} has prompt {row.get('prompt')!r:.60}; give a text or a list of messages"
                )
            given = row.get("completions")
            if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
                raise InputError(f"row {number} has completions {given!r:.60}; give a list of texts")
        names = [name for name in (rows[0] if rows else {}) if name not in ("prompt", "completions")]
        prompts = [row["prompt"] if isinstance(row["prompt"], str) else tuple(row["prompt"]) for row in rows]
        columns = {name: [row.get(name) for row in rows] for name in names}
        return cls.of_groups(prompts, [row["completions"] for row in rows], columns)

    def as_draws(self) -> Draws:
        """The completions as records that reward functions take; they have texts and no tokens."""
        count, empty = len(self.completions), torch.zeros(len(self.prompts), 0, dtype=torch.long)
        none = torch.zeros(count, 0)
        return Draws(
            Prompts(empty, empty.bool(), self.prompts, self.columns),
            none.long(),
            none.bool(),
            torch.ones(count, dtype=torch.bool),
            self.prompt_index,
            none,
            self.completions,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "prompts": list(self.prompts),
            "completions": list(self.completions),
            "prompt_index": self.prompt_index.tolist(),
            "pairs": self.pairs.tolist(),
            "columns": {name: list(values) for name, values in self.columns.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Candidates:
        """The inverse of `as_dict`."""
        return cls(
            tuple(text if isinstance(text, str) else tuple(text) for text in values["prompts"]),
            tuple(values["completions"]),
            torch.tensor(values["prompt_index"], dtype=torch.long),
            torch.tensor(values["pairs"], dtype=torch.long).view(-1, 2),
            {name: tuple(column) for name, column in values["columns"].items()},
        )
