"""TRL's configurations: GRPOConfig, RLOOConfig, PPOConfig, OnlineDPOConfig, DPOConfig.

Fields, defaults and what they do were read in TRL 1.16 (grpo_trainer.py, rloo_trainer.py, dpo_config.py,
experimental/online_dpo) and, for PPO, in trl/experimental/ppo of an earlier release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from tiltlm.errors import InputError
from tiltlm.explanation.objective import KLTerm, Length, Objective, PairLoss, Sampling, Scale
from tiltlm.explanation.readers.reading import Option, Reading, Settings

_DRAWING = {
    "temperature": Option("number", 1.0),
    "top_p": Option("number", 1.0),
    "top_k": Option("count", 0),
    "min_p": Option("number", None),
    "repetition_penalty": Option("number", 1.0),
}
_REFERENCE = {
    "sync_ref_model": Option("flag", False),
    "ref_model_mixup_alpha": Option("number", 0.6),
    "ref_model_sync_steps": Option("count", 512),
}
_BATCH = {
    "num_iterations": Option("count", 1),
    "steps_per_generation": Option("count", None),
    "gradient_accumulation_steps": Option("count", 1),
    "epsilon": Option("number", 0.2),
    "epsilon_high": Option("number", None),
    "mask_truncated_completions": Option("flag", False),
}
GRPO = {
    "beta": Option("number", 0.0),
    "num_generations": Option("count", 8),
    "loss_type": Option("text", "dapo", ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")),
    "scale_rewards": Option("text", "group", ("group", "batch", "none", "true", "false")),
    "multi_objective_aggregation": Option("text", "sum_then_normalize", ("sum_then_normalize", "normalize_then_sum")),
    "importance_sampling_level": Option("text", "token", ("token", "sequence")),
    "use_bias_correction_kl": Option("flag", True),
    "delta": Option("number", None),
    "top_entropy_quantile": Option("number", 1.0),
    "entropy_coef": Option("number", 0.0),
    "use_adaptive_entropy": Option("flag", False),
    "off_policy_mask_threshold": Option("number", None),
    **_BATCH,
    **_DRAWING,
    **_REFERENCE,
}
RLOO = {
    "beta": Option("number", 0.05),
    "num_generations": Option("count", 2),
    "normalize_advantages": Option("flag", False),
    "reward_clip_range": Option("pair", None),
    **_BATCH,
    **_DRAWING,
    **_REFERENCE,
}
PPO = {
    "kl_coef": Option("number", 0.05),
    "kl_estimator": Option("text", "k1", ("k1", "k3")),
    "num_ppo_epochs": Option("count", 4),
    "num_mini_batches": Option("count", 1),
    "whiten_rewards": Option("flag", False),
    "cliprange": Option("number", 0.2),
    "gamma": Option("number", 1.0),
    "lam": Option("number", 0.95),
    "temperature": Option("number", 0.7),
    "missing_eos_penalty": Option("number", None),
}
ONLINE_DPO = {
    "beta": Option("numbers", (0.1,)),
    "loss_type": Option("text", "sigmoid", ("sigmoid", "ipo")),
    "missing_eos_penalty": Option("number", None),
    "max_new_tokens": Option("count", 64),
}
DPO = {
    "beta": Option("number", 0.1),
    "loss_type": Option("text", "sigmoid"),
    "label_smoothing": Option("number", 0.0),
    **_REFERENCE,
}
TABLES = {"grpo": GRPO, "rloo": RLOO, "ppo": PPO, "online-dpo": ONLINE_DPO, "dpo": DPO}
_CLASSES = {
    "GRPOConfig": "grpo",
    "RLOOConfig": "rloo",
    "PPOConfig": "ppo",
    "OnlineDPOConfig": "online-dpo",
    "DPOConfig": "dpo",
}
_NAMING = ("trainer", "trainer_type", "config_class", "_target_", "method")
"""Keys under which people write which trainer a file is for."""
_SCALES: dict[str, Scale] = {"group": "group std", "true": "group std", "batch": "batch std"}
_LENGTHS: dict[str, Length] = {"grpo": "sequence mean", "sapo": "sequence mean", "dr_grpo": "constant", "luspo": "sum"}


def read(config: Any, trainer: str | None = None) -> Reading:
    """Read one of TRL's configurations.

    Args:
        config: a mapping of fields, or the configuration object itself.
        trainer: "grpo", "rloo", "ppo", "online-dpo" or "dpo", where the fields do not show it.

    Raises:
        InputError: for a value of the wrong kind, or if several trainers have the fields that are given.
    """
    given = config if isinstance(config, Mapping) else _given(config)
    trainer = trainer or _class_of(config) or guess(given)
    if trainer is None:
        raise InputError(
            "the fields fit several of TRL's trainers; say which with format trl-grpo, trl-rloo, trl-ppo, trl-online-dpo or trl-dpo"
        )
    settings = Settings({key: value for key, value in given.items() if key not in _NAMING}, TABLES[trainer], "TRL")
    objective, origin = _READERS[trainer](settings)
    name = {kind: name for name, kind in _CLASSES.items()}[trainer]
    suggestions = settings.suggestions(_other_fields(trainer))
    return Reading(objective, objective.beta, f"TRL {name}", origin, settings.ignored, suggestions)


def is_config(config: Any) -> bool:
    """Whether it is one of TRL's configuration objects (by the names of its classes), or has fields of one."""
    if isinstance(config, Mapping):
        return guess(config) is not None or any(key in table for table in TABLES.values() for key in config)
    return _class_of(config) is not None


def guess(given: Mapping[str, Any]) -> str | None:
    """Which trainer the keys belong to: the one that is named, or the only one that has most of them."""
    for key in _NAMING:
        named = str(given.get(key, "")).rsplit(".", 1)[-1].removesuffix("Trainer").removesuffix("Config").lower()
        named = {"onlinedpo": "online-dpo", "online_dpo": "online-dpo"}.get(named, named)
        if named in TABLES:
            return named
    counts = {trainer: sum(key in table for key in given) for trainer, table in TABLES.items()}
    best = max(counts.values())
    winners = [trainer for trainer, count in counts.items() if count == best and best > 0]
    return winners[0] if len(winners) == 1 else None


def _class_of(config: Any) -> str | None:
    for ancestor in type(config).__mro__:
        if ancestor.__name__ in _CLASSES:
            return _CLASSES[ancestor.__name__]
    return None


def _given(config: Any) -> dict[str, Any]:
    """Every field of a configuration object; a field at its default counts as not given."""
    if not is_dataclass(config):
        return dict(vars(config))
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    defaults = {field.name: field.default for field in fields(config)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def _other_fields(trainer: str) -> tuple[str, ...]:
    return tuple({key for kind, table in TABLES.items() if kind != trainer for key in table})


def _grpo(s: Settings) -> tuple[Objective, dict[str, tuple[str, ...]]]:
    beta, kind = s["beta"], s["loss_type"]
    high = s["epsilon"] if s["epsilon_high"] is None else s["epsilon_high"]
    odd = []
    if s["multi_objective_aggregation"] == "normalize_then_sum":
        odd.append("each reward is normalised by itself before they are added")
    if s["top_entropy_quantile"] < 1:
        odd.append("only tokens of high entropy carry the reward")
    if s["use_adaptive_entropy"]:
        odd.append("an entropy bonus whose coefficient a controller moves")
    corrected = s["use_bias_correction_kl"]
    objective = Objective(
        loss_kl=KLTerm(beta, "k3", "token", corrected) if beta else None,
        baseline="group mean",
        scale=_SCALES.get(s["scale_rewards"], "none"),
        eps=1e-4,
        group=s["num_generations"],
        length=_LENGTHS.get(kind, "batch mean"),
        clip=None if kind in {"cispo", "sapo", "vespo"} else (s["epsilon"], high),
        importance=s["importance_sampling_level"],
        policy_scale=min(1.0, high) if kind == "cispo" else 1.0,
        updates=_updates(s),
        entropy=0.0 if s["use_adaptive_entropy"] else s["entropy_coef"],
        mask_truncated=s["mask_truncated_completions"],
        unmodelled=tuple(odd),
        **_law(s),
    )
    odd_length = kind in {"grpo", "sapo"} and s["importance_sampling_level"] == "sequence"
    origin = {
        "beta": s.shown("beta"),
        "loss_kl": s.shown("beta", "use_bias_correction_kl"),
        "baseline": s.shown("num_generations"),
        "scale": s.shown("scale_rewards", "num_generations"),
        "length": s.shown("loss_type", *(["importance_sampling_level"] if odd_length else [])),
        "policy_scale": s.shown("loss_type", "epsilon_high", "epsilon"),
        "entropy": s.shown("entropy_coef"),
        "unmodelled": s.shown("multi_objective_aggregation", "top_entropy_quantile", "use_adaptive_entropy"),
        "importance": s.shown("importance_sampling_level"),
        **_origin(s),
    }
    return objective, origin


def _rloo(s: Settings) -> tuple[Objective, dict[str, tuple[str, ...]]]:
    beta, high = s["beta"], s["epsilon_high"]
    objective = Objective(
        reward_kl=KLTerm(beta, "k1", "sequence") if beta else None,
        baseline="leave-one-out",
        scale="batch std" if s["normalize_advantages"] else "none",
        eps=1e-4,
        group=s["num_generations"],
        reward_clip=s["reward_clip_range"],
        clip=(s["epsilon"], s["epsilon"] if high is None else high),
        importance="sequence",
        updates=_updates(s),
        mask_truncated=s["mask_truncated_completions"],
        **_law(s),
    )
    origin = {
        "beta": s.shown("beta"),
        "reward_kl": s.shown("beta"),
        "scale": s.shown("normalize_advantages"),
        "reward_clip": s.shown("reward_clip_range"),
        **_origin(s),
    }
    return objective, origin


def _ppo(s: Settings) -> tuple[Objective, dict[str, tuple[str, ...]]]:
    beta, penalty = s["kl_coef"], s["missing_eos_penalty"]
    objective = Objective(
        reward_kl=KLTerm(beta, s["kl_estimator"], "token") if beta else None,
        baseline="critic",
        scale="batch std",
        group=None,
        length="batch mean",
        gamma=s["gamma"],
        lam=s["lam"],
        clip=(s["cliprange"], s["cliprange"]),
        updates=s["num_ppo_epochs"] * s["num_mini_batches"],
        reward_whitening="tokens" if s["whiten_rewards"] else "none",
        shaping=() if not penalty else (f"−{penalty:g} without EOS",),
        sampling=Sampling(temperature=s["temperature"]),
        scoring_temperature=s["temperature"],
    )
    origin = {
        "beta": s.shown("kl_coef"),
        "reward_kl": s.shown("kl_coef", "kl_estimator"),
        "gamma": s.shown("gamma"),
        "lam": s.shown("lam"),
        "clip": s.shown("cliprange"),
        "updates": s.shown("num_ppo_epochs", "num_mini_batches"),
        "reward_whitening": s.shown("whiten_rewards"),
        "shaping": s.shown("missing_eos_penalty"),
        "sampling": s.shown("temperature"),
    }
    return objective, origin


def _online_dpo(s: Settings) -> tuple[PairLoss, dict[str, tuple[str, ...]]]:
    return PairLoss(s["beta"][0], s["loss_type"], labels="reward", online=True), {
        "kind": s.shown("loss_type"),
        "labels": s.shown("loss_type"),
    }


def _dpo(s: Settings) -> tuple[PairLoss, dict[str, tuple[str, ...]]]:
    kind = s["loss_type"] if not s["label_smoothing"] else f"{s['loss_type']} with label smoothing"
    kind = f"{kind} with a moving reference" if s["sync_ref_model"] else kind
    return PairLoss(s["beta"], kind), {"kind": s.shown("loss_type"), "labels": s.shown("loss_type")}


_READERS = {"grpo": _grpo, "rloo": _rloo, "ppo": _ppo, "online-dpo": _online_dpo, "dpo": _dpo}


def _updates(s: Settings) -> int:
    accumulation = max(1, s["gradient_accumulation_steps"])
    steps = s["steps_per_generation"] or accumulation
    return s["num_iterations"] * max(1, -(-steps // accumulation))


def _law(s: Settings) -> dict[str, Any]:
    """Drawing, scoring (at the same temperature) and the reference, the same in GRPO and RLOO."""
    return {
        "sampling": Sampling(s["temperature"], s["top_p"], s["top_k"] or None, s["min_p"], s["repetition_penalty"]),
        "scoring_temperature": s["temperature"],
        "sync_every": s["ref_model_sync_steps"] if s["sync_ref_model"] else 0,
        "sync_mix": s["ref_model_mixup_alpha"],
    }


def _origin(s: Settings) -> dict[str, tuple[str, ...]]:
    drawing = [key for key in _DRAWING if key in s.given] or ["temperature"]
    return {
        "clip": s.shown("epsilon", "epsilon_high"),
        "updates": s.shown("num_iterations", "steps_per_generation", "gradient_accumulation_steps"),
        "mask_truncated": s.shown("mask_truncated_completions"),
        "sampling": s.shown(*drawing),
        "sync_every": s.shown("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    }
