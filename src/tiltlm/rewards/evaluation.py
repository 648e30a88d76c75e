"""Parts as evaluation: what a corpus of completions scores, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tiltlm.errors import InputError
from tiltlm.estimates import Estimate
from tiltlm.evidence.composition import as_formula
from tiltlm.evidence.function import label_of
from tiltlm.evidence.parts import text_of
from tiltlm.records import Draws

RESAMPLES = 200


def evaluate(
    metrics: Any,
    completions: Sequence[Any] | Draws,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    **columns: Sequence[Any],
) -> dict[str, Estimate]:
    """Metrics over a corpus: the mean of a reward, and for those that are no means (BLEU, chrF, F1 of labels) the corpus's own.

    Args:
        metrics: a part, a formula, a function, or several of them in a list.
        completions: texts, conversations, or draws (which bring prompts and columns along).
        resamples: of the completions, with replacement, for the standard error of what is no mean (Efron's bootstrap).
        columns: one value a completion.

    Returns:
        An estimate by name: of a mean with its standard error, of a corpus metric with the bootstrap's.

    Raises:
        InputError: if there are no completions, or a column has another length.
    """
    if isinstance(completions, Draws):
        index = completions.prompt_index.tolist()
        prompts = completions.prompts
        given = {name: [values[i] for i in index] for name, values in prompts.columns.items()}
        ids = [row[keep].tolist() for row, keep in zip(completions.tokens, completions.mask, strict=True)]
        given |= {"prompts": [prompts.texts[i] for i in index], "completion_ids": ids}
        columns, completions = given | columns, completions.texts
    wrong = next((name for name, values in columns.items() if len(values) != len(completions)), None)
    if wrong is not None:
        raise InputError(
            f"{wrong} has {len(columns[wrong])} values for {len(completions)} completions; give one a completion"
        )
    if not len(completions):
        raise InputError("there are no completions to evaluate; give at least one")
    found: dict[str, Estimate] = {}
    for metric in metrics if isinstance(metrics, list | tuple) else [metrics]:
        if hasattr(metric, "corpus"):
            found |= _corpus(metric, [text_of(c) for c in completions], columns, resamples, seed)
        else:
            found[label_of(metric)] = _mean(metric, completions, columns)
    return found


def _mean(metric: Any, completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> Estimate:
    values = torch.tensor(as_formula(metric)(completions=completions, **columns), dtype=torch.float64)
    count = len(values)
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(count) if count > 1 else math.nan, count)


def _corpus(
    metric: Any, texts: Sequence[str], columns: Mapping[str, Sequence[Any]], resamples: int, seed: int
) -> dict[str, Estimate]:
    read = {name: columns[name] for name in metric.reads if name in columns}
    missing = [name for name in metric.reads if name not in columns]
    if missing:
        raise InputError(f"metric {metric.label!r} reads {missing[0]!r}; give it, one value a completion")
    value = metric.corpus(texts, **read)
    rng = torch.Generator().manual_seed(seed)
    again: dict[str, list[float]] = {name: [] for name in value}
    for _ in range(resamples if len(texts) > 1 else 0):
        rows = torch.randint(len(texts), (len(texts),), generator=rng).tolist()
        some = {name: [values[row] for row in rows] for name, values in read.items()}
        for name, number in metric.corpus([texts[row] for row in rows], **some).items():
            again[name].append(number)
    error = {
        name: float(torch.tensor(v, dtype=torch.float64).std()) if len(v) > 1 else math.nan for name, v in again.items()
    }
    names = {name: name if name == metric.label else f"{metric.label}/{name}" for name in value}
    return {names[name]: Estimate(float(number), error[name], len(texts)) for name, number in value.items()}
