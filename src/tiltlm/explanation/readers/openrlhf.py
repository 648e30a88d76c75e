"""OpenRLHF's train_ppo_ray command line, in its old flat spelling and the newer dotted one.

Flags, defaults and what they do were read in openrlhf/cli/train_ppo_ray.py, trainer/ppo_utils/experience_maker.py,
trainer/ray/ppo_actor.py and models/loss.py. Rewards are centred (and scaled) first; a KL in the reward comes after, so it
has no baseline and is not scaled with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiltlm.errors import InputError
from tiltlm.explanation.objective import Baseline, KLTerm, Length, Objective, Sampling, Scale
from tiltlm.explanation.readers.flags import words
from tiltlm.explanation.readers.reading import Option, Reading, Settings

ESTIMATORS = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo")
OPTIONS = {
    "init_kl_coef": Option("number", 0.01),
    "kl_estimator": Option("text", "k1", ("k1", "k2", "k3")),
    "use_kl_loss": Option("flag", False),
    "kl_target": Option("number", None),
    "advantage_estimator": Option("text", "gae", ESTIMATORS),
    "no_advantage_std_norm": Option("flag", False),
    "n_samples_per_prompt": Option("count", 1),
    "gamma": Option("number", 1.0),
    "lambd": Option("number", 1.0),
    "eps_clip": Option("number", 0.2),
    "eps_clip_low_high": Option("pair", None),
    "policy_loss_type": Option("text", "ppo", ("ppo", "gspo")),
    "loss_agg_mode": Option(
        "text", "token-mean", ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
    ),
    "reward_clip_range": Option("pair", (-10.0, 10.0)),
    "normalize_reward": Option("flag", False),
    "overlong_buffer_len": Option("number", None),
    "overlong_penalty_factor": Option("number", 1.0),
    "stop_properly_penalty_coef": Option("number", None),
    "temperature": Option("number", 1.0),
    "top_p": Option("number", 1.0),
    "rollout_batch_size": Option("count", 1024),
    "train_batch_size": Option("count", 128),
    "max_epochs": Option("count", 1),
    "entropy_loss_coef": Option("number", None),
    "dynamic_filtering": Option("flag", False),
    "async_train": Option("flag", False),
}
DOTTED = {
    "algo.kl.init_coef": "init_kl_coef",
    "algo.kl.estimator": "kl_estimator",
    "algo.kl.use_loss": "use_kl_loss",
    "algo.kl.target": "kl_target",
    "algo.advantage.estimator": "advantage_estimator",
    "algo.advantage.no_std_norm": "no_advantage_std_norm",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.lambd": "lambd",
    "algo.dynamic_filtering_enable": "dynamic_filtering",
    "rollout.n_samples_per_prompt": "n_samples_per_prompt",
    "rollout.temperature": "temperature",
    "rollout.top_p": "top_p",
    "rollout.batch_size": "rollout_batch_size",
    "train.batch_size": "train_batch_size",
    "train.max_epochs": "max_epochs",
    "train.async_enable": "async_train",
    "actor.eps_clip": "eps_clip",
    "actor.eps_clip_low_high": "eps_clip_low_high",
    "actor.policy_loss_type": "policy_loss_type",
    "actor.loss_agg_mode": "loss_agg_mode",
    "actor.entropy_coef": "entropy_loss_coef",
    "reward.clip_range": "reward_clip_range",
    "reward.normalize_enable": "normalize_reward",
    "reward.overlong_buffer_len": "overlong_buffer_len",
    "reward.overlong_penalty_factor": "overlong_penalty_factor",
    "reward.stop_properly_penalty_coef": "stop_properly_penalty_coef",
}
_BASELINES: dict[str, Baseline] = {"gae": "critic", "reinforce": "batch mean", "rloo": "leave-one-out"}
_LENGTHS: dict[str, Length] = {
    "token-mean": "batch mean",
    "seq-mean-token-mean": "sequence mean",
    "seq-mean-token-sum": "sum",
    "seq-mean-token-sum-norm": "constant",
}
_SPELT: dict[str, str] = {flag: dotted for dotted, flag in DOTTED.items()}


def is_command(script: Any) -> bool:
    """Whether a command line is one of OpenRLHF's."""
    text = script if isinstance(script, str) else " ".join(str(word) for word in script)
    return "openrlhf" in text.lower() or any(
        f"--{flag}" in text for flag in ("init_kl_coef", "algo.kl", "algo.advantage")
    )


def read(script: str | Sequence[str]) -> Reading:
    """Read a command line or the script that holds it.

    Raises:
        InputError: for a value of the wrong kind, or a line without flags.
    """
    given = _flags(words(script))
    if not given:
        raise InputError("the command line has no flags, such as --init_kl_coef 0.01; give the whole line or script")
    dotted = any(key in DOTTED for key in given)
    settings = Settings({DOTTED.get(key, key): value for key, value in given.items()}, OPTIONS, "OpenRLHF")
    suggestions = settings.suggestions()
    if dotted:
        named = Settings(given, {name: OPTIONS[flag] for name, flag in DOTTED.items()}, "OpenRLHF")
        suggestions = named.suggestions()
    objective = _objective(settings)
    origin = _origin(settings, "dotted" if dotted else "flat")
    source = f"OpenRLHF {settings['advantage_estimator']}"
    return Reading(objective, objective.beta, source, origin, settings.ignored, suggestions)


def _flags(line: Sequence[str]) -> dict[str, Any]:
    """--key value, --key=value, --key (true), --key first second."""
    found: dict[str, Any] = {}
    key = ""
    for word in line:
        if word.startswith("--") and len(word) > 2:
            key, _, value = word[2:].partition("=")
            found[key] = value if value else True
        elif key:
            found[key] = word if found[key] is True else f"{found[key]} {word}"
    pairs = {"reward_clip_range", "eps_clip_low_high", "reward.clip_range", "actor.eps_clip_low_high"}
    single = {name: value for name, value in found.items() if name not in pairs and isinstance(value, str)}
    return found | {name: value.split(" ")[0] for name, value in single.items()}


def _objective(s: Settings) -> Objective:
    kind, beta, group = s["advantage_estimator"], s["init_kl_coef"], s["n_samples_per_prompt"]
    whitens = kind in {"gae", "reinforce", "reinforce_baseline"} and not s["no_advantage_std_norm"]
    total = kind in {"gae", "reinforce"}
    scale: Scale = "group std" if kind == "group_norm" else "batch std" if whitens else "none"
    in_loss, gspo = s["use_kl_loss"], s["policy_loss_type"] == "gspo"
    term = KLTerm(beta, s["kl_estimator"], "token") if beta > 0 else None
    mode = "seq-mean-token-mean" if gspo else s["loss_agg_mode"]
    penalties = []
    if s["overlong_buffer_len"] is not None:
        penalties.append(f"−{s['overlong_penalty_factor']:g}·(overlong share of {s['overlong_buffer_len']:g} tokens)")
    if s["stop_properly_penalty_coef"] is not None:
        penalties.append(f"a penalty {s['stop_properly_penalty_coef']:g} for truncated completions")
    return Objective(
        reward_kl=None if in_loss else term,
        loss_kl=term if in_loss else None,
        baseline=_BASELINES.get(kind, "group mean"),
        baseline_on="total" if total else "reward",
        scale=scale,
        scale_on="reward" if kind == "group_norm" else "total",
        eps=1e-9 if kind == "group_norm" else 0.0,
        group=None if total else group,
        length=_LENGTHS[mode],
        loss_kl_length="batch mean",
        gamma=s["gamma"] if total else 1.0,
        lam=s["lambd"],
        clip=s["eps_clip_low_high"] or (s["eps_clip"], s["eps_clip"]),
        importance="sequence" if gspo else "token",
        updates=max(1, s["rollout_batch_size"] * group * s["max_epochs"] // s["train_batch_size"]),
        reward_clip=s["reward_clip_range"],
        reward_whitening="score" if s["normalize_reward"] else "none",
        shaping=tuple(penalties),
        sampling=Sampling(s["temperature"], s["top_p"]),
        scoring_temperature=s["temperature"],
        kl_target=s["kl_target"],
        entropy=s["entropy_loss_coef"] or 0.0,
        drops_uniform_groups=s["dynamic_filtering"],
        unmodelled=("draws of an older policy, in the background",) if s["async_train"] else (),
    )


def _origin(s: Settings, spelling: str) -> dict[str, tuple[str, ...]]:
    behind = {
        "beta": ("init_kl_coef",),
        "reward_kl": ("init_kl_coef", "kl_estimator"),
        "loss_kl": ("use_kl_loss", "kl_estimator", "init_kl_coef"),
        "baseline": ("advantage_estimator", "n_samples_per_prompt"),
        "scale": ("advantage_estimator", "no_advantage_std_norm"),
        "length": ("loss_agg_mode", "policy_loss_type"),
        "loss_kl_length": ("loss_agg_mode", "policy_loss_type"),
        "gamma": ("gamma",),
        "lam": ("lambd",),
        "clip": ("eps_clip", "eps_clip_low_high"),
        "importance": ("policy_loss_type",),
        "updates": ("rollout_batch_size", "n_samples_per_prompt", "train_batch_size", "max_epochs"),
        "reward_clip": ("reward_clip_range",),
        "reward_whitening": ("normalize_reward",),
        "shaping": ("overlong_buffer_len", "stop_properly_penalty_coef"),
        "sampling": ("temperature", "top_p"),
        "kl_target": ("kl_target",),
        "entropy": ("entropy_loss_coef",),
        "drops_uniform_groups": ("dynamic_filtering",),
        "unmodelled": ("async_train",),
    }
    found = {}
    for field, flags in behind.items():
        spelt = [(_SPELT.get(flag) or flag) if spelling == "dotted" else flag for flag in flags]
        found[field] = tuple(
            text.replace(flag, name, 1) for flag, name, text in zip(flags, spelt, s.shown(*flags), strict=True)
        )
    return found
