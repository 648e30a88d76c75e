"""Where a step's completions come from: the policy, the prior, a replay buffer, a decoding engine, or a data set.

A source is a choice, frozen; `open` makes the stream that `fit` takes batches from, which may remember. What an engine may
be fed is in its claim, and `fit` refuses the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.inference.memory import DrawMemory
from tiltlm.protocols import Claim, DecodingEngine, Policy
from tiltlm.records import Draws, Prompts, Scored
from tiltlm.seeds import generator
from tiltlm.store import scored_of, tensors_of
from tiltlm.target import Target
from tiltlm.weights import resample

Origin = Literal["policy", "prior", "other", "given"]
"""Whose draws a source gives: the policy's as it is now, the prior's, some other law's, or what somebody wrote."""

ACCEPTED: Mapping[str, frozenset[Origin]] = {
    "on-policy": frozenset({"policy"}),
    "prior": frozenset({"prior"}),
    "weighted": frozenset({"policy", "prior", "other"}),
    "any": frozenset({"policy", "prior", "other", "given"}),
    "given": frozenset({"policy", "prior", "other", "given"}),
}
"""Which origins each `Claim.data` is sound with."""


Memory = tuple[dict[str, Tensor], dict[str, Any]]
"""What a stream remembers, for a checkpoint: tensors by name, and plain values."""

TRIES = 8
"""How often a decoding engine is asked again that gave no sample at all."""


@dataclass(frozen=True)
class Turn:
    """What one step asks of a stream: whose completions, how many of each, and the step's random numbers."""

    index: Sequence[int]
    group: int
    rng: Generator


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        scored: completions of the step's prompts, for the loss.
        fresh: those of them that the policy has just drawn, for the log; None where the draws are not the policy's.
        drawn: completions drawn for this batch, kept or not.
    """

    scored: Scored
    fresh: Scored | None
    drawn: int


class Stream(Protocol):
    """An open source."""

    def batch(self, turn: Turn) -> Batch:
        """Scored completions of the turn's prompts, about `group` of each."""
        ...

    def again(self, batch: Batch, turn: Turn) -> Scored:
        """What a further update of the same step learns from: the same fresh completions, perhaps beside others."""
        ...

    def memory(self) -> Memory:
        """What a checkpoint must keep."""
        ...

    def remember(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take back what `memory` gave; called only if that was not empty."""
        ...


class Source(Protocol):
    """A choice of where completions come from."""

    @property
    def origin(self) -> Origin: ...

    def open(self, target: Target, policy: Policy, prompts: Prompts, seed: int) -> Stream: ...


class _Memoryless:
    def again(self, batch: Batch, turn: Turn) -> Scored:
        return batch.scored

    def memory(self) -> Memory:
        return {}, {}

    def remember(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """There is nothing to remember."""


@dataclass(frozen=True)
class OnPolicy:
    """Fresh draws of the policy as it is."""

    @property
    def origin(self) -> Origin:
        return "policy"

    def open(self, target: Target, policy: Policy, prompts: Prompts, seed: int) -> Stream:
        return _Drawing(target, policy, prompts)


@dataclass(frozen=True)
class FromPrior:
    """Fresh draws of the prior."""

    @property
    def origin(self) -> Origin:
        return "prior"

    def open(self, target: Target, policy: Policy, prompts: Prompts, seed: int) -> Stream:
        return _Drawing(target, target.prior, prompts)


@dataclass(frozen=True)
class _Drawing(_Memoryless):
    target: Target
    sampler: Any
    prompts: Prompts

    def batch(self, turn: Turn) -> Batch:
        draw = getattr(self.sampler, "draw_weighted", self.sampler.draw)
        draws = draw(self.prompts.select(turn.index), turn.group, turn.rng)
        scored = self.target.score(draws)
        return Batch(scored, None if self.sampler is self.target.prior else scored, len(draws))


@dataclass(frozen=True)
class Pool:
    """Draws that are there already, such as the plan's: each step gets all of them, or `group` chosen at random.

    Attributes:
        scored: draws for exactly the prompts that are trained on, of one law, whose log-probabilities they carry.
        origin: whose draws they are.
    """

    scored: Scored = field(repr=False)
    origin: Origin = "prior"

    def open(self, target: Target, policy: Policy, prompts: Prompts, seed: int) -> Stream:
        _require_draws_of(self.scored.draws, prompts)
        return _Stored(self.scored.at(target.beta))


@dataclass(frozen=True)
class _Stored(_Memoryless):
    scored: Scored

    def batch(self, turn: Turn) -> Batch:
        chosen = at_most(self.scored.of(turn.index), turn.group, turn.rng)
        return Batch(chosen, None, 0)


@dataclass(frozen=True)
class Replay:
    """Fresh draws of the policy, together with draws of its earlier selves.

    Old draws carry the log-probability of the law that drew them, so that an engine which is sound off-policy corrects for
    their age. Each update of a step gets other old draws.

    Attributes:
        old: earlier draws of each prompt in a step, beside the engine's `group` of fresh ones.
        capacity: draws kept for each prompt; the oldest leave first. A long memory pays, a short one does not (LAB.md).
    """

    old: int = 8
    capacity: int = 1024

    @property
    def origin(self) -> Origin:
        return "other"

    def __post_init__(self) -> None:
        if self.old < 1 or self.capacity < self.old:
            raise InputError(
                f"replay has old {self.old} and capacity {self.capacity}; both must be at least 1, and capacity at least old"
            )

    def open(self, target: Target, policy: Policy, prompts: Prompts, seed: int) -> Stream:
        return _Replaying(self, target, policy, prompts)


class _Replaying:
    def __init__(self, choice: Replay, target: Target, policy: Policy, prompts: Prompts) -> None:
        self.choice, self.prompts = choice, prompts
        self.drawing = _Drawing(target, policy, prompts)
        self.held = DrawMemory(prompts, choice.capacity)
        self.newest: Scored | None = None  # of the last step; they come to the memory after its updates

    def batch(self, turn: Turn) -> Batch:
        self._put_away()
        fresh = self.drawing.batch(turn).scored
        self.newest = fresh.among(self.prompts, turn.index)
        return Batch(self._beside(fresh, turn), fresh, len(fresh))

    def again(self, batch: Batch, turn: Turn) -> Scored:
        return self._beside(batch.fresh or batch.scored, turn)

    def memory(self) -> Memory:
        self._put_away()
        everything = self.held.everything()
        return ({}, {}) if everything is None else tensors_of(everything)

    def remember(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.held.add(scored_of(tensors, values, self.prompts))

    def _beside(self, fresh: Scored, turn: Turn) -> Scored:
        old = self.held.sample(turn.index, self.choice.old, turn.rng)
        if old is None:
            return fresh
        # the step's prompts under both, so that rows of one prompt meet
        return Scored.concatenate([fresh, replace(old, draws=replace(old.draws, prompts=fresh.draws.prompts))])

    def _put_away(self) -> None:
        if self.newest is not None:
            self.held.add(self.newest)
            self.newest = None


@dataclass(frozen=True)
class Decoded:
    """What a decoding engine returns: `group` samples a prompt, resampled from its weights.

    Attributes:
        engine: for example `Rejection(n=64)`, for exact posterior samples, or `BestOfN(16)`.
        proposal: what the engine draws from: the prior, or the policy as it is.
    """

    engine: DecodingEngine
    proposal: Literal["prior", "policy"] = "prior"

    @property
    def origin(self) -> Origin:
        return "given"

    def open(self, target: Target, policy: Policy, prompts: Prompts, seed: int) -> Stream:
        return _Decoding(self, target, policy, prompts)


@dataclass(frozen=True)
class _Decoding(_Memoryless):
    choice: Decoded
    target: Target
    policy: Policy
    prompts: Prompts

    def batch(self, turn: Turn) -> Batch:
        prompts, engine, drawn = self.prompts.select(turn.index), self.choice.engine, 0
        proposal = self.policy if self.choice.proposal == "policy" else None
        for _ in range(TRIES):
            weighted = engine.sample(self.target, prompts, proposal=proposal, rng=turn.rng)
            scored = weighted.scored
            drawn += len(scored) + scored.dropped
            rows = resample(weighted.log_w, scored.draws.prompt_index, len(prompts), turn.group, turn.rng).flatten()
            if (rows >= 0).any():
                chosen = scored.select(rows[rows >= 0])
                return Batch(chosen, None, drawn)
        raise InputError(
            f"{type(engine).__name__} gave no sample for any prompt of a step in {drawn} draws; give it more draws, or raise beta"
        )


@dataclass(frozen=True)
class Given:
    """Completions that somebody wrote, perhaps with preferences between them (`Scored.pairs`).

    Attributes:
        scored: completions of exactly the prompts that are trained on.
        origin: whose completions they are, where that is known: "prior" for a data set that the prior wrote.
    """

    scored: Scored = field(repr=False)
    origin: Origin = "given"

    @property
    def identity(self) -> str:
        """Tells these completions, and the preferences between them, from others."""
        digest = hashlib.sha256()
        for tensor in (self.scored.draws.tokens, self.scored.draws.prompt_index, self.scored.pairs):
            digest.update(b"-" if tensor is None else tensor.cpu().numpy().tobytes())
        return f"{self} {digest.hexdigest()[:16]}"

    def open(self, target: Target, policy: Policy, prompts: Prompts, seed: int) -> Stream:
        _require_draws_of(self.scored.draws, prompts)
        return _Everything(self.scored.at(target.beta))


@dataclass(frozen=True)
class _Everything(_Memoryless):
    scored: Scored

    def batch(self, turn: Turn) -> Batch:
        chosen = self.scored.of(turn.index)
        return Batch(chosen, None, 0)


def default_source(claim: Claim) -> Source:
    """The source that an engine is fed from unless one is named.

    Raises:
        InputError: for an engine that learns from completions that somebody wrote.
    """
    if claim.data == "given":
        raise InputError(
            "this engine learns from given completions; pass source=, for example Given(…) or Decoded(Rejection())"
        )
    return FromPrior() if claim.data == "prior" else OnPolicy()


def require_sound(engine: Any, source: Source) -> None:
    """Refuse draws that the engine's claim does not cover."""
    claim: Claim = engine.claim
    name = type(engine).__name__
    if claim.fixed_point == "data" and isinstance(source, Given) and source.scored.pairs is not None:
        raise InputError(
            f"the given completions have pairs, and {name} would learn the rejected ones as well; give "
            f"demonstrations(prior, rows), which takes the chosen ones, or an engine that compares, such as DPO"
        )
    if source.origin in ACCEPTED[claim.data]:
        return
    remedy = {
        "on-policy": "it is right only for fresh draws of the policy: leave source out, or take an engine whose claim says "
        "data: any, such as VarGrad",
        "prior": "it needs the rest of every completion to come from the prior: use FromPrior() or a Pool of prior draws",
    }.get(
        claim.data,
        "it corrects for the law that drew, which is unknown here; take an engine whose claim says data: any",
    )
    raise InputError(f"source is {type(source).__name__}, which {name} cannot learn from: {remedy}")


def at_most(scored: Scored, count: int, rng: Generator) -> Scored:
    """`count` rows of every prompt, chosen at random; all of a prompt that has no more."""
    order = torch.rand(len(scored), generator=rng).argsort()
    return scored.select(_first(scored.draws.prompt_index, order, count))


def _first(prompt_index: Tensor, order: Tensor, count: int) -> Tensor:
    """Rows among the first `count` of their prompt in `order`; as a sorted index."""
    by_prompt = order[prompt_index[order].argsort(stable=True)]
    owner = prompt_index[by_prompt]
    starts = torch.searchsorted(owner, owner)  # the first place of each row's prompt
    rank = torch.arange(len(owner)) - starts
    return by_prompt[rank < count].sort().values


def _require_draws_of(draws: Draws, prompts: Prompts) -> None:
    same = len(draws.prompts) == len(prompts) and draws.prompts.texts == prompts.texts
    if not same:
        raise InputError(
            f"the source holds draws for {len(draws.prompts)} prompts that are not the {len(prompts)} to train on; draw again"
        )


__all__ = [
    "Batch",
    "Decoded",
    "FromPrior",
    "Given",
    "OnPolicy",
    "Pool",
    "Replay",
    "Source",
    "Stream",
    "Turn",
    "default_source",
    "require_sound",
]


def batch_of(step: int, prompts: int, size: int, seed: int) -> list[int]:
    """The prompts of a step: every prompt once an epoch, in an order that depends on seed and epoch only."""
    chosen: list[int] = []
    size = min(size, prompts)
    position = step * size
    while len(chosen) < size:
        epoch, offset = divmod(position, prompts)
        order = torch.randperm(prompts, generator=generator(seed, "order", epoch)).tolist()
        taken = order[offset : offset + size - len(chosen)]
        chosen += taken
        position += len(taken)
    return chosen
