"""What a replay buffer holds: for each prompt its newest draws, in tensors that grow and are then written over."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from tiltlm.records import Prompts, Scored
from tiltlm.store import scored_of, tensors_of


class DrawMemory:
    """The newest `capacity` draws of every prompt. Adding and sampling cost what is added and sampled, not what is held."""

    def __init__(self, prompts: Prompts, capacity: int) -> None:
        self.prompts, self.capacity = prompts, capacity
        self._tensors: dict[str, Tensor] = {}
        self._texts: list[str] = []
        self._slots: dict[int, deque[int]] = {}  # of each prompt, the oldest first
        self._beta = 1.0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, scored: Scored) -> None:
        """Keep draws of this memory's prompts; a prompt that is full forgets its oldest."""
        if not len(scored):
            return
        tensors, values = tensors_of(scored)
        slots = [self._slot(prompt, text) for prompt, text in zip(_owners(scored), values["texts"], strict=True)]
        self._beta = values["beta"]
        if "log_mu" in {*tensors, *self._tensors}:  # draws without it are of the law on their log_q
            tensors.setdefault("log_mu", tensors["log_q"])
            if "log_q" in self._tensors:
                self._tensors.setdefault("log_mu", self._tensors["log_q"].clone())
        for name, new in tensors.items():
            held = _with_room(self._tensors.get(name, new[:0]), len(self), new.shape[1:])
            held[slots] = torch.nn.functional.pad(new, (0, held.shape[1] - new.shape[1])) if new.dim() == 2 else new
            self._tensors[name] = held

    def sample(self, index: Sequence[int], count: int, rng: Generator) -> Scored | None:
        """`count` draws of each prompt at `index`, without repeats, as draws for those prompts alone; None before the first."""
        if not len(self):
            return None
        slots: list[int] = []
        for prompt in index:
            held = self._slots.get(prompt, deque())
            slots += [held[i] for i in torch.randperm(len(held), generator=rng)[:count].tolist()]
        return self._take(slots).of(index)

    def everything(self) -> Scored | None:
        """All draws, a prompt's oldest first: added to an empty memory they make one that samples the same."""
        return self._take([slot for held in self._slots.values() for slot in held]) if len(self) else None

    def _slot(self, prompt: int, text: str) -> int:
        held = self._slots.setdefault(prompt, deque())
        if len(held) < self.capacity:
            slot = len(self._texts)
            self._texts.append(text)
        else:
            slot = held.popleft()
            self._texts[slot] = text
        held.append(slot)
        return slot

    def _take(self, slots: Sequence[int]) -> Scored:
        rows = torch.tensor(slots, dtype=torch.long)
        tensors = {name: held[rows] for name, held in self._tensors.items()}
        width = int(tensors["mask"].sum(-1).max()) if slots else 0
        narrow = {name: held[:, :width] if held.dim() == 2 else held for name, held in tensors.items()}
        return scored_of(
            narrow, {"texts": [self._texts[slot] for slot in slots], "beta": self._beta, "dropped": 0}, self.prompts
        )


def _owners(scored: Scored) -> list[int]:
    return scored.draws.prompt_index.tolist()


def _with_room(held: Tensor, rows: int, shape: Sequence[int]) -> Tensor:
    """The same values, with zeros behind them for at least `rows` rows as wide as `shape`; twice the rows when it grows."""
    widths = [max(have, want) for have, want in zip(held.shape[1:], shape, strict=True)]
    if rows <= len(held) and widths == list(held.shape[1:]):
        return held
    wider = held.new_zeros(max(rows, 2 * len(held)) if rows > len(held) else len(held), *widths)
    wider[tuple(slice(size) for size in held.shape)] = held
    return wider


__all__ = ["DrawMemory"]
