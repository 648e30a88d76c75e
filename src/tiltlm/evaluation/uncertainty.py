"""Standard errors over prompts and seeds, and what a bootstrap draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tiltlm.estimates import Estimate


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        estimate: its value, with its standard error over prompts and seeds together.
        seeds_stderr: the part of it that other seeds would change: the standard error over seeds alone; NaN for one seed.
        difference: from the baseline's number on the same prompts (and resamples); None for the baseline itself.
    """

    estimate: Estimate
    seeds_stderr: float
    difference: Estimate | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON, null where there is no number."""
        found: dict[str, object] = {**_plain(self.estimate), "seeds_stderr": _finite(self.seeds_stderr)}
        return {**found, "difference": None if self.difference is None else _plain(self.difference)}


def mean_of(values: Float[Tensor, "S P"]) -> tuple[Estimate, float]:
    """The mean over seeds and prompts with its standard error, and the standard error over seeds alone.

    Prompts and seeds are both drawn from more, and crossed: of a mean of y_sp = m + a_s + b_p + e_sp the variance is
    (MS_seeds + MS_prompts - MS_rest) / (S P), by the mean squares of a two-way layout (Searle, Casella & McCulloch 1992, chapter 4),
    and never less than the larger of the first two. With one seed it is the prompts' variance / P. Prompts without a value
    (NaN) are left out.
    """
    known = values[:, ~values.isnan().any(0)]
    seeds, prompts = known.shape
    if not prompts:
        return Estimate(math.nan, math.nan, 0), math.nan
    mean = known.mean()
    by_prompt, by_seed = known.mean(0), known.mean(1)
    ms_prompts = seeds * by_prompt.var() if prompts > 1 else torch.tensor(math.nan)
    if seeds == 1:
        return Estimate(float(mean), math.sqrt(float(ms_prompts) / prompts), prompts), math.nan
    ms_seeds = prompts * by_seed.var()
    rest = known - by_prompt[None] - by_seed[:, None] + mean
    ms_rest = rest.square().sum() / max(1, (seeds - 1) * (prompts - 1))
    total = torch.maximum(ms_seeds + ms_prompts - ms_rest, torch.maximum(ms_seeds, ms_prompts))
    stderr = math.sqrt(float(total) / (seeds * prompts))
    return Estimate(float(mean), stderr, prompts), math.sqrt(float(by_seed.var()) / seeds)


def difference_of(values: Float[Tensor, "S P"], base: Float[Tensor, "Q P"]) -> Estimate:
    """The mean difference on the same prompts; seed by seed where both have as many, else from the baseline's mean over seeds."""
    paired = base if len(base) == len(values) else base.mean(0, keepdim=True)
    return mean_of(values - paired)[0]


@dataclass(frozen=True)
class Resampled:
    """A corpus metric of each seed, on all prompts and on resamples of them.

    Attributes:
        values: on all prompts, one a seed.
        again: on each resample, the mean over seeds.
    """

    values: Float[Tensor, " S"]
    again: Float[Tensor, " R"]
    prompts: int

    def cell(self, base: Resampled | None) -> Cell:
        """The number with its error: the bootstrap's over prompts, and the seeds', added in quadrature."""
        own = self._estimate(self.values, self.again)
        if base is None:
            return Cell(own, _seeds(self.values))
        paired = base.values if len(base.values) == len(self.values) else base.values.mean()
        return Cell(own, _seeds(self.values), self._estimate(self.values - paired, self.again - base.again))

    def _estimate(self, values: Float[Tensor, " S"], again: Float[Tensor, " R"]) -> Estimate:
        over_seeds = _seeds(values)
        over_prompts = float(again.std()) if len(again) > 1 else math.nan
        stderr = over_prompts if math.isnan(over_seeds) else math.hypot(over_prompts, over_seeds)
        return Estimate(float(values.mean()), stderr, self.prompts)


def resamples_of(prompts: int, count: int, seed: int) -> Int[Tensor, "R P"]:
    """Which prompts each resample holds: the same for every system, so that differences are paired (Koehn 2004)."""
    return torch.randint(prompts, (count, prompts), generator=Generator().manual_seed(seed))


def bootstrap(
    runs: Sequence[Sequence[Callable[[Int[Tensor, " P"]], Mapping[str, float]]]], prompts: int, rows: Int[Tensor, "R P"]
) -> dict[str, Resampled]:
    """A corpus metric by name, on all prompts and on the resamples.

    Args:
        runs: of each seed, of each completion of a prompt, the metric of the corpus made of some prompts.
    """
    every = torch.arange(prompts)
    whole = [_means([corpus(every) for corpus in run]) for run in runs]
    again = [
        _means([_means([corpus(some) for corpus in run]) for run in runs])
        for some in (rows if prompts > 1 else rows[:0])
    ]
    return {
        name: Resampled(
            torch.tensor([found[name] for found in whole], dtype=torch.float64),
            torch.tensor([found[name] for found in again], dtype=torch.float64),
            prompts,
        )
        for name in whole[0]
    }


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def _seeds(values: Float[Tensor, " S"]) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(estimate: Estimate) -> dict[str, object]:
    return {"value": _finite(estimate.value), "stderr": _finite(estimate.stderr), "n": estimate.n}
