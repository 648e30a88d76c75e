"""What is measured of each of the five applications. A list: take it, add to it, leave some out."""

from __future__ import annotations

import difflib
from typing import Any

from tiltlm import rewards
from tiltlm.errors import InputError
from tiltlm.evaluation.metrics import DistinctN, PassAtK, SelfBLEU, Unique

TASKS = ("generation", "qa", "translation", "summary", "captions")


def task_metrics(task: str, *, column: str | None = None, embeddings: bool = False, k: int = 8) -> list[Any]:
    """The metrics of a task.

    Args:
        task: one of `TASKS`.
        column: holds the references (of captions, the scenes); "answer" (or "scene") by default.
        embeddings: also the cosine to the reference, by MiniLM.
        k: tries of pass@k.

    Raises:
        InputError: for a task that is none of them.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, n=1)
        raise InputError(
            f"task is {task!r}; " + (f"did you mean {near[0]!r}?" if near else f"choose {', '.join(TASKS)}")
        )
    reference = column or "answer"
    diversity = [DistinctN(2), SelfBLEU(), Unique(), rewards.Length()]
    exact = rewards.ExactMatch(reference)
    of_task: dict[str, list[Any]] = {
        "generation": [rewards.Repetition()],
        "qa": [
            exact,
            PassAtK(k, exact),
            rewards.TokenF1(reference),
            rewards.TokenPrecision(reference),
            rewards.TokenRecall(reference),
        ],
        "translation": [rewards.CHRF(reference), rewards.BLEU(reference)],
        "summary": [rewards.RougeL(reference)],
        "captions": [rewards.SceneF1(column or "scene")],
    }
    if embeddings and task != "captions":
        of_task[task].append(rewards.TopicSimilarity(column=reference))
    return [*of_task[task], *diversity]
