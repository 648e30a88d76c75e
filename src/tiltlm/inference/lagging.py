"""A proposal that stays behind the policy, and moves up only where that brings it nearer to the posterior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.inference.source import Batch, Origin, Stream, Turn
from tiltlm.protocols import Policy
from tiltlm.records import Prompts, Scored
from tiltlm.store import scored_of, tensors_of
from tiltlm.target import Target
from tiltlm.weights import group_count, group_sum, normalise


@dataclass(frozen=True)
class Lagging:
    """Draws of the policy as it once was: first of the prior, later of copies that are taken now and then.

    Every `every` steps the copy is renewed if the policy is nearer to the posterior than the copy, KL(p*||policy) <
    KL(p*||copy): the KL-adaptive proposal of distributional policy gradients (Khalifa et al. 2021, algorithm 1). The
    difference of the two, E_p*[log policy - log copy], is estimated by the weighted draws since the last look; what the
    copy never draws is not seen. The copy is as large as the trained weights.

    Attributes:
        every: steps between looks.
        adaptive: renew the copy only where it pays; False renews it at every look.
    """

    every: int = 8
    adaptive: bool = True
    copies_weights: ClassVar = True

    @property
    def origin(self) -> Origin:
        return "other"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(
                f"lag is {self.every}; it counts steps between looks at the proposal and must be at least 1"
            )

    def open(self, target: Target, policy: Policy, prompts: Prompts, seed: int) -> Stream:
        return _Lagging(self, target, policy, prompts)


class _Lagging:
    def __init__(self, choice: Lagging, target: Target, policy: Policy, prompts: Prompts) -> None:
        self.choice, self.target, self.policy, self.prompts = choice, target, policy, prompts
        self.copy = _weights_of(policy)
        self.steps = 0
        self.seen: list[Scored] = []  # since the last look

    def batch(self, turn: Turn) -> Batch:
        if self.steps and self.steps % self.choice.every == 0:
            if not self.choice.adaptive or self._nearer():
                self.copy = _weights_of(self.policy)
            self.seen = []
        self.steps += 1
        with _wearing(self.policy, self.copy):
            draws = self.policy.draw(self.prompts.select(turn.index), turn.group, turn.rng)
        scored = self.target.score(draws)
        if self.choice.adaptive:
            self.seen.append(scored.among(self.prompts, turn.index))
        return Batch(scored, None, len(draws))

    def again(self, batch: Batch, turn: Turn) -> Scored:
        return batch.scored

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"copy.{name}": value for name, value in self.copy.items()}
        values: dict[str, Any] = {"steps": self.steps, "seen": None}
        if self.seen:
            kept, values["seen"] = tensors_of(Scored.concatenate(self.seen))
            tensors |= {f"seen.{name}": value for name, value in kept.items()}
        return tensors, values

    def remember(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.steps = int(values["steps"])
        self.copy = {name: tensors[f"copy.{name}"].to(value) for name, value in self.copy.items()}
        seen = {name.removeprefix("seen."): value for name, value in tensors.items() if name.startswith("seen.")}
        self.seen = [scored_of(seen, values["seen"], self.prompts)] if seen else []

    def _nearer(self) -> bool:
        """Whether KL(p*||copy) - KL(p*||policy), estimated, is positive."""
        scored = Scored.concatenate(self.seen)
        index, count = scored.draws.prompt_index, len(self.prompts)
        weight = normalise(scored.log_weight.double(), index, count)
        gain = self.policy.log_prob(scored.draws).double().sum(-1) - scored.draws.log_prob.double()
        drawn = group_count(index, count) > 0
        return bool(group_sum(weight * gain, index, count)[drawn].mean() > 0)


def _weights_of(policy: Policy) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.named_parameters().items()}


@contextmanager
def _wearing(policy: Policy, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The policy with other weights, for a while."""
    own = _weights_of(policy)
    try:
        _put_on(policy, weights)
        yield
    finally:
        _put_on(policy, own)


@torch.no_grad()
def _put_on(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    for name, value in policy.named_parameters().items():
        value.copy_(weights[name])


__all__ = ["Lagging"]
