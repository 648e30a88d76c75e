"""The ways to the posterior that `tiltlm task` compares, each from a recipe to completions of the test prompts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Generator

from tiltlm.diagnostics.certificate import certify
from tiltlm.errors import InputError
from tiltlm.evaluation import System, agreement, copied, lead, mbr_system, voted
from tiltlm.evaluation.systems import Completions
from tiltlm.inference.catalogue import decoding_engines, make_trainer
from tiltlm.inference.decoding.budget import within
from tiltlm.inference.fit import fit
from tiltlm.inference.monitor import Monitor
from tiltlm.inference.source import Given, Source
from tiltlm.lm.given import demonstrations
from tiltlm.protocols import Sampler
from tiltlm.records import Prompts, Weighted
from tiltlm.weights import group_sum, normalise
from tiltlm.workflow.files import write_json
from tiltlm.workflow.recipe_files import for_method
from tiltlm.workflow.templates import SOURCE, templated
from tiltlm.workflow.training import lora_of, training_of

if TYPE_CHECKING:
    from tiltlm.workflow.run import Run
    from tiltlm.workflow.task import TaskRun


@dataclass(frozen=True)
class Outcome:
    """What one method says to the test prompts, with one seed.

    Attributes:
        texts: completions of each test prompt.
        reward: the mean of the target's reward over them; None for texts that no model drew.
        reward_stderr: its standard error, where the draws are a law's.
        log_ratios: log q - log pi0 of each completion, in nats; None where the method has no density.
        elbo: log Z - KL(q || p*), nats; None likewise. What two methods differ by is by how much one is nearer to p*.
        kl_posterior: the certificate's interval (value, low, high) of KL(q || p*); None likewise.
        seconds: of training and of drawing.
    """

    method: str
    seed: int
    texts: Completions
    reward: float | None = None
    reward_stderr: float | None = None
    log_ratios: tuple[tuple[float, ...], ...] | None = None
    kl_posterior: tuple[float, float, float] | None = None
    seconds: float = 0.0
    elbo: float | None = None

    def facts(self) -> dict[str, Any]:
        """All but the texts, for JSON."""
        bound = (
            None if self.kl_posterior is None else dict(zip(("value", "low", "high"), self.kl_posterior, strict=True))
        )
        return {
            "method": self.method,
            "seed": self.seed,
            "reward": self.reward,
            "elbo": self.elbo,
            "kl_posterior": bound,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, eq=False)
class Bench:
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
            certificate.reward.stderr,
            drawn.log_ratios[0] if drawn.log_ratios else None,
            (bound.value, bound.low, bound.high),
            seconds + time.perf_counter() - began,
            certificate.elbo.value,
        )

    def most_probable(self, sampler: Any, seconds: float = 0.0) -> Outcome:
        """Greedy decoding: the one completion that takes the most probable token each time. Not a draw, so without a density."""
        began = time.perf_counter()
        greedy = replace(self._reporting(sampler, 1), law=replace(sampler.law, top_k=1))
        scored = self.target.score(greedy.draw(self.prompts, 1, Generator().manual_seed(self.seed)))
        texts = System.drawn(self.method, scored.draws).runs[0]
        reward = self.target.beta * float(scored.log_evidence.double().mean())
        return Outcome(self.method, self.seed, texts, reward, seconds=seconds + time.perf_counter() - began)

    def agreed(self) -> Outcome:
        """The prior's draw that agrees best with its other draws, by the first metric that compares texts."""
        part = next((part for part in self.task.metrics if hasattr(part, "references")), None)
        if part is None:
            raise InputError(
                f"method {self.method!r} needs a metric that compares with a reference; add one, such as {{part: chrf, column: reference}}"
            )
        began = time.perf_counter()
        prior = self.task.outcome("prior", self.seed)
        chosen = mbr_system(System(self.method, (prior.texts,)), agreement(part)).runs[0]
        return Outcome(self.method, self.seed, chosen, seconds=prior.seconds + time.perf_counter() - began)

    def voted(self, least: float) -> Outcome:
        """The answer of most of the prior's draws, where it is that of at least this share of them; else silence."""
        began = time.perf_counter()
        prior = self.task.outcome("prior", self.seed)
        chosen = voted(self.method, prior.texts, least).runs[0]
        return Outcome(self.method, self.seed, chosen, seconds=prior.seconds + time.perf_counter() - began)

    def baseline(self, system: System) -> Outcome:
        """What needs no model: texts made from the sources."""
        return Outcome(self.method, self.seed, system.runs[0])

    @property
    def sources(self) -> list[str]:
        """The test prompts' texts, without what a template wrote around them."""
        column = self.of.recipe.column
        return [str(row.get(SOURCE, row[column])) for row in self.task.test_rows]

    def decoded(self, engine: str, proposal: Sampler | None = None, seconds: float = 0.0, count: int = 0) -> Outcome:
        """What a decoding engine returns: `count` completions resampled from its weights, by default as many as are judged."""
        began = time.perf_counter()
        draws = max(self.of.recipe.group, self.task.draws)
        decoder, rng = within(decoding_engines()[engine], draws), Generator().manual_seed(self.seed)
        target = replace(self.target, prior=self._reporting(self.of.prior, draws)) if proposal is None else self.target
        proposal = None if proposal is None else self._reporting(proposal, draws)
        weighted: Weighted = decoder.sample(target, self.prompts, proposal=proposal, rng=rng)
        reward = self.target.beta * expectation(weighted, weighted.scored.log_evidence.double())
        returned = System.resampled(
            self.method, count or self.task.draws, Generator().manual_seed(self.seed + 1), weighted
        )
        seconds += time.perf_counter() - began
        return Outcome(self.method, self.seed, returned.runs[0], reward, seconds=seconds)

    def trained(self, engine: str, source: Source | None = None) -> tuple[Any, float]:
        """A policy trained by another engine than the recipe's, and how long it took. `methods` may change its settings.

        Args:
            source: of the completions; by default draws of whatever the engine's claim asks for.
        """
        began, mine = time.perf_counter(), for_method(self.of.recipe, self.method)
        options = self.of.recipe.methods.get(self.method, {}).get("options", {})  # the recipe's own are its engine's
        policy = fit(
            self.target,
            source.scored.draws.prompts if isinstance(source, Given) else self.of.prompts,
            make_trainer(engine, mine.group, mine.max_new_tokens, options),
            source=source,
            lora=lora_of(mine),
            settings=training_of(mine),
            monitor=Monitor(console=self.task.console, what=f"{self.method}, seed {self.seed}"),
        )
        return policy, time.perf_counter() - began

    def trained_and_judged(self, engine: str) -> Outcome:
        """The draws of such a policy, which has learned from draws of its own; the policy itself is not kept."""
        policy, seconds = self.trained(engine)
        found = self.judged(policy, seconds)
        policy.discard()
        return found

    def demonstrations(self) -> Given:
        """The references of the training prompts."""
        rows = templated(self.of.rows, self.of.recipe.completion, "completion", "completion")
        return Given(demonstrations(self.of.prior, rows))

    def sft(self) -> tuple[Any, float]:
        """The policy that fine-tuning on the references leaves; an adapter is kept, and trained once for all rows that need it."""
        folder, mine = self.of.recipe.folder / "sft", replace(self, method="sft")
        if lora_of(self.of.recipe) is None:
            return mine.trained("sft", self.demonstrations())
        facts, key = folder / "sft.json", self.task.training_key(self.seed, "sft")
        known: dict[str, Any] = json.loads(facts.read_text()) if facts.is_file() else {}
        if known.get("key") == key:
            return self.of.prior.policy(start=folder), float(known["training"])
        policy, seconds = mine.trained("sft", self.demonstrations())
        policy.save(folder)
        write_json(facts, {"key": key, "training": seconds})  # after the adapter: with it, the adapter is whole
        return policy, seconds

    def after_sft(self) -> tuple[Any, float]:
        """The policy of the recipe's own engine, started from the adapter that SFT leaves; the prior remains the reference.

        Raises:
            InputError: where all weights are trained, so that there is no adapter.
        """
        if lora_of(self.of.recipe) is None:
            raise InputError(
                f"method {self.method!r} starts from an adapter, but lora_r is 0; leave it out, or set lora_r"
            )
        folder = self.of.recipe.folder
        sft, training = self.sft()
        sft.discard()
        warm = self.task.another(self.seed, start=str(folder / "sft"), out=str(folder / "after-sft"))
        policy, seconds = replace(self, of=warm).policy("sft")
        return policy, seconds + training

    def policy(self, *before: str) -> tuple[Any, float]:
        """The policy of the recipe's own engine, trained unless its folder has it.

        Args:
            before: methods that left what it starts from.
        """
        folder, began = self.of.recipe.folder, time.perf_counter()
        facts, key = folder / "task.json", self.task.training_key(self.seed, *before)
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

    def _reporting(self, sampler: Any, draws: int | None = None) -> Any:
        """The same with a bar, of the draws that are judged by default."""
        if self.task.progress is None:
            return sampler
        count = len(self.prompts) * (self.task.draws if draws is None else draws)
        return replace(sampler, progress=self.task.progress(f"{self.method}, seed {self.seed}", count))


def expectation(weighted: Weighted, values: Any) -> float:
    """The weighted mean of a value of each draw, averaged over prompts."""
    index, count = weighted.scored.draws.prompt_index, len(weighted.scored.draws.prompts)
    share = normalise(weighted.log_w.double(), index, count)
    return float(group_sum(share * values, index, count).mean())


def _prior(bench: Bench) -> Outcome:
    return bench.judged(bench.of.prior, 0.0)


def _sft(bench: Bench) -> Outcome:
    policy, seconds = bench.sft()
    found = bench.judged(policy, seconds)
    policy.discard()
    return found


def _best_of_n(bench: Bench) -> Outcome:
    return bench.decoded("best-of-n", count=1)  # all of its draws are one and the same


def _smc(bench: Bench) -> Outcome:
    return bench.decoded("smc")


def _policy(bench: Bench) -> Outcome:
    return bench.judged(*bench.policy())


def _dpo(bench: Bench) -> Outcome:
    return bench.trained_and_judged("dpo")  # pairs of its own draws: what no pair reaches is not held


def _minimum_risk(bench: Bench) -> Outcome:
    return bench.trained_and_judged("minimum-risk")


def _corrected(bench: Bench) -> Outcome:
    policy, seconds = bench.policy()
    return bench.decoded("smc", policy, seconds)


def _greedy(bench: Bench) -> Outcome:
    return bench.most_probable(bench.of.prior)


def _greedy_policy(bench: Bench) -> Outcome:
    return bench.most_probable(*bench.policy())


METHODS: Mapping[str, Callable[[Bench], Outcome]] = {
    "prior": _prior,
    "prior/greedy": _greedy,
    "sft": _sft,
    "best-of-n": _best_of_n,
    "smc": _smc,
    "policy": _policy,
    "policy/greedy": _greedy_policy,
    "dpo": _dpo,
    "policy/smc": _corrected,
}
"""The prior as it is, and its most probable completion; fine-tuning on the references; the best of n and SMC of the prior; the
recipe's engine at the planned beta, and its most probable completion; DPO on pairs of its own draws; and the policy corrected
by SMC."""

BASELINES: Mapping[str, Callable[[Bench], Outcome]] = {
    "sft/policy": lambda bench: bench.judged(*bench.after_sft()),
    "mrt": _minimum_risk,
    "prior/mbr": Bench.agreed,
    "copy": lambda bench: bench.baseline(copied(bench.sources)),
}
"""What a recipe may ask for besides, with `baselines`: its engine after SFT, minimum-risk training, and what needs no training. Two
more have a number in their names: lead-N, the source's first N words; and vote-T, the answer of most of the prior's draws, or
silence where fewer than the share T of them agree on it."""
LEAD = re.compile(r"lead-([1-9]\d*)")
VOTE = re.compile(r"vote-(0?\.\d+|1)")


def method_of(name: str) -> Callable[[Bench], Outcome]:
    """A method or baseline by name.

    Raises:
        InputError: if there is none.
    """
    if found := LEAD.fullmatch(name):
        words = int(found[1])
        return lambda bench: bench.baseline(lead(bench.sources, words))
    if found := VOTE.fullmatch(name):
        least = float(found[1])
        return lambda bench: bench.voted(least)
    known = {**METHODS, **BASELINES}
    if name not in known:
        raise InputError(f"method is {name!r}; choose {', '.join(known)}, lead-N or vote-T, such as vote-0.5")
    return known[name]
