"""`tiltlm sample`: posterior samples from a decoding engine, what steers it, and the completions that come out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator

from tiltlm.errors import InputError, TiltWarning
from tiltlm.evidence.parts import named_parts
from tiltlm.evidence.running.calls import TextFunction
from tiltlm.inference.catalogue import decoding_engines, make_engine
from tiltlm.inference.decoding.budget import within
from tiltlm.inference.decoding.kernels import masked_edits
from tiltlm.inference.decoding.smc import prefix_evidence
from tiltlm.lm.view import ModelPrior
from tiltlm.records import Weighted
from tiltlm.weights import resample

if TYPE_CHECKING:
    from tiltlm.workflow.run import Run

PREFIX = "prefix"
"""The twist that judges unfinished completions by the reward itself."""


def sample(
    run: Run,
    engine: str,
    draws: int,
    count: int,
    proposal: str | None = None,
    *,
    twist: str | None = None,
    masked_lm: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Weighted, list[dict[str, Any]]]:
    """Posterior samples without training: `count` completions a prompt, resampled from the engine's weights.

    Args:
        draws: proposals a prompt.
        proposal: an adapter or model to draw from instead of the prior.
        twist: for SMC, a critic's folder, or "prefix" where the reward makes sense of unfinished completions.
        masked_lm: for MCMC, a masked language model that edits completions in the middle.
        options: the engine's own settings.

    Raises:
        InputError: for an engine that is not there, or one that cannot serve this target.
    """
    run.check()
    decoder = within(make_engine(decoding_engines(), engine, dict(options or {})), draws)
    if twist is not None:
        reward = None if run.recipe.reward is None else lambda: run.reward_function
        decoder = twisted(decoder, twist, reward, lambda folder: run.prior.critic(start=folder))
    if masked_lm is not None:
        decoder = edited(decoder, masked_lm, run.prior)
    target, seed = run.target(run.chosen_beta()), run.recipe.seed
    sampler = run.reporting(run.sampler(proposal or "prior"), "proposals", len(run.prompts) * draws)
    if proposal is None:
        target, sampler = replace(target, prior=sampler), None
    weighted = decoder.sample(target, run.prompts, proposal=sampler, rng=Generator().manual_seed(seed))
    return weighted, resampled(weighted, target.beta, count, Generator().manual_seed(seed + 1))


def twisted(decoder: Any, twist: str, reward: Callable[[], TextFunction] | None, critic: Callable[[str], Any]) -> Any:
    """A decoding engine, steered.

    Args:
        twist: "prefix", or a critic's folder.
        reward: gives the recipe's reward; None where it has none.
        critic: loads a critic.

    Raises:
        InputError: for an engine that is not steered, and for "prefix" without a reward.
    """
    if not _has(decoder, "twist"):
        raise InputError(f"twist is {twist!r}, but {type(decoder).__name__} has none; use --engine smc")
    if twist != PREFIX:
        return replace(decoder, twist=critic(twist))
    if reward is None:
        raise InputError(
            "twist is 'prefix', but the recipe has no reward that could judge unfinished completions; give a critic's folder, or "
            "leave --twist out"
        )
    _warn_of_prefixes(reward())
    return replace(decoder, twist=prefix_evidence)


def edited(decoder: Any, masked_lm: str, prior: ModelPrior) -> Any:
    """A decoding engine whose chains also edit completions in the middle, by a masked language model.

    Raises:
        InputError: for an engine that has no chains.
    """
    if not _has(decoder, "kernel"):
        raise InputError(f"masked_lm is {masked_lm!r}, but {type(decoder).__name__} edits nothing; use --engine mcmc")
    return replace(decoder, kernel=masked_edits(masked_lm, prior))


def _has(engine: Any, setting: str) -> bool:
    return any(field.name == setting and field.init for field in fields(engine))


def _warn_of_prefixes(reward: TextFunction) -> None:
    blind = [part.label for part in named_parts(reward) if not part.on_prefixes]
    if blind:
        warnings.warn(
            f"{', '.join(blind)} says little of unfinished texts, and steers SMC at random (the weights still correct for it); "
            f"use a critic as the twist",
            TiltWarning,
            stacklevel=2,
        )


def resampled(weighted: Weighted, beta: float, count: int, rng: Generator) -> list[dict[str, Any]]:
    """`count` completions of each prompt, resampled from an engine's weights.

    Where all that an engine kept for a prompt count alike, they are the samples, and no copies are made of them: there may be
    fewer than `count`, or none.
    """
    draws, reward = weighted.scored.draws, beta * weighted.scored.log_evidence
    chosen = resample(weighted.log_w, draws.prompt_index, len(draws.prompts), count, rng)
    rows = []
    for number, prompt in enumerate(draws.prompts.texts):
        kept = ((draws.prompt_index == number) & (weighted.log_w > -torch.inf)).nonzero().flatten()
        alike = len(weighted.log_w[kept].unique()) <= 1
        picks = kept[torch.randperm(len(kept), generator=rng)][:count] if alike else chosen[number]
        texts = [{"text": draws.texts[i], "reward": float(reward[i])} for i in picks.tolist()]
        rows.append({"prompt": prompt, "completions": texts})
    return rows
