"""The loop of a supervised start: shuffled batches, AdamW, validation loss, early stop; killed at any moment, it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm.errors import InputError, at_least_one, not_negative
from tiltlm.inference import checkpoint
from tiltlm.inference.optimise import Optimiser, learning_rate
from tiltlm.seeds import generator

Loss = Callable[[Sequence[int]], tuple[Tensor, int]]
"""Rows -> their loss summed over their tokens, and the number of tokens."""


@dataclass(frozen=True)
class Schedule:
    """Settings of the loop.

    Attributes:
        steps: most updates of the weights.
        seconds: most seconds of training, validation included; None for no limit. The learning rate falls to 0 with the steps or
            with the time, whichever is nearer its end; where the time ends first, the result depends on the machine's speed.
        lr: AdamW's learning rate after a linear warm-up of `warmup` steps; then it falls as a cosine.
        smoothing: of the labels.
        bfloat16: matrix products in it where the hardware has them. On two cores a third faster with large matrices, slower with small
            ones: for a captioner, not for the translators.
        batch_tokens: most tokens of source and target in a step, padding included.
        validate_every: validation loss, and a checkpoint, every so many steps.
        patience: stop after so many validations without a smaller loss; 0 to go on.
        clip: largest norm of the gradient.
        seed: of weights, batches and dropout.
    """

    steps: int = 2000
    seconds: float | None = None
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.01
    smoothing: float = 0.1
    bfloat16: bool = False
    batch_tokens: int = 2048
    validate_every: int = 100
    patience: int = 4
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "batch_tokens", "validate_every")
        for name, example in (("seconds", "180"), ("clip", "1.0")):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; it must be positive, for example {example}")
        not_negative(self, "warmup", "patience", "weight_decay", "seed")
        if not 0 < self.lr < 1:
            raise InputError(f"lr is {self.lr}; it must be between 0 and 1, for example 3e-3")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing is {self.smoothing}; it must be at least 0 and below 1, for example 0.1")


@dataclass
class Progress:
    """How far a training is; all of it goes into a checkpoint."""

    step: int = 0
    epoch: int = 0
    place: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    bad: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def ended(self, schedule: Schedule) -> bool:
        """Whether there is nothing left to do."""
        return self.share(schedule) >= 1 or bool(schedule.patience and self.bad >= schedule.patience)

    def share(self, schedule: Schedule) -> float:
        """How much of the budget is used: of the steps or of the seconds, whichever is more."""
        of_time = 0.0 if schedule.seconds is None else self.seconds / schedule.seconds
        return max(self.step / schedule.steps, of_time)


def train(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[torch.Generator], list[list[int]]],
    validate: Callable[[], float],
    schedule: Schedule,
    *,
    folder: Path,
    key: str,
    progress: Callable[[float], None],
) -> Progress:
    """Train the model's trainable weights; at the end it has those of the smallest validation loss.

    Args:
        batches: an epoch's batches of rows, of a generator.
        validate: nats a token on the validation rows.
        folder: for checkpoints; a training that was interrupted there goes on, with the same batches.
        key: what the training is; another's checkpoints are passed over.
        progress: told by how much of the budget the training has moved on.
    """
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimiser = Optimiser(weights, schedule.lr, schedule.weight_decay)
    best = {name: value.detach().clone() for name, value in weights.items()}
    state = _restored(folder, key, optimiser, best)
    told = 0.0
    while not state.ended(schedule):
        epoch = batches(generator(schedule.seed, "batches", state.epoch))
        for rows in epoch[state.place :]:
            began = time.perf_counter()
            _step(model, loss, rows, schedule, optimiser, state.step, state.share(schedule))
            state.step, state.place = state.step + 1, state.place + 1
            state.seconds += time.perf_counter() - began
            if state.share(schedule) >= 1 or state.step % schedule.validate_every == 0:
                _judge(model, validate, weights, best, state)
                _write(folder, key, optimiser, best, state)
            now = min(1.0, state.share(schedule))
            progress(now - told)
            told = now
            if state.ended(schedule):
                break
        else:
            state.epoch, state.place = state.epoch + 1, 0
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(best[name])
    model.eval()
    return state


def _step(
    model: nn.Module,
    loss: Loss,
    rows: Sequence[int],
    schedule: Schedule,
    optimiser: Optimiser,
    step: int,
    share: float,
) -> None:
    """One update; its dropout is a function of seed and step."""
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(generator(schedule.seed, "dropout", step).initial_seed())
        total, tokens = loss(rows)
    (total / tokens).backward()
    optimiser.gather()
    warm = min(1.0, (step + 1) / (schedule.warmup + 1))
    factor = warm * learning_rate(share * schedule.steps, schedule.steps, 0, "cosine")
    optimiser.step(schedule.clip, factor)


def _judge(
    model: nn.Module,
    validate: Callable[[], float],
    weights: Mapping[str, nn.Parameter],
    best: dict[str, Tensor],
    state: Progress,
) -> None:
    """Validation loss; the best weights are kept, and a loss that is no number ends the training with a sentence."""
    began = time.perf_counter()
    model.eval()
    with torch.inference_mode():
        now = validate()
    if not math.isfinite(now):
        raise FloatingPointError(f"the validation loss is {now} after {state.step} steps; lower lr")
    state.curve.append((state.step, now))
    if now < state.best:
        state.best, state.best_step, state.bad = now, state.step, 0
        for name, value in weights.items():
            best[name].copy_(value.detach())
    else:
        state.bad += 1
    state.seconds += time.perf_counter() - began


def _write(folder: Path, key: str, optimiser: Optimiser, best: Mapping[str, Tensor], state: Progress) -> None:
    tensors = {**optimiser.tensors(), **{f"best.{name}": value for name, value in best.items()}}
    values: dict[str, Any] = {"key": key, **vars(state)}
    checkpoint.write(folder, checkpoint.Checkpoint(state.step, tensors, values), keep=1)


def _restored(folder: Path, key: str, optimiser: Optimiser, best: dict[str, Tensor]) -> Progress:
    found = checkpoint.latest(folder)
    if found is None or found.values.get("key") != key:
        return Progress()
    optimiser.restore(found.tensors)
    for name, value in best.items():
        value.copy_(found.tensors[f"best.{name}"])
    known = {name: value for name, value in found.values.items() if name != "key"}
    known["curve"] = [(int(step), float(loss)) for step, loss in known["curve"]]
    return Progress(**known)
