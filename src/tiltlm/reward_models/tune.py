"""Training a trunk's weights under linear heads, several tasks at once, by minibatches.

The heads start at their MAP on the untrained features (linear probing, then fine-tuning: Kumar et al. 2022), so that the first
steps do not pull the features towards random heads. They are thrown away afterwards: the heads that stay are learned on the
trained features, where their posterior is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tiltlm.errors import InputError
from tiltlm.inference.checkpoint import Checkpoint, latest, write
from tiltlm.inference.optimise import Optimiser, learning_rate
from tiltlm.lm.trunk import Trunk
from tiltlm.reward_models.data import Task
from tiltlm.reward_models.posterior import LinearPosterior, SoftmaxPosterior, Standardiser
from tiltlm.seeds import generator


@dataclass(frozen=True)
class Tuning:
    """How a trunk is trained.

    Attributes:
        steps: of the optimiser.
        batch: rows of each task in a step.
        lr, head_lr: learning rates of the trunk and of the heads, falling to 0 along a cosine.
        warmup: steps in which they rise.
        clip: largest norm of a gradient.
        micro: rows that are run together.
        checkpoint_every: steps between checkpoints.
    """

    steps: int = 200
    batch: int = 16
    lr: float = 1e-4
    head_lr: float = 1e-3
    warmup: int = 10
    clip: float = 1.0
    micro: int = 16
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro", "checkpoint_every", "lr", "head_lr", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")


class _Head(nn.Module):
    """A linear head that starts at a MAP, and the rows it learns from."""

    def __init__(self, task: Task, start: LinearPosterior | SoftmaxPosterior) -> None:
        super().__init__()
        self.task, self.scaling = task, start.scaling
        self.loss = task.loss()  # scores come standardised: their noise is at most 1
        self.weights = nn.Parameter(torch.atleast_2d(start.weights).clone())
        self.precision = start.precision

    def forward(self, features: Tensor, rows: Int[Tensor, " B"]) -> Tensor:
        """Sum of the rows' losses; `features` are of the first answers, then of the second ones where there are pairs."""
        design = self.scaling(features.cpu())
        if self.task.kind == "preference":
            first, second = design.view(2, len(rows), -1)
            design = first - second
        return self.loss.take(rows).value(design @ self.weights.T)

    def penalty(self) -> Tensor:
        """The prior's part of a row's loss."""
        weights = self.weights[:, :-1] if self.scaling.bias else self.weights
        return 0.5 * self.precision * weights.square().sum() / len(self.task)


def tune(
    trunk: Trunk,
    tasks: Mapping[str, Task],
    heads: Mapping[str, LinearPosterior | SoftmaxPosterior],
    tuning: Tuning,
    *,
    seed: int,
    folder: Path | None = None,
    key: str = "",
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Trunk:
    """A trunk whose weights have been trained on all tasks together.

    Args:
        trunk: with an adaptation.
        heads: where the heads start.
        folder: for checkpoints; with `resume`, what is there is gone on with, and the result is the same bit for bit.
        key: says what is trained on what; a checkpoint with another one is not gone on with.
        progress: called with the number of steps done since it was called last.

    Raises:
        InputError: if the checkpoint is of another training.
    """
    live = trunk.trainable()
    modules = {name: _Head(task, heads[name]) for name, task in tasks.items()}
    parameters = {f"trunk.{name}": value for name, value in live.items()}
    parameters |= {f"head.{name}": module.weights for name, module in modules.items()}
    rates = {name: tuning.head_lr for name in parameters if name.startswith("head.")}
    optimiser = Optimiser(parameters, tuning.lr, 0.0, rates)
    ids = {name: trunk.tokens(trunk.texts(task.answers)) for name, task in tasks.items()}
    start = 0
    if folder is not None and resume and (found := latest(folder)) is not None:
        if found.values.get("key") != key:
            raise InputError(
                f"{folder} holds checkpoints of another training; take another folder, or do without --resume"
            )
        optimiser.restore(found.tensors)
        start = found.step
        if progress is not None:
            progress(start)
    for step in range(start, tuning.steps):
        for name, module in modules.items():
            _backward(
                trunk, ids[name], module, batch_rows(len(module.task), tuning.batch, step, seed, name), tuning.micro
            )
        optimiser.gather()
        optimiser.step(tuning.clip, learning_rate(step, tuning.steps, tuning.warmup, "cosine"))
        done = step + 1
        if folder is not None and (done % tuning.checkpoint_every == 0 or done == tuning.steps):
            write(folder, Checkpoint(done, optimiser.tensors(), {"key": key}))
        if progress is not None:
            progress(1)
    return trunk.trained()


def _backward(trunk: Trunk, ids: list[list[int]], head: _Head, rows: Int[Tensor, " B"], micro: int) -> None:
    """Add the gradient of the mean loss of a batch, a few rows at a time."""
    head.penalty().backward()
    for some in rows.split(micro):
        places = head.task.rows[some].T.flatten().tolist()
        loss = head(trunk.pooled([ids[place] for place in places]), some)
        (loss / len(rows)).backward()


def batch_rows(count: int, batch: int, step: int, seed: int, name: str) -> Int[Tensor, " B"]:
    """The rows of a step: every row once before any comes again, in an order of its own for each round."""
    places = range(step * batch, step * batch + min(batch, count))
    rounds = {place // count for place in places}
    orders = {r: torch.randperm(count, generator=generator(seed, f"rows of {name}", r)) for r in rounds}
    return torch.stack([orders[place // count][place % count] for place in places])


def head_design(task: Task, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features of each row: of its answer, or of both answers of a comparison."""
    first = features[task.rows[:, 0]]
    return first, features[task.rows[:, 1]] if task.kind == "preference" else None


def scaling_of(task: Task, features: Tensor) -> Standardiser:
    """Of the features of all of the task's answers."""
    return Standardiser.of(features, bias=task.biased)


__all__ = ["Tuning", "batch_rows", "head_design", "scaling_of", "tune"]
