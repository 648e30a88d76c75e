"""`tiltlm task`: an application from its data to a table. Several ways to the posterior, several seeds, one untouched test set.

Each (method, seed) leaves a file with its completions of the test prompts, so that a run that was cut off goes on where it was,
and metrics can be taken anew without drawing anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from tiltlm.content import content
from tiltlm.data.reading import IMAGE
from tiltlm.data.spec import Progress
from tiltlm.errors import InputError, TiltWarning
from tiltlm.evaluation import (
    DistinctN,
    PassAtK,
    RiskCoverage,
    System,
    TaskTable,
    evaluate_systems,
    risk_coverage,
    vote,
)
from tiltlm.inference.compare import RANKING
from tiltlm.records import Prompts
from tiltlm.rewards import Length, SelectiveAccuracy
from tiltlm.target import Target
from tiltlm.workflow.files import write_json
from tiltlm.workflow.inputs import read_prompts, reward_of
from tiltlm.workflow.methods import Bench, Outcome, method_of
from tiltlm.workflow.recipe import Recipe
from tiltlm.workflow.recipe_files import for_method
from tiltlm.workflow.references import parts_of, require_references
from tiltlm.workflow.run import Run
from tiltlm.workflow.templates import templated


@dataclass(frozen=True, eq=False)
class TaskRun:
    """A recipe with a test set, in action.

    Attributes:
        recipe: with `test`; its seed is the first.
        draws: completions of each test prompt that a method is judged by.
        console: where the bars of the training go.
    """

    recipe: Recipe
    draws: int = 8
    progress: Progress | None = None
    console: Any = None
    _runs: dict[str, Run] = field(default_factory=dict, repr=False)

    @cached_property
    def beta(self) -> float:
        """One temperature for all seeds: the recipe's, or the one that the first seed's plan chooses."""
        return self._first.chosen_beta()

    @cached_property
    def _first(self) -> Run:
        return Run(self.recipe, self.progress)

    def target(self, beta: float) -> Target:
        """The recipe's target at a temperature."""
        return self._first.target(beta)

    @cached_property
    def test_rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of the test set; where the recipe has a template, with the prompt that it makes."""
        r = self.recipe
        if r.test is None:
            raise InputError(
                "test is missing; write the held-out prompts with their references into the recipe, 'test: FILE'"
            )
        read = read_prompts(r.test, r.column, r.columns, what="test", progress=self.progress)
        return [dict(row) for row in templated(read, r.template, r.column)]

    @cached_property
    def test_prompts(self) -> Prompts:
        """The test set as the model reads it."""
        return self._first.prior.encode(self.test_rows)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def metrics(self) -> list[Any]:
        """The recipe's metrics, and how different a prompt's completions are."""
        parts = [self._metric(dict(settings)) for settings in self.recipe.metrics]
        return [*parts, DistinctN(2), Length()]

    def _metric(self, settings: dict[str, Any]) -> Any:
        """A part by name; `pass-at-k` is of another part."""
        if settings.get("part") != "pass-at-k":
            return reward_of([settings], self._first.lm, what="metrics")[0]
        if not isinstance(settings.get("of"), Mapping):
            raise InputError(
                "metrics: pass-at-k needs the part that tells right from wrong, of: {part: exact-match, column: …}"
            )
        return PassAtK(
            int(settings.get("k", self.draws)), reward_of([dict(settings["of"])], self._first.lm, what="metrics")[0]
        )

    def check(self) -> None:
        """All that can be wrong with recipe and data, before hours of training.

        Raises:
            InputError: naming it.
        """
        self._first.check()
        for name in self.recipe.methods:
            method_of(name)
        judges = [part.judge if isinstance(part, PassAtK) else part for part in self.metrics]
        require_references([*parts_of(self.recipe), *judges], self.test_rows, str(self.recipe.test))
        _ = self.test_prompts, self._first.prompts
        self._say_if_seen()

    def _say_if_seen(self) -> None:
        """Warn of test prompts that are trained on."""

        def prompt(row: Any) -> str:
            return content(
                [row.get(name) for name in (self.recipe.column, IMAGE)] if isinstance(row, Mapping) else [row, None]
            )

        seen = set(map(prompt, self._first.rows))
        count = sum(prompt(row) in seen for row in self.test_rows)
        if count:
            warnings.warn(
                f"{count} of the {len(self.test_rows)} test prompts ({self.recipe.test}) are among those that are trained on "
                f"({self.recipe.prompts}): the table says less than it seems to; take other rows, such as FILE[200:]",
                TiltWarning,
                stacklevel=2,
            )

    def run(self, seed: int) -> Run:
        """The recipe with another seed, at the one temperature, in a folder of its own."""
        return self.another(seed, out=str(self.folder / f"seed-{seed}"))

    def another(self, seed: int, *, out: str, **changes: Any) -> Run:
        """The same with other changes to the recipe; a folder has one run."""
        if out not in self._runs:
            own = {"seed": seed, "beta": self.beta, "kl_budget": None, "reward_goal": None, "out": out, **changes}
            self._runs[out] = Run(self.recipe.model_copy(update=own), self.progress)
        return self._runs[out]

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    def close(self) -> None:
        """End what the runs' rewards hold."""
        for run in [*self._runs.values(), *([self._first] if "_first" in self.__dict__ else [])]:
            run.close()

    def outcome(self, method: str, seed: int) -> Outcome:
        """One method with one seed; from its file if that is of these settings.

        Raises:
            InputError: for a method that is not there.
        """
        way = method_of(method)
        file = self.folder / "task" / f"{method.replace('/', '-then-')}-{seed}.json"
        key = self.key(method, seed)
        if (kept := _kept(file, key)) is not None:
            return kept
        found = way(Bench(self, self.run(seed), method, seed))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": key, **asdict(found)})
        return found

    def key(self, method: str, seed: int) -> str:
        """What a method's completions depend on, as a hash: not the metrics, which are taken anew."""
        key = self.training_key(seed, method, *method.split("/"))
        return _hash(key, method, self.draws, [str(row) for row in self.test_rows])

    def training_key(self, seed: int, *methods: str) -> str:
        """What a policy depends on, as a hash: the recipe, and what it says of the methods that the policy goes through."""
        apart = {"out", "metrics", "baselines", "methods", "quick", "test", "trackers"}
        settings = self.recipe.model_dump(exclude=apart) | {"seed": seed, "beta": self.beta}
        own = {name: self.recipe.methods[name] for name in methods if name in self.recipe.methods}
        return _hash(settings, own, self._first.reward_code, [str(row) for row in self._first.rows])


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _kept(file: Path, key: str) -> Outcome | None:
    try:
        values = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    if values.pop("key", None) != key:
        return None
    texts = tuple(map(tuple, values.pop("texts")))
    ratios, bound = values.pop("log_ratios"), values.pop("kl_posterior")
    return Outcome(
        **values,
        texts=texts,
        log_ratios=None if ratios is None else tuple(map(tuple, ratios)),
        kl_posterior=None if bound is None else (bound[0], bound[1], _or_infinity(bound[2])),
    )


def _or_infinity(end: float | None) -> float:
    """JSON has no infinity: the files have null."""
    return math.inf if end is None else end


def task_table(
    task: TaskRun, methods: Sequence[str], seeds: int, baseline: str | None = None
) -> tuple[TaskTable, list[Outcome]]:
    """Every method with every seed, in one table.

    Args:
        baseline: the method that the others are compared with; the first by default.

    Raises:
        InputError: for a method or metric that is not there.
    """
    compared = methods[0] if baseline is None else baseline
    if compared not in methods:
        raise InputError(f"baseline is {compared!r}; choose one of the methods, {', '.join(methods)}")
    for method in methods:
        method_of(method)
        for_method(task.recipe, method)
    task.check()
    outcomes = [task.outcome(method, task.recipe.seed + seed) for seed in range(seeds) for method in methods]
    by_method = {method: [found for found in outcomes if found.method == method] for method in methods}
    systems = [
        System(
            method,
            tuple(found.texts for found in some),
            tuple(f.log_ratios or () for f in some) if all(f.log_ratios is not None for f in some) else None,
            sum(found.seconds for found in some) / len(some),
        )
        for method, some in by_method.items()
    ]
    bar = None if task.progress is None else task.progress("judging", len(systems) * len(task.metrics))
    table = evaluate_systems(task.name, task.test_prompts, systems, task.metrics, baseline=compared, progress=bar)
    return table, outcomes


def risk_curves(task: TaskRun, outcomes: Sequence[Outcome]) -> list[RiskCoverage]:
    """For each method that is a law, the risk of answering with the vote of its draws, against how often one does.

    All seeds together. What a decoding engine returns was chosen by a reward that knows the answers, so that its agreement is no
    confidence. None where no metric of the recipe's is about answers that may be withheld.
    """
    judge = next((metric for metric in task.metrics if isinstance(metric, SelectiveAccuracy)), None)
    if judge is None:
        return []
    columns: dict[str, Sequence[Any]] = {name: task.test_prompts.columns[name] for name in judge.reads}
    votes: dict[str, list[tuple[float, bool]]] = {}
    for found in outcomes:
        if found.log_ratios is not None:
            chosen = [vote(texts, judge.phrases) for texts in found.texts]
            right = judge.right([one.answer for one in chosen], columns)
            votes.setdefault(found.method, []).extend(zip([one.share for one in chosen], right, strict=True))
    return [risk_coverage(method, *zip(*pairs, strict=True)) for method, pairs in votes.items()]


def certificates(outcomes: Sequence[Outcome], beta: float) -> Table:
    """How far each law is from the posterior of the test prompts, and its reward; a line a method and seed."""
    table = Table(
        title=f"certificates on the test prompts, beta {beta:.3g}", title_justify="left", box=None, pad_edge=False
    )
    for head in ("", "seed", "E r", "ELBO", "KL(q||p*), nats at 95%"):
        table.add_column(head, justify="left" if not head else "right")
    table.caption, table.caption_justify = RANKING, "left"
    for found in outcomes:
        bound = found.kl_posterior
        high = "" if bound is None else "∞" if math.isinf(bound[2]) else f"{bound[2]:.2f}"
        shown = "–" if bound is None else f"[{bound[1]:.2f}, {high}]"
        reward, elbo = ("–" if value is None else f"{value:.3f}" for value in (found.reward, found.elbo))
        table.add_row(found.method, str(found.seed), reward, elbo, escape(shown))
    return table
