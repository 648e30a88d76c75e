"""`compare`: engines side by side on one target, at an equal budget, judged by the same certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tiltlm.diagnostics.certificate import Certificate, certify, log_share
from tiltlm.diagnostics.degeneracy import Diversity, diversity
from tiltlm.diagnostics.evidence_bounds import of_samples, pooled_spread
from tiltlm.errors import InputError
from tiltlm.estimates import Estimate, Interval
from tiltlm.evidence.gold import Gold, as_gold, gold_values
from tiltlm.inference.decoding.budget import cost, within
from tiltlm.inference.decoding.rejection import Rejection
from tiltlm.inference.fit import Training, fit
from tiltlm.inference.monitor import Monitor
from tiltlm.inference.source import Decoded, FromPrior, OnPolicy, Pool, Replay, Source, default_source
from tiltlm.lm.adapters import LoRA
from tiltlm.posterior import exact as ex
from tiltlm.protocols import DecodingEngine, Sampler
from tiltlm.records import Prompts, Scored, Weighted
from tiltlm.seeds import generator
from tiltlm.target import Target
from tiltlm.weights import weighted_means

LISTED = 5000
"""Most completions of a prompt for which the truth is computed by listing them, instead of being estimated."""

RANKING = "By how much one is nearer to p* than another is the difference of their ELBOs; an interval of KL(q||p*) stands for itself."
"""What tells rows apart that have each a log Z of their own."""


@dataclass(frozen=True)
class Contender:
    """One way to the posterior.

    Attributes:
        engine: a training or a decoding engine; None is the prior as it is.
        source: where a training engine's completions come from.
        settings: changes to the comparison's `Training`.
        then: a decoding engine that takes the trained policy as its proposal.
    """

    engine: Any = None
    source: Source | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    then: DecodingEngine | None = None


@dataclass(frozen=True)
class Result:
    """What a contender reached. Means are over prompts; a number that cannot be had is None.

    Attributes:
        reward: E_q r.
        kl_prior: KL(q || pi0), nats.
        elbo: log Z - KL(q || p*), nats; None for a decoding engine. log Z is everybody's, so that what two of them differ by is
            by how much one is nearer to p*, which the intervals, each with a bound of log Z of its own, do not show.
        to_posterior: KL(q || p*), nats. For a decoding engine an interval from 0 to the bound log Z - E log Zhat.
        from_posterior: KL(p* || q), nats; large where modes are missed.
        samples: completions drawn on the way.
        steps: of training.
        served: share of the prompts that got any sample; the other numbers are about these.
        gold: the mean of a held-out reward, where one was given.
    """

    name: str
    reward: Estimate
    kl_prior: Estimate | None
    elbo: Estimate | None
    to_posterior: Interval | None
    from_posterior: Interval | None
    diversity: Diversity | None
    samples: int
    steps: int
    seconds: float
    served: float = 1.0
    gold: Estimate | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = ("reward", "kl_prior", "elbo", "to_posterior", "from_posterior", "diversity")
        values = {name: getattr(self, name) for name in parts}
        plain = {name: None if value is None else value.as_dict() for name, value in values.items()}
        counts = {name: getattr(self, name) for name in ("samples", "steps", "seconds", "served")}
        gold = {"gold": self.gold.as_dict()} if self.gold else {}
        return {"name": self.name, **plain, **counts, **gold}


@dataclass(frozen=True)
class Comparison:
    """Results of one comparison.

    Attributes:
        budget: what was equal, in words.
        exact: the divergences are the truth, by listing all completions, and not estimates.
    """

    results: tuple[Result, ...]
    budget: str
    beta: float
    exact: bool

    def __str__(self) -> str:
        head = ("", "E r", "KL(q||pi0)", "ELBO", "KL(q||p*)", "KL(p*||q)", "unique", "samples", "seconds")
        rows = [head, *[_row(result) for result in self.results]]
        if any(result.gold for result in self.results):
            golds = ["gold", *["–" if result.gold is None else f"{result.gold.value:.3f}" for result in self.results]]
            rows = [(*row[:2], gold, *row[2:]) for row, gold in zip(rows, golds, strict=True)]
        head = rows[0]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        truth = "exact, by listing all completions" if self.exact else "95% intervals"
        text = [f"beta {self.beta:.3g}, at equal budget of {self.budget}; nats, {truth}", *lines]
        return "\n".join(text if self.exact else [*text, RANKING])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        results = [result.as_dict() for result in self.results]
        return {"beta": self.beta, "budget": self.budget, "exact": self.exact, "results": results}


def compare(
    target: Target,
    prompts: Prompts | Sequence[Any],
    contenders: Mapping[str, Contender],
    *,
    samples: int | None = 4096,
    seconds: float | None = None,
    settings: Training | None = None,
    lora: LoRA | None = LoRA(),
    evaluation: int = 64,
    exact_budget: int = 256,
    progress: Callable[[str], Monitor] | None = None,
    gold: Gold | None = None,
) -> Comparison:
    """Let every contender spend the same, and judge all of them alike.

    Args:
        samples: completions that each may draw, in training and in decoding.
        seconds: instead: seconds that each may train (decoding engines then draw `evaluation` a prompt).
        settings: of the training; its `steps` follow from the budget.
        evaluation: draws of a prompt for the certificate; they do not count.
        exact_budget: prior draws of a prompt in search of exact samples.
        progress: makes the monitor of a contender's training from its name.
        gold: a held-out reward, evidence or function, that everybody is judged by and nobody trained on.

    Raises:
        InputError: for a budget that does not pay for a single step.
    """
    if (samples is None) == (seconds is None):
        raise InputError("give the budget either as samples or as seconds")
    encoded = target.prior.encode(prompts)
    settings = settings or Training()
    judge = _Judge(target, encoded, evaluation, exact_budget, settings.seed, gold)
    results = []
    for name, contender in contenders.items():
        spending = _Spending(samples, seconds, replace(settings, **contender.settings), lora)
        monitor = progress(name) if progress is not None else Monitor(quiet=True)
        results.append(_run(name, contender, judge, spending, monitor))
    budget = f"{samples:,} samples" if samples is not None else f"{seconds:g} seconds of training"
    return Comparison(tuple(results), budget, target.beta, judge.exact is not None)


@dataclass(frozen=True)
class _Spending:
    samples: int | None
    seconds: float | None
    settings: Training
    lora: LoRA | None

    def training(self, name: str, engine: Any, source: Source, prompts: int) -> Training:
        batch = min(self.settings.batch, prompts)
        if self.seconds is not None:
            return replace(self.settings, seconds=self.seconds, steps=max(self.settings.steps, 1_000_000))
        assert self.samples is not None
        if isinstance(source, Pool):
            return self.settings
        steps = self.samples // (batch * draws_a_step(engine, source))
        if steps < 1:
            raise InputError(
                f"a budget of {self.samples} samples does not pay for one step of {name} ({batch} prompts of "
                f"{draws_a_step(engine, source)}); raise it"
            )
        return replace(self.settings, steps=steps)


def draws_a_step(engine: Any, source: Source) -> int:
    """Completions of a prompt that a step draws anew."""
    if isinstance(source, OnPolicy | FromPrior | Replay):
        return engine.group
    if isinstance(source, Decoded):
        return cost(source.engine)
    raise InputError(f"source {type(source).__name__} draws nothing, so it cannot be compared by samples; give seconds")


def _run(name: str, contender: Contender, judge: _Judge, spending: _Spending, monitor: Monitor) -> Result:
    target, prompts = judge.target, judge.prompts
    if contender.engine is None:
        return judge.of_sampler(name, target.prior)
    began = time.perf_counter()
    if not hasattr(contender.engine, "loss"):
        return judge.of_decoder(name, _paid(contender.engine, spending, len(prompts)), None)
    source = contender.source or default_source(contender.engine.claim)
    settings = spending.training(name, contender.engine, source, len(prompts))
    policy = fit(
        target, prompts, contender.engine, source=source, lora=spending.lora, settings=settings, monitor=monitor
    )
    seconds = time.perf_counter() - began
    if contender.then is None:
        result = judge.of_sampler(name, policy)
    else:
        result = judge.of_decoder(name, contender.then, policy)
    policy.discard()
    samples, seconds = result.samples + monitor.drawn, result.seconds + seconds
    return replace(result, samples=samples, seconds=seconds, steps=monitor.steps)


def _paid(engine: Any, spending: _Spending, prompts: int) -> Any:
    return engine if spending.samples is None else within(engine, min(spending.samples // prompts, 4096))


@dataclass
class _Judge:
    """Judges samplers and decoding engines against one target, on the same exact samples."""

    target: Target
    prompts: Prompts
    evaluation: int
    exact_budget: int
    seed: int
    gold: Gold | None = None
    exact: tuple[ex.Exact, ...] | None = field(init=False, default=None)
    posterior: Scored | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        try:
            self.exact = tuple(ex.posterior(self.target, self.prompts, p, LISTED) for p in range(len(self.prompts)))
        except (InputError, AttributeError):  # too many completions, or no model behind the sampler
            if self.target.evidence.log_bounds is not None and self.exact_budget:
                engine, rng = Rejection(n=self.exact_budget), generator(self.seed, "compare")
                self.posterior = engine.sample(self.target, self.prompts, rng=rng).kept().scored

    def of_sampler(self, name: str, sampler: Sampler) -> Result:
        certificate = certify(
            sampler,
            self.target,
            self.prompts,
            samples=self.evaluation,
            exact_budget=0 if self.exact is not None else self.exact_budget,
            gold=self.gold,
            seed=self.seed,
        )
        if self.exact is not None:
            return replace(self._listed(name, sampler, certificate), gold=certificate.gold)
        return Result(
            name,
            certificate.reward,
            certificate.kl_prior,
            certificate.elbo,
            certificate.kl_posterior,
            self._from_posterior(sampler, certificate),
            certificate.diversity,
            samples=0,
            steps=0,
            seconds=0.0,
            gold=certificate.gold,
        )

    def _listed(self, name: str, sampler: Sampler, certificate: Certificate) -> Result:
        assert self.exact is not None
        laws = [(e, e.log_prob(sampler)) for e in self.exact]
        count = len(laws)

        def mean(values: list[float]) -> float:
            return sum(values) / count

        to, back = (
            mean([ex.kl(q, e.log_posterior) for e, q in laws]),
            mean([ex.kl(e.log_posterior, q) for e, q in laws]),
        )
        return Result(
            name,
            Estimate(mean([e.mean_reward(q) for e, q in laws]), 0.0, 0),
            Estimate(mean([ex.kl(q, e.log_prior) for e, q in laws]), 0.0, 0),
            Estimate(mean([e.elbo(q) for e, q in laws]), 0.0, 0),
            Interval(to, to, to),
            Interval(back, back, back),
            certificate.diversity,
            samples=0,
            steps=0,
            seconds=0.0,
        )

    def of_decoder(self, name: str, engine: Any, proposal: Sampler | None) -> Result:
        began = time.perf_counter()
        weighted: Weighted = engine.sample(
            self.target, self.prompts, proposal=proposal, rng=generator(self.seed, "compare", 1)
        )
        seconds = time.perf_counter() - began
        count = len(self.prompts)
        means = weighted_means(weighted, self.target.beta * weighted.scored.log_evidence.double(), count)
        served = [mean for mean in means if mean is not None]
        spent = count * engine.cost if hasattr(engine, "cost") else len(weighted.scored) + weighted.scored.dropped
        kept = weighted.kept().scored.draws
        return Result(
            name,
            mean_over_prompts(served),
            kl_prior=None,
            elbo=None,
            to_posterior=self._decoded_bound(engine, weighted),
            from_posterior=None,
            diversity=diversity(kept) if len(kept) else None,
            samples=spent,
            steps=0,
            seconds=seconds,
            served=len(served) / count,
            gold=self._gold_of(weighted),
        )

    def _gold_of(self, weighted: Weighted) -> Estimate | None:
        """The held-out reward of what a decoding engine returns, of the prompts that it served."""
        rows = weighted.kept()
        if self.gold is None or not len(rows.scored):
            return None
        values, judged = gold_values(as_gold(self.gold), rows.scored.draws)
        known = replace(rows, log_w=torch.where(judged, rows.log_w.double(), -torch.inf))
        means = weighted_means(known, values, len(self.prompts))
        return mean_over_prompts([mean for mean in means if mean is not None]) if judged.any() else None

    def _decoded_bound(self, engine: Any, weighted: Weighted) -> Interval | None:
        """KL of what a decoding engine returns from p*: at most log Z - E log Zhat, by the data-processing inequality."""
        if engine.claim.fixed_point != "p*":
            return None
        if engine.claim.bias == "none":
            return Interval(0.0, 0.0, 0.0)
        if weighted.log_z is None or self.exact is None:
            return None
        gap = Estimate.mean(
            [replace(z, value=e.log_z - z.value) for e, z in zip(self.exact, weighted.log_z, strict=True)]
        )
        if math.isnan(gap.stderr):
            return None
        return Interval(math.nan, 0.0, max(0.0, gap.value) + gap.margin)

    def _from_posterior(self, sampler: Sampler, certificate: Certificate) -> Interval | None:
        """KL(p* || q) = E_p*[log w] - log Z, from the exact samples; by the certificate's bounds of log Z."""
        if self.posterior is None or certificate.log_z_upper is None:
            return None
        log_w = (self.posterior.log_target - sampler.log_prob(self.posterior.draws).sum(-1)).double()
        index = self.posterior.draws.prompt_index
        log_w = log_w + log_share(certificate.scored, certificate.samples)[index]
        groups = [log_w[index == p] for p in range(len(self.prompts))]
        means = [of_samples(group, pooled_spread(groups)) for group in groups]
        found = [mean for mean in means if mean is not None]
        if len(found) < len(groups):
            return None
        mean = Estimate.mean(found)
        low, high = mean.less(certificate.log_z_upper), mean.less(certificate.log_z_lower)
        return Interval(
            max(0.0, (low.value + high.value) / 2),
            max(0.0, low.value - low.margin),
            max(0.0, high.value + high.margin),
        )


def mean_over_prompts(means: Sequence[Estimate]) -> Estimate:
    """Mean over prompts; where a prompt alone cannot tell its error, all that sets the prompts apart counts as such.

    NaN for no prompt.
    """
    if not means:
        return Estimate(math.nan, math.nan, 0)
    found = Estimate.mean(means)
    if math.isfinite(found.stderr) or len(means) < 2:
        return found
    spread = torch.tensor([mean.value for mean in means], dtype=torch.float64).std()
    return replace(found, stderr=float(spread) / math.sqrt(len(means)), df=len(means) - 1)


def _row(result: Result) -> tuple[str, ...]:
    def number(value: Estimate | None) -> str:
        return "–" if value is None else f"{value.value:.3f}"

    def interval(value: Interval | None) -> str:
        if value is None:
            return "–"
        if value.low == value.high:
            return f"{value.low:.3f}"
        high = "∞" if math.isinf(value.high) else f"{value.high:.3f}"
        return f"≤ {high}" if math.isnan(value.value) else f"{value.value:.3f} [{value.low:.3f}, {high}]"

    unique = "–" if result.diversity is None else f"{result.diversity.unique:.0%}"
    cells = (
        number(result.reward),
        number(result.kl_prior),
        number(result.elbo),
        interval(result.to_posterior),
        interval(result.from_posterior),
    )
    name = result.name if result.served == 1 else f"{result.name} ({result.served:.0%} of the prompts)"
    return (name, *cells, unique, f"{result.samples:,}", f"{result.seconds:.1f}")
