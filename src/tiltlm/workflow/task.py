"""`tiltlm task`: an application from its data to a table. Several ways to the posterior, several seeds, one untouched test set.

Each (method, seed) leaves a file with its completions of the test prompts, so that a run that was cut off goes on where it was,
and metrics can be taken anew without drawing anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Generator

from tiltlm.diagnostics.certificate import certify
from tiltlm.errors import InputError
from tiltlm.evaluation import DistinctN, PassAtK, System, TaskTable, evaluate_systems
from tiltlm.evaluation.systems import Completions
from tiltlm.inference.catalogue import decoding_engines, make_trainer
from tiltlm.inference.decoding.budget import within
from tiltlm.inference.fit import fit
from tiltlm.inference.monitor import Monitor
from tiltlm.inference.source import Decoded, Given, Source
from tiltlm.lm.given import demonstrations
from tiltlm.protocols import Sampler
from tiltlm.records import Prompts, Weighted
from tiltlm.rewards import Length
from tiltlm.weights import group_sum, normalise
from tiltlm.workflow.files import write_json
from tiltlm.workflow.inputs import read_prompts, reward_of
from tiltlm.workflow.recipe import Recipe
from tiltlm.workflow.run import Progress, Run
from tiltlm.workflow.templates import templated


@dataclass(frozen=True)
class Outcome:
    """What one method says to the test prompts, with one seed.

    Attributes:
        texts: completions of each test prompt.
        reward: the mean of the target's reward over them.
        log_ratios: log q - log pi0 of each completion, in nats; None where the method has no density.
        kl_posterior: the certificate's interval (value, low, high) of KL(q || p*); None likewise.
        seconds: of training and of drawing.
    """

    method: str
    seed: int
    texts: Completions
    reward: float
    log_ratios: tuple[tuple[float, ...], ...] | None = None
    kl_posterior: tuple[float, float, float] | None = None
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """All but the texts, for JSON."""
        bound = (
            None if self.kl_posterior is None else dict(zip(("value", "low", "high"), self.kl_posterior, strict=True))
        )
        return {
            "method": self.method,
            "seed": self.seed,
            "reward": self.reward,
            "kl_posterior": bound,
            "seconds": self.seconds,
        }


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
    _runs: dict[int, Run] = field(default_factory=dict, repr=False)

    @cached_property
    def beta(self) -> float:
        """One temperature for all seeds: the recipe's, or the one that the first seed's plan chooses."""
        return self._first.chosen_beta()

    @cached_property
    def _first(self) -> Run:
        return Run(self.recipe, self.progress)

    @cached_property
    def test_rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of the test set; where the recipe has a template, with the prompt that it makes."""
        r = self.recipe
        if r.test is None:
            raise InputError(
                "test is missing; write the held-out prompts with their references into the recipe, 'test: FILE'"
            )
        return [dict(row) for row in templated(read_prompts(r.test, r.column, r.columns), r.template, r.column)]

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

    def run(self, seed: int) -> Run:
        """The recipe with another seed, at the one temperature, in a folder of its own."""
        if seed not in self._runs:
            changes = {"seed": seed, "beta": self.beta, "kl_budget": None, "reward_goal": None}
            recipe = self.recipe.model_copy(update={**changes, "out": str(self.folder / f"seed-{seed}")})
            self._runs[seed] = Run(recipe, self.progress)
        return self._runs[seed]

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
        if method not in METHODS:
            raise InputError(f"method is {method!r}; choose {', '.join(METHODS)}")
        file = self.folder / "task" / f"{method.replace('/', '-then-')}-{seed}.json"
        key = self.key(method, seed)
        if (kept := _kept(file, key)) is not None:
            return kept
        found = METHODS[method](_Bench(self, self.run(seed), method, seed))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": key, **asdict(found)})
        return found

    def key(self, method: str, seed: int) -> str:
        """What a method's completions depend on, as a hash: not the metrics, which are taken anew."""
        return _hash(self.training_key(seed), method, self.draws, [str(row) for row in self.test_rows])

    def training_key(self, seed: int) -> str:
        """What the recipe's policy depends on, as a hash."""
        apart = {"out", "metrics", "quick", "test", "trackers"}
        settings = self.recipe.model_dump(exclude=apart) | {"seed": seed, "beta": self.beta}
        return _hash(settings, self._first.reward_code, [str(row) for row in self._first.rows])


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
        kl_posterior=None if bound is None else tuple(bound),
    )


@dataclass(frozen=True, eq=False)
class _Bench:
    """A method at work: a run, and the test prompts."""

    task: TaskRun
    of: Run
    method: str
    seed: int

    @cached_property
    def prompts(self) -> Prompts:
        return self.of.prior.encode(self.task.test_rows)

    @cached_property
    def target(self) -> Any:
        return self.of.target(self.task.beta)

    def judged(self, sampler: Sampler, seconds: float) -> Outcome:
        """A law's draws, with its certificate on the test prompts."""
        began = time.perf_counter()
        certificate = certify(
            self._reporting(sampler),
            self.target,
            self.prompts,
            samples=self.task.draws,
            exact_budget=self.of.recipe.exact_budget,
            seed=self.seed + 1,
        )
        scored, bound = certificate.scored, certificate.kl_posterior
        drawn = System.drawn(self.method, scored.draws, prior=self.of.prior)
        return Outcome(
            self.method,
            self.seed,
            drawn.runs[0],
            certificate.reward.value,
            drawn.log_ratios[0] if drawn.log_ratios else None,
            (bound.value, bound.low, bound.high),
            seconds + time.perf_counter() - began,
        )

    def decoded(self, engine: str, proposal: Sampler | None = None, seconds: float = 0.0) -> Outcome:
        """What a decoding engine returns: completions resampled from its weights."""
        began = time.perf_counter()
        decoder = within(decoding_engines()[engine], max(self.of.recipe.group, self.task.draws))
        rng = Generator().manual_seed(self.seed)
        weighted: Weighted = decoder.sample(self.target, self.prompts, proposal=proposal, rng=rng)
        reward = self.target.beta * expectation(weighted, weighted.scored.log_evidence.double())
        returned = System.resampled(self.method, self.task.draws, Generator().manual_seed(self.seed + 1), weighted)
        seconds += time.perf_counter() - began
        return Outcome(self.method, self.seed, returned.runs[0], reward, seconds=seconds)

    def trained(self, engine: str, source: Source) -> tuple[Any, float]:
        """A policy trained by another engine than the recipe's, with the recipe's other settings, and how long it took."""
        r, began = self.of.recipe, time.perf_counter()
        policy = fit(
            self.target,
            source.scored.draws.prompts if isinstance(source, Given) else self.of.prompts,
            make_trainer(engine, r.group, r.max_new_tokens, {}),
            source=source,
            lora=self.of.lora(),
            settings=self.of.training_settings(),
            monitor=Monitor(console=self.task.console, what=f"{self.method}, seed {self.seed}"),
        )
        return policy, time.perf_counter() - began

    def demonstrations(self) -> Given:
        """The references of the training prompts."""
        rows = templated(self.of.rows, self.of.recipe.completion, "completion", "completion")
        return Given(demonstrations(self.of.prior, rows))

    def policy(self) -> tuple[Any, float]:
        """The policy of the recipe's own engine, trained unless its folder has it."""
        folder, began = self.of.recipe.folder, time.perf_counter()
        facts, key = folder / "task.json", self.task.training_key(self.seed)
        known: dict[str, Any] = json.loads(facts.read_text()) if facts.is_file() else {"key": key}
        if known["key"] != key:
            raise InputError(
                f"{folder} holds a policy that was trained with other settings; give this run a folder of its own with --out"
            )
        if "training" not in known:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(facts, known)  # before the training, so that one that is cut off knows whose it is
            monitor = Monitor(console=self.task.console, out=folder, what=f"policy, seed {self.seed}")
            self.of.train(resume=(folder / "checkpoints").is_dir(), monitor=monitor)
            known["training"] = time.perf_counter() - began
            write_json(facts, known)
        return self.of.sampler(None), float(known["training"])

    def _reporting(self, sampler: Any) -> Any:
        if self.task.progress is None:
            return sampler
        bar = self.task.progress(f"{self.method}, seed {self.seed}", len(self.prompts) * self.task.draws)
        return replace(sampler, progress=bar)


def expectation(weighted: Weighted, values: Any) -> float:
    """The weighted mean of a value of each draw, averaged over prompts."""
    index, count = weighted.scored.draws.prompt_index, len(weighted.scored.draws.prompts)
    share = normalise(weighted.log_w.double(), index, count)
    return float(group_sum(share * values, index, count).mean())


def _prior(bench: _Bench) -> Outcome:
    return bench.judged(bench.of.prior, 0.0)


def _sft(bench: _Bench) -> Outcome:
    policy, seconds = bench.trained("sft", bench.demonstrations())
    found = bench.judged(policy, seconds)
    policy.discard()
    return found


def _best_of_n(bench: _Bench) -> Outcome:
    return bench.decoded("best-of-n")


def _smc(bench: _Bench) -> Outcome:
    return bench.decoded("smc")


def _policy(bench: _Bench) -> Outcome:
    return bench.judged(*bench.policy())


def _dpo(bench: _Bench) -> Outcome:
    teacher = within(decoding_engines()["importance"], bench.of.recipe.samples)
    policy, seconds = bench.trained("dpo", Decoded(teacher))
    found = bench.judged(policy, seconds)
    policy.discard()
    return found


def _corrected(bench: _Bench) -> Outcome:
    policy, seconds = bench.policy()
    return bench.decoded("smc", policy, seconds)


METHODS: Mapping[str, Callable[[_Bench], Outcome]] = {
    "prior": _prior,
    "sft": _sft,
    "best-of-n": _best_of_n,
    "smc": _smc,
    "policy": _policy,
    "dpo": _dpo,
    "policy/smc": _corrected,
}
"""The prior as it is; fine-tuning on the references; the best of n and SMC of the prior; the recipe's engine at the planned
beta; DPO on pairs of posterior samples; and the policy corrected by SMC."""


def task_table(task: TaskRun, methods: Sequence[str], seeds: int) -> tuple[TaskTable, list[Outcome]]:
    """Every method with every seed, in one table; the prior and SMC's baselines are drawn once a seed like the others.

    Raises:
        InputError: for a method or metric that is not there.
    """
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
    prompts = task.test_prompts
    return evaluate_systems(task.name, prompts, systems, task.metrics, baseline=methods[0]), outcomes


def certificates(outcomes: Sequence[Outcome], beta: float) -> Table:
    """How far each law is from the posterior of the test prompts, and its reward; a line a method and seed."""
    table = Table(
        title=f"certificates on the test prompts, beta {beta:.3g}", title_justify="left", box=None, pad_edge=False
    )
    for head in ("", "seed", "E r", "KL(q||p*), nats at 95%"):
        table.add_column(head, justify="left" if not head else "right")
    for found in outcomes:
        bound = found.kl_posterior
        high = "" if bound is None else "∞" if math.isinf(bound[2]) else f"{bound[2]:.2f}"
        shown = "–" if bound is None else f"[{bound[1]:.2f}, {high}]"
        table.add_row(found.method, str(found.seed), f"{found.reward:.3f}", escape(shown))
    return table
