"""A cache of keys and values that holds a prompt once, however many completions go on from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.lm.attention import Groups, Keys

ROOM = 32
"""Positions that a row's cache begins with; it doubles when they are used up."""
APART_BYTES = 2**20
"""Keys and values of a layer that rows may have of their prompts, each for itself; more than that is worth sharing."""


@dataclass(frozen=True)
class Layer:
    """Keys and values of one layer; heads come first.

    Attributes:
        shared: those of the prompts.
        own: those of the rows, with room for more; None before the first.
    """

    shared: tuple[Float[Tensor, "K P L D"], Float[Tensor, "K P L D"]]
    own: tuple[Float[Tensor, "K B C D"], Float[Tensor, "K B C D"]] | None = None

    @staticmethod
    def of_prompts(keys: Float[Tensor, "K P L D"], values: Float[Tensor, "K P L D"]) -> tuple[Layer, Keys, Keys]:
        """What is remembered of prompts; and the keys and values that they look at, which nobody shares yet."""
        keys, values = keys.contiguous(), values.contiguous()
        return Layer((keys, values)), Keys(keys[:, :, :0], keys), Keys(values[:, :, :0], values)

    def grown(
        self, keys: Float[Tensor, "K B S D"], values: Float[Tensor, "K B S D"], used: int
    ) -> tuple[Layer, Keys, Keys]:
        """With new positions after the `used` ones of the rows; and all keys and values that are there.

        A single new position gets the empty room behind it as well: products of what lies in one piece are several times as fast
        on a CPU, and `Sight` hides the rest.
        """
        if torch.is_grad_enabled():  # written in place they could not be differentiated
            new = keys.contiguous(), values.contiguous()
            own = new if self.own is None else _joined(self.own, new, used)
        else:
            own = _written(self.own, (keys, values), used)
        last = own[0].shape[2] if keys.shape[2] == 1 else used + keys.shape[2]
        whole = [Keys(shared, mine[:, :, :last]) for shared, mine in zip(self.shared, own, strict=True)]
        return Layer(self.shared, own), whole[0], whole[1]


@dataclass
class SharedCache:
    """What a light model remembers. It grows as the model reads on.

    Attributes:
        layers: one for each layer that has read the prompts.
        groups: the prompt of each row.
        plans: the weights, layer by layer, that made it and that go on from it.
        used: positions that the rows have beyond their prompts.
    """

    layers: list[Layer]
    groups: Groups
    plans: Sequence[Any]
    used: int = 0

    @property
    def shared(self) -> int:
        """Positions of the prompts."""
        return self.layers[0].shared[0].shape[2] if self.layers else 0

    def layer(self, number: int) -> Layer | None:
        """What is remembered of layer `number`; None before it has read the prompts."""
        return self.layers[number] if number < len(self.layers) else None

    def keep(self, number: int, layer: Layer) -> None:
        """Remember this of layer `number`, and forget what was remembered of it."""
        self.layers[number : number + 1] = [layer]

    def rows(self, index: Int[Tensor, " B"]) -> SharedCache:
        """A cache that holds the rows in `index`; differentiable, and the original keeps its rows. Prompts are not copied."""
        prompts, owner = self.groups.owner[index].unique(return_inverse=True)
        layers = [
            Layer(
                _select(layer.shared, prompts) if len(prompts) < self.groups.count else layer.shared,
                None if layer.own is None else _select([x[:, :, : self.used] for x in layer.own], index),
            )
            for layer in self.layers
        ]
        return replace(self, layers=layers, groups=Groups(owner, len(prompts)))

    def as_prompts(self) -> SharedCache:
        """Rows of prompts that begin alike as prompts of their own: the beginning, and what each row has read after it."""
        owner = self.groups.owner
        alone = Groups(torch.arange(len(owner), device=owner.device), len(owner))
        return replace(self, layers=[Layer(whole) for whole in self._whole()], groups=alone, used=0)

    def apart(self) -> SharedCache:
        """The same with a copy of its prompt for every row, if these are small: then one product more costs more than reading them."""
        if not self.layers or not self.shared or self._copied() > APART_BYTES:
            return self
        layers = [Layer(_none(layer.shared), whole) for layer, whole in zip(self.layers, self._whole(), strict=True)]
        return replace(self, layers=layers, used=self.shared + self.used)

    def _copied(self) -> int:
        """Bytes of a layer's keys and values if every row has its prompt."""
        keys, values = self.layers[0].shared
        return (keys[:, 0].nbytes + values[:, 0].nbytes) * len(self.groups.owner)

    def _whole(self) -> Iterator[tuple[Float[Tensor, "K B L D"], Float[Tensor, "K B L D"]]]:
        """Keys and values of each row with its prompt's before them, layer by layer."""
        owner = self.groups.owner
        for layer in self.layers:
            shared = [x.index_select(1, owner) for x in layer.shared]
            own = _none(shared) if layer.own is None else layer.own
            keys, values = (torch.cat([a, b[:, :, : self.used]], dim=2) for a, b in zip(shared, own, strict=True))
            yield keys, values

    def forgetting(self, count: int) -> SharedCache:
        """The same without the first `count` positions beyond the prompts, which no row looks at any more."""
        layers = [
            Layer(layer.shared, None if layer.own is None else (layer.own[0][:, :, count:], layer.own[1][:, :, count:]))
            for layer in self.layers
        ]
        return replace(self, layers=layers, used=self.used - count)

    def beside(self, other: SharedCache) -> SharedCache:
        """The rows of both, `other`'s behind; of `other` the prompts alone have been read. Without gradient.

        Prompts are padded on the left to one length. Beyond them the new rows have as many positions as the old ones: nothing is
        there, and whoever masks the rows hides it.
        """
        wide, count = max(self.shared, other.shared), len(other.groups.owner)
        layers: list[Layer] = []
        for mine, new in zip(self.layers, other.layers, strict=True):
            shared = [
                torch.cat([_left(a, wide), _left(b, wide)], dim=1) for a, b in zip(mine.shared, new.shared, strict=True)
            ]
            own = None if mine.own is None else [_below(x[:, :, : self.used], count) for x in mine.own]
            layers.append(Layer((shared[0], shared[1]), None if own is None else (own[0], own[1])))
        owner = torch.cat([self.groups.owner, other.groups.owner + self.groups.count])
        return replace(self, layers=layers, groups=Groups(owner, self.groups.count + other.groups.count))


def _none(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """No positions."""
    keys, values = (x[:, :, :0] for x in tensors)
    return keys, values


def _below(x: Float[Tensor, "K B C D"], count: int) -> Float[Tensor, "K A C D"]:
    """With `count` empty rows behind."""
    return torch.cat([x, x.new_zeros(x.shape[0], count, *x.shape[2:])], dim=1)


def _left(x: Float[Tensor, "K P L D"], width: int) -> Float[Tensor, "K P W D"]:
    """Padded on the left."""
    return torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0))


def _joined(own: Sequence[Tensor], new: Sequence[Tensor], used: int) -> tuple[Tensor, Tensor]:
    keys, values = (torch.cat([old[:, :, :used], more], dim=2) for old, more in zip(own, new, strict=True))
    return keys, values


def _written(own: Sequence[Tensor] | None, new: Sequence[Tensor], used: int) -> tuple[Tensor, Tensor]:
    last = used + new[0].shape[2]
    if own is None or own[0].shape[2] < last:
        alone = own is None and new[0].shape[2] > 1  # such as completions that are scored: nothing comes after them
        room = last if alone else max(ROOM, 2 * used, last)
        # nobody looks at the empty room, but its weight of 0 times a NaN would be NaN
        grown = [more.new_zeros(*more.shape[:2], room, more.shape[3]) for more in new]
        if own is not None:
            for wide, old in zip(grown, own, strict=True):
                wide[:, :, :used] = old[:, :, :used]
        own = grown
    for wide, more in zip(own, new, strict=True):
        wide[:, :, used:last] = more
    return own[0], own[1]


def _select(tensors: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = (x.index_select(1, index) for x in tensors)
    return keys, values
