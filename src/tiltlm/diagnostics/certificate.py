"""`certify`: how far a sampler is from the posterior, in nats, from both sides.

KL(q || p*) = log Z - ELBO, and the ELBO is a mean over q's draws. What is missing is log Z, which is bounded
from below by any importance estimate (Burda et al. 2016) and from above by the same estimate with one exact
posterior sample among its draws (Zhao et al. 2024, section 5.1). Exact samples come from rejection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from tiltlm.diagnostics.degeneracy import Diversity, cut_short, diversity
from tiltlm.diagnostics.evidence_bounds import (
    Bounds,
    LogZBounds,
    kl_interval,
    log_z_bounds,
    pooled_spread,
    prompt_bounds,
    upper_terms,
    with_log_z,
)
from tiltlm.errors import InputError
from tiltlm.estimates import Estimate, Interval
from tiltlm.evidence.gold import Gold, as_gold, gold_values
from tiltlm.inference.decoding.rejection import Rejection, has_upper_bound
from tiltlm.inference.decoding.smc import SMC
from tiltlm.protocols import Sampler
from tiltlm.records import Draws, Prompts, Scored, shown
from tiltlm.seeds import generator
from tiltlm.target import Target, require_finite
from tiltlm.weights import group_count, pareto_k

ENOUGH = 2
"""Exact samples of a prompt that are enough: with one, the upper bound's error cannot be told."""
HOPELESS = 0.01
"""Exact samples that a budget must promise for all prompts together, or it is not spent: drawing costs as much as certifying."""


@dataclass(frozen=True)
class PromptCertificate:
    """The certificate of one prompt."""

    prompt: str
    reward: float
    kl_prior: float
    bounds: Bounds

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "reward": self.reward,
            "kl_prior": self.kl_prior,
            "elbo": self.bounds.elbo.as_dict(),
            "kl_posterior": self.bounds.interval.as_dict(),
            "ess": self.bounds.ess,
            "exact_samples": self.bounds.exact,
        }


@dataclass(frozen=True)
class Certificate:
    """What a sampler is worth as an approximation of the posterior. Means are over prompts.

    Attributes:
        reward: E_q r.
        kl_prior: KL(q || pi0) in nats; Rao-Blackwellised where the sampler is a policy (Amini et al. 2025).
        elbo: log Z - KL(q || p*); beta times it is the objective of KL-penalised RL.
        log_z_lower, log_z_upper: bounds in expectation; the upper one is None without exact samples.
        kl_posterior: KL(q || p*) at 95%, for these prompts; high is inf without an upper bound.
        ess: effective posterior samples a prompt, of `samples` draws.
        pareto_k: median over prompts; above 0.7 the weights are too heavy-tailed for the standard errors.
        diversity: signs of collapse.
        notes: what the certificate cannot say, and how to get it.
        scored: the sampler's draws.
        gold, gold_prior: the mean of a held-out reward under the sampler and under the prior, where one was given.
    """

    beta: float
    samples: int
    reward: Estimate
    kl_prior: Estimate
    elbo: Estimate
    log_z_lower: Estimate
    log_z_upper: Estimate | None
    kl_posterior: Interval
    ess: float
    pareto_k: float
    exact_samples: int
    diversity: Diversity
    per_prompt: tuple[PromptCertificate, ...]
    notes: tuple[str, ...]
    scored: Scored
    gold: Estimate | None = None
    gold_prior: Estimate | None = None

    @property
    def mean_width(self) -> float:
        """Mean over prompts of the width of each prompt's own interval."""
        return sum(p.bounds.interval.width for p in self.per_prompt) / len(self.per_prompt)

    def __str__(self) -> str:
        upper = "none" if self.log_z_upper is None else str(self.log_z_upper)
        tail = f"{self.pareto_k:.2f}" if math.isfinite(self.pareto_k) else "none"
        lines = [
            f"KL(q||p*)   {self.kl_posterior} nats at 95%, mean over {len(self.per_prompt)} prompts",
            f"E r         {self.reward}",
            f"KL(q||pi0)  {self.kl_prior} nats",
            f"ELBO        {self.elbo}",
            f"log Z       {self.log_z_lower} and {upper}",
            f"ESS         {self.ess:.1f} of {self.samples}, Pareto-k {tail}, exact samples {self.exact_samples}",
            f"diversity   entropy {self.diversity.entropy:.1f} nats, distinct-2 {self.diversity.distinct_2:.2f}, "
            f"unique {self.diversity.unique:.0%}, truncated {self.diversity.truncated:.0%}, length {self.diversity.length:.1f}",
        ]
        if self.gold is not None:
            before = "" if self.gold_prior is None else f", the prior's {self.gold_prior}"
            lines.insert(2, f"E gold      {self.gold}{before} (held out)")
        return "\n".join([*lines, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "beta": self.beta,
            "samples_per_prompt": self.samples,
            "reward": self.reward.as_dict(),
            "kl_prior": self.kl_prior.as_dict(),
            "elbo": self.elbo.as_dict(),
            "log_z_lower": self.log_z_lower.as_dict(),
            "log_z_upper": self.log_z_upper.as_dict() if self.log_z_upper else None,
            "kl_posterior": self.kl_posterior.as_dict(),
            "kl_posterior_mean_prompt_width": self.mean_width if math.isfinite(self.mean_width) else None,
            "ess": self.ess,
            "pareto_k": self.pareto_k if math.isfinite(self.pareto_k) else None,
            "exact_samples": self.exact_samples,
            "diversity": self.diversity.as_dict(),
            "per_prompt": [prompt.as_dict() for prompt in self.per_prompt],
            "notes": list(self.notes),
            **{name: value.as_dict() for name in ("gold", "gold_prior") if (value := getattr(self, name)) is not None},
        }


def certify(
    sampler: Sampler,
    target: Target,
    prompts: Prompts | Sequence[Any],
    *,
    samples: int = 64,
    prior_draws: Scored | None = None,
    exact_budget: int = 128,
    engine: SMC | None = None,
    gold: Gold | None = None,
    seed: int = 0,
) -> Certificate:
    """Certify any sampler against a target.

    Args:
        sampler: a policy, the prior, or anything with `draw` and `log_prob`.
        samples: draws a prompt.
        prior_draws: draws of the prior for the same prompts that are there already (those of `plan`), at any beta; the ones
            that rejection accepts are exact posterior samples for nothing.
        exact_budget: most further prior draws for each prompt that has fewer than two exact samples.
        engine: bounds log Z by its runs instead of by the sampler's draws: `engine.repeats` free ones a prompt (at least 4), and
            as many given an exact sample, all with the sampler as proposal. With a good twist they bound log Z more closely,
            and hold where the sampler's own weights are too heavy-tailed; but the ELBO's error, which the sampler's own bounds
            share and so cancel, then counts in full: give more samples.
        gold: a held-out reward, evidence or function, to be measured on the sampler's draws, and on `prior_draws` if there are any.

    Raises:
        InputError: if no completion has a usable reward.
    """
    if samples < 2:
        raise InputError(f"samples is {samples}; errors are told by how draws of a prompt differ, so draw at least 2")
    if not hasattr(sampler, "draw"):
        raise InputError(f"sampler is a {type(sampler).__name__}, which draws nothing; give a policy, or lm.prior()")
    encoded = target.prior.encode(prompts)
    rng = generator(seed, "certify")
    scored = require_finite(target.score(sampler.draw(encoded, samples, rng)))
    if (group_count(scored.draws.prompt_index, len(encoded)) < 2).any():
        raise InputError("some prompt has fewer than 2 completions with a reward; raise samples, or mend the reward")
    exact, notes = exact_samples(target, encoded, prior_draws, exact_budget, rng)
    kl_prior = _kl_to_prior(sampler, target, scored, samples)
    log_w_exact = None
    if exact is not None and len(exact):
        log_w_exact = exact.log_target - sampler.log_prob(exact.draws).sum(-1)
    by_engine = None
    if engine is not None:
        by_engine = log_z_bounds(target, encoded, engine, exact, rng, proposal=sampler)
    found = _assemble(target, encoded, scored, exact, log_w_exact, kl_prior, samples, notes, by_engine)
    if gold is None:
        return found
    return replace(found, gold=mean_gold(gold, scored), gold_prior=prior_draws and mean_gold(gold, prior_draws))


def mean_gold(gold: Gold, scored: Scored) -> Estimate:
    """Mean over prompts of a held-out reward, of the completions that it could judge.

    Raises:
        InputError: if it could judge none.
    """
    values, judged = gold_values(as_gold(gold), scored.draws)
    if not judged.any():
        raise InputError("gold judged none of the completions; mend it, or leave it out")
    used, index = scored.draws.prompt_index[judged].unique(return_inverse=True)
    return _group_estimate(values[judged], index, len(used))


def exact_samples(
    target: Target, prompts: Prompts, prior_draws: Scored | None, budget: int, rng: Generator
) -> tuple[Scored | None, list[str]]:
    """Exact posterior samples by rejection: of prior draws that are there, then of new ones where none was accepted.

    Returns:
        The samples (None if the reward has no bounds), and sentences on what is missing.
    """
    if not has_upper_bound(target):
        return None, [
            "no upper bound: the reward has no declared bounds, so no exact posterior sample can be had; declare them, "
            "Reward(fn, bounds=(low, high))."
        ]
    found: list[Scored] = []
    missing = list(range(len(prompts)))
    if prior_draws is not None:
        if not _same_prompts(prior_draws.draws.prompts, prompts):
            raise InputError(
                "prior_draws are draws for other prompts; draw again, or certify on the prompts of the plan"
            )
        weighted = Rejection().weigh(target, prior_draws.at(target.beta), rng).kept()
        found.append(weighted.scored)
        counts = group_count(weighted.scored.draws.prompt_index, len(prompts))
        missing = [p for p in missing if counts[p] < ENOUGH]
        promised = budget * acceptance(target, prior_draws.at(target.beta))[missing].sum()
        if missing and budget > 0 and not len(weighted.scored) and promised < HOPELESS:
            return None, [
                f"no upper bound: of the prior's draws about 1 in {budget * len(missing) / max(float(promised), 1e-300):.0e} would be "
                f"accepted as an exact posterior sample, so none was drawn for it; give the reward tighter bounds, or raise beta."
            ]
    if missing and budget > 0:
        engine = Rejection(n=budget, samples=ENOUGH, round=min(64, budget))
        scored = engine.sample(target, prompts.select(missing), rng=rng).kept().scored
        found.append(_among(scored, prompts, missing))
    if not found:
        return None, ["no upper bound: exact_budget is 0; give it some prior draws a prompt."]
    exact = Scored.concatenate(found)
    counts = group_count(exact.draws.prompt_index, len(prompts))
    lacking = int((counts == 0).sum())
    if not lacking:
        return exact, []
    return exact, [
        f"no upper bound: {lacking} of {len(prompts)} prompts got no exact posterior sample from their prior draws; raise "
        f"exact_budget (now {budget}), or beta."
    ]


def acceptance(target: Target, prior_draws: Scored) -> Float[Tensor, " P"]:
    """How probably rejection accepts a prior draw of each prompt, as these draws tell: mean of exp(r / beta - upper bound)."""
    bounds, draws = target.evidence.log_bounds, prior_draws.draws
    assert bounds is not None
    total = torch.zeros(len(draws.prompts), dtype=torch.float64)
    total.index_add_(0, draws.prompt_index, (prior_draws.log_evidence.double() - bounds[1]).exp())
    return total / group_count(draws.prompt_index, len(draws.prompts)).clamp(min=1)


def _same_prompts(a: Prompts, b: Prompts) -> bool:
    return a.tokens.shape == b.tokens.shape and torch.equal(a.tokens * a.mask, b.tokens * b.mask)


def _among(scored: Scored, prompts: Prompts, index: Sequence[int]) -> Scored:
    return replace(scored, draws=scored.draws.among(prompts, index))


def log_share(scored: Scored, samples: int) -> Float[Tensor, " P"]:
    """log of the share of each prompt's `samples` draws that have a reward.

    The others are no completions of the posterior, nor of the sampler as it is certified, whose log-probabilities are those of
    the draws less this.
    """
    return (group_count(scored.draws.prompt_index, len(scored.draws.prompts)) / samples).double().log()


def _kl_to_prior(sampler: Any, target: Target, scored: Scored, samples: int) -> Float[Tensor, " B"]:
    """An unbiased KL(q || pi0) from each draw: exact per token where the sampler can tell and all its draws count, else log q - log pi0."""
    if sampler is target.prior and not scored.dropped:
        return torch.zeros(len(scored), dtype=torch.float64)
    if hasattr(sampler, "token_kl") and not scored.dropped:
        return sampler.token_kl(scored.draws).double().sum(-1)
    log_ratio = (scored.draws.log_q - scored.log_prior).double().sum(-1)
    return log_ratio - log_share(scored, samples)[scored.draws.prompt_index]


def _assemble(
    target: Target,
    prompts: Prompts,
    scored: Scored,
    exact: Scored | None,
    log_w_exact: Tensor | None,
    kl_prior: Tensor,
    samples: int,
    notes: list[str],
    by_engine: LogZBounds | None,
) -> Certificate:
    index, log_w = scored.draws.prompt_index, scored.log_weight.double()
    reward = target.beta * scored.log_evidence.double()
    groups = [log_w[index == p] for p in range(len(prompts))]
    exact_index = exact.draws.prompt_index if exact is not None else torch.zeros(0, dtype=torch.long)
    posterior = log_w_exact.double() if log_w_exact is not None else torch.zeros(0, dtype=torch.float64)
    exact_groups = [posterior[exact_index == p] for p in range(len(prompts))]
    pooled = pooled_spread([upper_terms(a, b) for a, b in zip(groups, exact_groups, strict=True)])
    bounds = [prompt_bounds(a, b, pooled, samples) for a, b in zip(groups, exact_groups, strict=True)]
    if by_engine is not None:
        bounds = [with_log_z(*three) for three in zip(bounds, by_engine.lower, by_engine.upper, strict=True)]
    texts = [shown(t) for t in prompts.texts]
    per_prompt = tuple(
        PromptCertificate(texts[p], float(reward[index == p].mean()), float(kl_prior[index == p].mean()), bounds[p])
        for p in range(len(prompts))
    )
    log_z_high, high = (_mean_of_all([getattr(b, name) for b in bounds]) for name in ("log_z_high", "high"))
    if exact is not None and high is None and not notes:
        notes = ["no upper bound: one exact posterior sample in all has no error to go by; raise exact_budget."]
    return Certificate(
        beta=target.beta,
        samples=samples,
        reward=_group_estimate(reward, index, len(prompts)),
        kl_prior=_group_estimate(kl_prior, index, len(prompts)),
        elbo=Estimate.mean([b.elbo for b in bounds]),
        log_z_lower=Estimate.mean([b.log_z_low for b in bounds]),
        log_z_upper=log_z_high,
        kl_posterior=kl_interval(Estimate.mean([b.low for b in bounds]), high),
        ess=sum(b.ess for b in bounds) / len(bounds),
        pareto_k=float(torch.tensor([pareto_k(g) for g in groups]).nanmedian()),
        exact_samples=sum(b.exact for b in bounds),
        diversity=diversity(scored.draws),
        per_prompt=per_prompt,
        notes=(*notes, *_cautions(scored)),
        scored=scored,
    )


def _mean_of_all(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Mean over prompts, where there is one for every prompt."""
    found = [estimate for estimate in estimates if estimate is not None]
    return Estimate.mean(found) if len(found) == len(estimates) else None


def _group_estimate(values: Float[Tensor, " B"], index: Tensor, prompts: int) -> Estimate:
    groups = [values[index == p] for p in range(prompts)]
    return Estimate.mean([Estimate.of(group) for group in groups])


def _cautions(scored: Scored) -> list[str]:
    draws: Draws = scored.draws
    notes = []
    outside = float((scored.log_evidence == -torch.inf).double().mean())
    if outside:
        notes.append(
            f"The sampler puts {outside:.1%} of its draws where the posterior has none: KL(q||p*) is infinite. Correct it with a "
            f"decoding engine (the ESS is that of the draws inside), or give the constraint a penalty."
        )
    notes += cut_short(draws)
    if len(set(zip(draws.prompt_index.tolist(), draws.texts, strict=True))) == len(draws.prompt_index.unique()):
        notes.append(
            "All completions of every prompt are equal: the sampler has collapsed; take a larger beta, or train less."
        )
    if scored.dropped:
        share = len(scored) / (len(scored) + scored.dropped)
        notes.append(
            f"{scored.dropped} completions without a usable reward were dropped: all this is about the sampler conditioned on having "
            f"one, which {share:.0%} of its draws had."
        )
    return notes
