"""What a sampler wrote for the rows of a task, and the baselines that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator

from tiltlm.errors import InputError
from tiltlm.protocols import Sampler
from tiltlm.records import Draws, Weighted
from tiltlm.weights import resample

Completions = tuple[tuple[str, ...], ...]
"""Of each prompt, one or more texts."""


@dataclass(frozen=True)
class System:
    """The completions of one sampler.

    Attributes:
        name: as the table calls it.
        runs: one or more runs with different seeds (of training, where there is one), each with the same prompts.
        log_ratios: log q(x|c) - log pi0(x|c) of each completion, in nats, in the shape of `runs`; their mean is the KL to the prior.
        seconds: what it took, training included; None where nobody measured.
    """

    name: str
    runs: tuple[Completions, ...]
    log_ratios: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.runs or not self.runs[0]:
            raise InputError(f"system {self.name!r} has no completions; give at least one run of at least one prompt")
        for number, run in enumerate(self.runs, 1):
            if len(run) != self.prompts:
                raise InputError(
                    f"system {self.name!r}: run {number} has {len(run)} prompts and run 1 has {self.prompts}; give all the same"
                )
            empty = next((p for p, texts in enumerate(run, 1) if isinstance(texts, str) or not texts), None)
            if empty is not None:
                raise InputError(
                    f"system {self.name!r}: prompt {empty} of run {number} has no list of completions; give it at least one"
                )
        if self.log_ratios is not None and _shape(self.log_ratios) != _shape(self.runs):
            raise InputError(
                f"system {self.name!r} has log_ratios in another shape than its completions; give one a completion"
            )

    @property
    def prompts(self) -> int:
        return len(self.runs[0])

    @staticmethod
    def of(name: str, *runs: Sequence[str | Sequence[str]], seconds: float | None = None) -> System:
        """From texts: each run a list with a text, or a list of texts, for every prompt."""
        return System(
            name, tuple(tuple((x,) if isinstance(x, str) else tuple(x) for x in run) for run in runs), seconds=seconds
        )

    @staticmethod
    def drawn(name: str, *runs: Draws, prior: Sampler | None = None, seconds: float | None = None) -> System:
        """From draws of every prompt, one record a run; with the prior, their KL to it is estimated too."""
        texts, ratios = [], []
        for draws in runs:
            texts.append(_by_prompt(draws, draws.texts))
            if prior is not None:
                ratio = draws.log_prob.double() - prior.log_prob(draws).double().sum(-1)
                ratios.append(_by_prompt(draws, ratio.tolist()))
        return System(name, tuple(texts), tuple(ratios) if prior is not None else None, seconds)

    @staticmethod
    def resampled(name: str, count: int, rng: Generator, *runs: Weighted, seconds: float | None = None) -> System:
        """From a decoding engine's weighted draws: `count` completions of every prompt in proportion to their weights.

        Raises:
            InputError: if the engine kept none for a prompt.
        """
        found = []
        for weighted in runs:
            draws = weighted.scored.draws
            chosen = resample(weighted.log_w, draws.prompt_index, len(draws.prompts), count, rng)
            lost = (chosen < 0).any(-1).nonzero().flatten().tolist()
            if lost:
                raise InputError(
                    f"system {name!r} kept no completion of prompt {lost[0] + 1}; give its engine more draws"
                )
            found.append(tuple(tuple(draws.texts[i] for i in row) for row in chosen.tolist()))
        return System(name, tuple(found), seconds=seconds)


def lead(sources: Sequence[str], words: int = 8) -> System:
    """The first words of each source: what every summariser has to beat. `words` very large copies the source (translation)."""
    if words < 1:
        raise InputError(f"words is {words}; it must be at least 1")
    return System.of(f"lead-{words}", [" ".join(str(source).split()[:words]) for source in sources])


def copied(sources: Sequence[str]) -> System:
    """Each source as its own translation: what shared names, numbers and spelling are worth."""
    return System.of("copy", [str(source) for source in sources])


def _by_prompt(draws: Draws, values: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    found: list[list[Any]] = [[] for _ in range(len(draws.prompts))]
    for prompt, value in zip(draws.prompt_index.tolist(), values, strict=True):
        found[prompt].append(value)
    return tuple(map(tuple, found))


def _shape(runs: Sequence[Sequence[Sequence[Any]]]) -> list[list[int]]:
    return [[len(items) for items in run] for run in runs]
