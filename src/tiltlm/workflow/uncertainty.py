"""A recipe's `uncertainty`: a learned reward's draws as evidence, the same one for every command of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tiltlm.errors import InputError
from tiltlm.evidence.members import Members, PriorRewards
from tiltlm.evidence.reward_law import prompt_keys
from tiltlm.evidence.running.calls import TextFunction
from tiltlm.evidence.uncertain import (
    EvidenceAverage,
    LogPool,
    LowerConfidenceBound,
    MixtureOfPosteriors,
    VariancePenalised,
    WorstOfEnsemble,
)
from tiltlm.names import name_of
from tiltlm.records import Draws, Prompts
from tiltlm.reward_models.model import RewardModel
from tiltlm.workflow.files import unwritable
from tiltlm.workflow.recipe import Recipe

KINDS = (EvidenceAverage, MixtureOfPosteriors, LogPool, LowerConfidenceBound, WorstOfEnsemble, VariancePenalised)
AT_A_TEMPERATURE = (EvidenceAverage, MixtureOfPosteriors)
"""Those whose reward depends on the temperature of the members."""
MEMBERS = 32
"""Draws of the reward's posterior, by default."""
FILE = "members.safetensors"
"""What the members say of the prior's draws; in the run's folder."""


def check_uncertainty(recipe: Recipe, reward: TextFunction | None) -> None:
    """Raise now for what would be wrong later.

    Raises:
        InputError: if the reward is not a learned one, a setting is none, or the temperature is still to be chosen.
    """
    kind = _kind(recipe)
    if not isinstance(reward, RewardModel):
        raise InputError(
            f"uncertainty is {recipe.uncertainty!r}, and the reward is {recipe.reward!r:.80}, which says nothing of its own; give the "
            f"folder of a learned reward (tiltlm reward fit), without reward_batch, reward_retries and reward_cache"
        )
    known = ("members", *(f.name for f in fields(kind) if f.name in ("k", "penalty")))
    wrong = next((name for name in recipe.uncertainty_options if name not in known), None)
    if wrong is not None:
        raise InputError(
            f"uncertainty_options has {wrong!r}, which {recipe.uncertainty} has not; it has {', '.join(known)}"
        )
    for name, value in recipe.uncertainty_options.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"uncertainty_options {name} is {value!r}; it must be a number")
    count = _members(recipe)
    if not isinstance(count, int) or count < 2:
        raise InputError(f"uncertainty_options members is {count}; draw at least 2, as a whole number")
    if kind in AT_A_TEMPERATURE and recipe.beta is None:
        raise InputError(
            f"beta is missing; {recipe.uncertainty} is made at one temperature, so give --beta, not a budget or goal"
        )


def uncertain_evidence(
    recipe: Recipe, model: TextFunction, prompts: Prompts, draw: Callable[[], Draws], key: str
) -> Any:
    """The evidence that the recipe names.

    Members are centred at their means over the prior's draws, which are kept under `key`: a run's commands may draw different
    numbers of samples, and all of them have to speak of one target.

    Args:
        model: a `RewardModel`; see `check_uncertainty`.
        draw: gives the prior's draws; only called where nothing is kept yet.
    """
    assert isinstance(model, RewardModel)
    kind, settings = _kind(recipe), {k: v for k, v in recipe.uncertainty_options.items() if k != "members"}
    functions = model.functions(_members(recipe), seed=recipe.seed)
    members = Members(functions, bounds=recipe.bounds, on_error=recipe.on_error)
    path = recipe.folder / FILE
    centred = _kept(path, members, prompts, key) or _keep(path, PriorRewards.of(members, draw()), prompts, key)
    if kind in AT_A_TEMPERATURE:
        assert recipe.beta is not None
        return kind(centred, recipe.beta)
    return kind(centred, **settings)


def _kind(recipe: Recipe) -> Any:
    return next(kind for kind in KINDS if name_of(kind) == recipe.uncertainty)


def _members(recipe: Recipe) -> Any:
    return recipe.uncertainty_options.get("members", MEMBERS)


def _kept(path: Path, members: Members, prompts: Prompts, key: str) -> PriorRewards | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError):  # not there, or half a file: drawn again
        return None
    found: Mapping[str, dict[str, Any]] = {"rewards": {}, "log_weights": {}}
    for place, prompt in enumerate(prompt_keys(prompts)):
        for name, known in found.items():
            if f"{name}.{place}" in tensors:
                known[prompt] = tensors[f"{name}.{place}"]
    return PriorRewards(members, found["rewards"], found["log_weights"])


def _keep(path: Path, centred: PriorRewards, prompts: Prompts, key: str) -> PriorRewards:
    tensors = {}
    for place, prompt in enumerate(prompt_keys(prompts)):
        if prompt in centred.rewards:
            tensors[f"rewards.{place}"] = centred.rewards[prompt].contiguous()
            tensors[f"log_weights.{place}"] = centred.log_weights[prompt].contiguous()
    partial = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"key": key})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    return centred
