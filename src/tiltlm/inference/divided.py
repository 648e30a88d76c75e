"""A training step divided between processes, without the engine, the source or the certificate knowing.

Each process draws for its own prompts, scores and rewards its own completions, and gets everybody's. The loss is a function of
log-probabilities, so that every process can evaluate it on the whole batch, with whatever baselines, groups, replay or learned
log Z the engine has; its derivative says what is wanted of each completion's log-probabilities; each process sends that back
through the passes of its own rows, and the gradients are added up. A step of many processes is thus the step of one: the same
prompts, the same random numbers, the same sum.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from tiltlm.errors import InputError
from tiltlm.inference.accumulate import deliver, derivatives, joined
from tiltlm.inference.optimise import Optimiser
from tiltlm.inference.shards import is_shared
from tiltlm.lm.score import batches
from tiltlm.protocols import Evidence, Policy, TrainingEngine
from tiltlm.records import Draws, Forward, Info, Likelihood, Prompts, Scored
from tiltlm.target import Target
from tiltlm.world import World


def shares(draws: Draws, size: int) -> list[Int[Tensor, " N"]]:
    """The rows of each process: whole prompts, as neighbours, and in numbers that differ by one at most.

    Whole prompts, so that a prompt is read by one process, and a reward that compares its completions sees them together.
    """
    present, place = draws.prompt_index.unique(return_inverse=True)
    owner = place * size // max(1, len(present))
    return [(owner == rank).nonzero().flatten() for rank in range(size)]


def by_rows(world: World, draws: Draws, work: Callable[[Draws], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`work`, a function that gives tensors of one row a completion, done by each process for its own rows."""
    if not len(draws):
        return dict(work(draws))
    rows = shares(draws, world.size)
    mine = rows[world.rank]
    found = world.every(lambda: dict(work(draws.select(mine))) if len(mine) else None)
    parts = [part for part in found if part is not None]
    back = torch.cat(rows).argsort()
    return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


class DividedSampler:
    """A sampler whose draws and scores are divided between processes. For all else it is the sampler that it stands for."""

    def __init__(self, inner: Any, world: World) -> None:
        self.inner, self.world = inner, world

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def draw(self, prompts: Prompts, n: int, rng: Generator) -> Draws:
        """Draw `n` completions of every prompt: the same, whatever the number of processes."""
        if len(prompts) < self.world.size or not hasattr(self.inner, "draw_part"):
            return self.inner.draw(prompts, n, rng)
        mine = self.world.share(len(prompts))
        parts = self.world.every(lambda: _bare(self.inner.draw_part(prompts, n, rng, mine)))
        owned = [replace(self.world, rank=rank).share(len(prompts)) for rank in range(self.world.size)]
        whole = Draws.concatenate([part.among(prompts, some) for part, some in zip(parts, owned, strict=True)])
        return replace(whole, sampler=self.inner.identity)  # a sampler's name is another in every process

    def draw_weighted(self, prompts: Prompts, n: int, rng: Generator) -> Draws:
        """The same: no generator draws for several processes (`divided` refuses it), so every draw is of the sampler's own law."""
        return self.draw(prompts, n, rng)

    def log_prob(self, draws: Draws) -> Float[Tensor, "B T"]:
        return by_rows(self.world, draws, lambda some: {"log_q": self.inner.log_prob(some)})["log_q"]


class DividedEvidence:
    """Evidence of which each process asks for its own completions."""

    def __init__(self, inner: Evidence, world: World) -> None:
        self.inner, self.world = inner, world

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def at(self, beta: float) -> DividedEvidence:
        return DividedEvidence(self.inner.at(beta), self.world)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        def asked(some: Draws) -> dict[str, Tensor]:
            found = self.inner.log_likelihood(some)
            return {"log": found.log, "kept": found.kept, **{f"reward.{k}": v for k, v in found.rewards.items()}}

        found = by_rows(self.world, draws, asked)
        rewards = {name[7:]: value for name, value in found.items() if name.startswith("reward.")}
        return Likelihood(found["log"], rewards, found["kept"])


class DividedPolicy(DividedSampler):
    """A policy whose passes are divided between processes, each of which has all of its weights."""

    def token_kl(self, draws: Draws) -> Float[Tensor, "B T"]:
        return by_rows(self.world, draws, lambda some: {"kl": self.inner.token_kl(some)})["kl"]

    def values(self, draws: Draws, needs: frozenset[str], micro_tokens: int) -> Forward:
        """What a pass over all rows gives, without gradient."""

        @torch.no_grad()
        def own(some: Draws) -> dict[str, Tensor]:
            parts = [self.inner.forward(some.select(rows), needs) for rows in batches(some, micro_tokens)]
            return {name: value for name, value in vars(joined(parts)).items() if value is not None}

        return Forward(**by_rows(self.world, draws, own))

    @contextmanager
    def training(self) -> Iterator[None]:
        """The weights as they are trained; outside they are as one draws from them. Here that is the same."""
        yield

    def run(self, passes: Callable[[], None]) -> None:
        """Run this process's passes; if they fail in one process, they fail in all."""
        self.world.each(passes)

    def passes(self, draws: Draws, micro_tokens: int) -> list[tuple[Int[Tensor, " N"], Int[Tensor, " M"]]]:
        """The rows of each of this process's passes with gradient, and rows behind them that count for nothing."""
        mine = shares(draws, self.world.size)[self.world.rank]
        none = mine[:0]
        return [(mine[rows], none) for rows in batches(draws.select(mine), micro_tokens)] if len(mine) else []


class ShardedPolicy(DividedPolicy):
    """A policy of whose weights each process has a share while it trains, and all at other times."""

    def __init__(self, inner: Any, world: World) -> None:
        from tiltlm.lm.sharded import Sharding  # torch's FSDP2 takes a while to import

        super().__init__(inner, world)
        self.sharding = Sharding(inner, world.size)

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        return self.sharding.parameters

    def forward(self, draws: Draws, needs: frozenset[str]) -> Forward:
        return self.sharding.run(lambda: self.inner.forward(draws, needs), needs)

    @contextmanager
    def training(self) -> Iterator[None]:
        with self.sharding.spreading():
            yield

    def run(self, passes: Callable[[], None]) -> None:
        """Run this process's passes, beside those of the others. A process that fails says so and ends, and the others notice."""
        try:
            passes()
        except Exception as error:
            if not self.world.main:  # it cannot tell the main process, which waits for it inside a layer
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise

    def passes(self, draws: Draws, micro_tokens: int) -> list[tuple[Int[Tensor, " N"], Int[Tensor, " M"]]]:
        """As many passes in each process, all of which run the model on the prompts and then on what follows.

        A process that has fewer, or a pass whose completions are one token long, takes the batch's longest completion along.
        """
        owned = shares(draws, self.world.size)
        parts = [
            [rows[some] for some in batches(draws.select(rows), micro_tokens)] if len(rows) else [] for rows in owned
        ]
        mine, none = parts[self.world.rank], owned[0][:0]
        mine += [none] * (max(map(len, parts)) - len(mine))
        lengths = draws.lengths
        longest = lengths.argmax()[None]
        return [(rows, none if len(rows) and _alike(lengths[rows], lengths) else longest) for rows in mine]


def _alike(some: Tensor, lengths: Tensor) -> bool:
    """Whether a pass over completions of these lengths goes on behind the prompts, if any of the batch's does."""
    return bool(some.max() > 1) or bool(lengths.max() <= 1)


def divided_update(
    policy: DividedPolicy,
    engine: TrainingEngine[Any],
    scored: Scored,
    state: Any,
    micro_tokens: int,
    optimiser: Optimiser,
    *,
    fresh: bool,
    step: Callable[[], float],
) -> tuple[Tensor, Info, float]:
    """What `accumulate` does, each process for its own rows; then all of them take the same step.

    Args:
        fresh: all of the draws are of the policy as it is, so the values are known from drawing.
        step: moves the weights along the gradient of the whole batch, and returns its norm.
    """
    needs, draws = engine.claim.needs, scored.draws
    known = fresh and needs == {"log_q"}
    values = Forward(draws.log_q) if known else policy.values(draws, needs, micro_tokens)
    loss, info, leaves = derivatives(engine, values, scored, state)

    def passes() -> None:
        for rows, ballast in policy.passes(draws, micro_tokens):
            forward = policy.forward(draws.select(torch.cat([rows, ballast])), needs)
            deliver(forward, leaves, rows, len(ballast))
            optimiser.gather()

    with policy.training():
        policy.run(passes)
        sum_gradients(policy.world, optimiser)
        return loss, info, step()


def sum_gradients(world: World, optimiser: Optimiser) -> None:
    """Add up what the processes' rows want of the weights.

    Not of an engine's own: each process has their whole gradient, from the loss of the whole batch. Nor of sharded weights, whose
    gradients torch has added up on the way.
    """
    masters = {name: value for name, value in optimiser.masters.items() if not name.startswith("engine:")}
    plain = {name: value for name, value in masters.items() if not is_shared(value)}
    wanted = world.exchange([name for name, value in plain.items() if value.grad is not None])
    anyone = set().union(*wanted)
    for name in anyone:
        if plain[name].grad is None:  # no row of this process reaches it, but one of another's does
            plain[name].grad = torch.zeros_like(plain[name])
    world.sum_([plain[name].grad for name in plain if name in anyone])  # pyright: ignore[reportArgumentType]


def divided(target: Target, policy: Policy, world: World, shard: bool) -> tuple[Target, Any]:
    """Target and policy as `world` shares their work; with `shard`, and the weights. The policy is a `DividedPolicy`.

    Raises:
        InputError: for a sampler whose draws another program makes; it would be asked for everything by every process.
    """
    if any(getattr(sampler, "generator", None) is not None for sampler in (target.prior, policy)):
        raise InputError(
            f"generator is set, but {world.size} processes were launched; a generator serves one process: leave it out, or launch one"
        )
    shared = Target(DividedSampler(target.prior, world), DividedEvidence(target.evidence, world))  # pyright: ignore
    return shared, (ShardedPolicy if shard else DividedPolicy)(policy, world)


def require_enough(world: World, batch: int, prompts: int) -> None:
    """Raise if some process would have no prompt in a step.

    Raises:
        InputError: saying what is too small.
    """
    what, count = ("batch", batch) if batch <= prompts else ("the number of prompts", prompts)
    if count < world.size:
        raise InputError(
            f"{what} is {count}, but there are {world.size} processes, each of which needs a prompt in every step; give more, "
            f"or start fewer processes"
        )


def require_divisible(source: Any, world: World, shard: bool) -> None:
    """Raise if the source cannot serve several processes, or keeps a copy of weights that are to be divided.

    Raises:
        InputError: naming the source.
    """
    if getattr(source, "one_process", False):
        raise InputError(
            f"ahead is on, but {world.size} processes were launched, whose rewards would not run in the same order; leave ahead "
            f"out, or launch one"
        )
    if shard and getattr(source, "copies_weights", False):
        raise InputError(
            f"shard is on, but the source {type(source).__name__} keeps a copy of the weights, which cannot be divided; leave out "
            f"lag, or shard"
        )


def _bare(draws: Draws) -> Draws:
    """Draws without their prompts, which the others have, to be sent."""
    empty = Prompts(torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool), ())
    return replace(draws, prompts=empty)


__all__ = ["DividedPolicy", "divided", "divided_update", "require_divisible", "require_enough"]
