"""verl's configuration: a YAML (nested, or only the part one changes) or the dotted overrides of a command line.

Keys, defaults and what they do were read in verl/trainer/config/_generated_ppo_trainer.yaml, trainer/ppo/core_algos.py
(`kl_penalty`, `agg_loss`, the advantage estimators) and trainer/ppo/ray_trainer.py (`apply_kl_penalty`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiltlm.errors import InputError
from tiltlm.explanation.objective import Baseline, KLTerm, Length, Objective, Sampling
from tiltlm.explanation.readers.flags import words
from tiltlm.explanation.readers.reading import Option, Reading, Settings

ACTOR, ROLLOUT, ALGORITHM = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm"
KL_KINDS = (
    "kl",
    "k1",
    "abs",
    "mse",
    "k2",
    "low_var_kl",
    "k3",
    "full",
    "kl+",
    "k1+",
    "abs+",
    "low_var_kl+",
    "k3+",
    "mse+",
    "k2+",
)
ADVANTAGES = (
    "gae",
    "grpo",
    "grpo_vectorized",
    "rloo",
    "rloo_vectorized",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "opo",
    "gpg",
    "grpo_passk",
    "gdpo",
    "optimal_token_baseline",
    "tir_optimal_token_baseline",
)
OPTIONS = {
    f"{ALGORITHM}.adv_estimator": Option("text", "gae", ADVANTAGES),
    f"{ALGORITHM}.norm_adv_by_std_in_grpo": Option("flag", True),
    f"{ALGORITHM}.use_kl_in_reward": Option("flag", False),
    f"{ALGORITHM}.kl_penalty": Option("text", "kl", KL_KINDS),
    f"{ALGORITHM}.kl_ctrl.type": Option("text", "fixed", ("fixed", "adaptive")),
    f"{ALGORITHM}.kl_ctrl.kl_coef": Option("number", 0.001),
    f"{ALGORITHM}.kl_ctrl.target_kl": Option("number", 0.1),
    f"{ALGORITHM}.gamma": Option("number", 1.0),
    f"{ALGORITHM}.lam": Option("number", 1.0),
    f"{ALGORITHM}.filter_groups.enable": Option("flag", False),
    f"{ALGORITHM}.use_pf_ppo": Option("flag", False),
    f"{ACTOR}.use_kl_loss": Option("flag", False),
    f"{ACTOR}.kl_loss_coef": Option("number", 0.001),
    f"{ACTOR}.kl_loss_type": Option("text", "low_var_kl", KL_KINDS),
    f"{ACTOR}.loss_agg_mode": Option(
        "text",
        "token-mean",
        ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    ),
    f"{ACTOR}.clip_ratio": Option("number", 0.2),
    f"{ACTOR}.clip_ratio_low": Option("number", 0.2),
    f"{ACTOR}.clip_ratio_high": Option("number", 0.2),
    f"{ACTOR}.entropy_coeff": Option("number", 0.0),
    f"{ACTOR}.ppo_epochs": Option("count", 1),
    f"{ACTOR}.ppo_mini_batch_size": Option("count", 256),
    f"{ACTOR}.policy_loss.loss_mode": Option("text", "vanilla"),
    f"{ROLLOUT}.n": Option("count", 1),
    f"{ROLLOUT}.temperature": Option("number", 1.0),
    f"{ROLLOUT}.top_p": Option("number", 1.0),
    f"{ROLLOUT}.top_k": Option("count", -1),
    "data.train_batch_size": Option("count", 1024),
    "reward_model.overlong_buffer.enable": Option("flag", False),
}
_ESTIMATORS = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
    "full": "full",
}
_LENGTHS: dict[str, Length] = {
    "token-mean": "batch mean",
    "token-sum": "sum",
    "seq-mean-token-sum": "sum",
    "seq-mean-token-mean": "sequence mean",
    "seq-mean-token-sum-norm": "constant",
}
_BASELINES: dict[str, Baseline] = {
    "gae": "critic",
    "rloo": "leave-one-out",
    "rloo_vectorized": "leave-one-out",
    "reinforce_plus_plus": "batch mean",
    "remax": "greedy",
    "opo": "other",
    "optimal_token_baseline": "other",
    "tir_optimal_token_baseline": "other",
}
_ODD = {
    "gpg": "gpg multiplies the advantage by the share of prompts with a reward",
    "grpo_passk": "grpo_passk rewards only the best completion of a group",
    "gdpo": "gdpo normalises each reward by itself",
}
_SAME_FIRST_UPDATE = frozenset({"vanilla", "gspo", "sapo", "gpg", "cispo", "geo_mean", "bypass_mode"})
"""Policy losses whose first update is the vanilla one, up to its average over tokens."""


def is_config(config: Any) -> bool:
    """Whether a mapping, or the words of a command line, are verl's."""
    if isinstance(config, Mapping):
        return any(str(key).split(".")[0] in {"actor_rollout_ref", "algorithm"} for key in config)
    text = config if isinstance(config, str) else " ".join(str(word) for word in config)
    return "actor_rollout_ref." in text or "algorithm.adv_estimator" in text


def read(config: Mapping[str, Any] | str | Sequence[str]) -> Reading:
    """Read a mapping (nested or dotted), a command line, or the script that holds it.

    Raises:
        InputError: for a value of the wrong kind.
    """
    given = flat(config) if isinstance(config, Mapping) else _overrides(words(config))
    if not given:
        raise InputError(
            "there are no settings such as algorithm.adv_estimator=grpo; give the whole line, script or YAML"
        )
    given = {key: value for key, value in given.items() if not (isinstance(value, str) and "${oc." in value)}
    settings = Settings(given, OPTIONS, "verl")
    ours = [key for key in settings.ignored if key.split(".")[0] in {"algorithm", "actor_rollout_ref"}]
    close = tuple(pair for pair in settings.suggestions() if pair[0] in ours)
    estimator = settings[f"{ALGORITHM}.adv_estimator"]
    objective = _objective(settings)
    return Reading(objective, objective.beta, f"verl {estimator}", _origin(settings), settings.ignored, close)


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _overrides(line: Sequence[str]) -> dict[str, Any]:
    pairs = [word.lstrip("+~").partition("=") for word in line if "=" in word and not word.startswith("-")]
    return {key: value for key, _, value in pairs if "." in key}


def _term(beta: float, kind: str) -> KLTerm:
    """A trailing + keeps the value and takes the gradient of k2."""
    estimator = "k2" if kind.endswith("+") else _ESTIMATORS[kind]
    return KLTerm(beta, estimator, "token")  # pyright: ignore[reportArgumentType]


def _objective(s: Settings) -> Objective:
    kind, group = s[f"{ALGORITHM}.adv_estimator"], s[f"{ROLLOUT}.n"]
    in_reward, in_loss = s[f"{ALGORITHM}.use_kl_in_reward"], s[f"{ACTOR}.use_kl_loss"]
    coefficient, penalty = s[f"{ALGORITHM}.kl_ctrl.kl_coef"], s[f"{ALGORITHM}.kl_penalty"].removesuffix("+")
    loss = _term(s[f"{ACTOR}.kl_loss_coef"], s[f"{ACTOR}.kl_loss_type"])
    in_group = kind.startswith("grpo") or kind in {"gpg", "gdpo", "reinforce_plus_plus_baseline"}
    alone = group == 1 and (in_group or kind.startswith("rloo"))
    mode, temperature = s[f"{ACTOR}.policy_loss.loss_mode"], s[f"{ROLLOUT}.temperature"]
    odd = [_ODD[kind]] if kind in _ODD else []
    odd += [] if mode in _SAME_FIRST_UPDATE else [f"policy loss {mode}"]
    odd += ["draws are resampled by reward (pf_ppo)"] if s[f"{ALGORITHM}.use_pf_ppo"] else []
    steps = -(-s["data.train_batch_size"] // s[f"{ACTOR}.ppo_mini_batch_size"]) * s[f"{ACTOR}.ppo_epochs"]
    top_k = s[f"{ROLLOUT}.top_k"]
    return Objective(
        reward_kl=_term(coefficient, penalty) if in_reward and coefficient else None,
        loss_kl=loss if in_loss and loss.beta else None,
        baseline="none" if alone else _BASELINES.get(kind, "group mean"),
        scale=_scale(s, kind, alone),
        eps=1e-6,
        group=None if kind in {"gae", "reinforce_plus_plus", "remax"} else group,
        length="sequence mean" if mode == "gspo" else _LENGTHS[s[f"{ACTOR}.loss_agg_mode"]],
        loss_kl_length=_LENGTHS[s[f"{ACTOR}.loss_agg_mode"]],
        gamma=s[f"{ALGORITHM}.gamma"] if kind in {"gae", "reinforce_plus_plus"} else 1.0,
        lam=s[f"{ALGORITHM}.lam"],
        clip=(s[f"{ACTOR}.clip_ratio_low"], s[f"{ACTOR}.clip_ratio_high"]),
        importance="sequence" if mode == "gspo" else "token",
        updates=max(1, steps),
        shaping=("an overlong penalty",) if s["reward_model.overlong_buffer.enable"] else (),
        sampling=Sampling(temperature, s[f"{ROLLOUT}.top_p"], top_k if top_k and top_k > 0 else None),
        scoring_temperature=temperature,
        kl_target=s[f"{ALGORITHM}.kl_ctrl.target_kl"] if in_reward and _adaptive(s) else None,
        entropy=s[f"{ACTOR}.entropy_coeff"],
        drops_uniform_groups=s[f"{ALGORITHM}.filter_groups.enable"],
        unmodelled=tuple(odd),
    )


def _scale(s: Settings, kind: str, alone: bool) -> Any:
    if kind in {"grpo", "grpo_vectorized"}:
        return "group std" if s[f"{ALGORITHM}.norm_adv_by_std_in_grpo"] and not alone else "none"
    return "batch std" if kind in {"gae", "reinforce_plus_plus", "reinforce_plus_plus_baseline"} else "none"


def _adaptive(s: Settings) -> bool:
    return s[f"{ALGORITHM}.kl_ctrl.type"] == "adaptive"


def _origin(s: Settings) -> dict[str, tuple[str, ...]]:
    def shown(part: str, *keys: str) -> tuple[str, ...]:
        return s.shown(*(f"{part}.{key}" for key in keys))

    return {
        "beta": (*shown(ALGORITHM, "use_kl_in_reward"), *shown(ACTOR, "use_kl_loss")),
        "reward_kl": shown(ALGORITHM, "kl_penalty", "kl_ctrl.kl_coef"),
        "loss_kl": shown(ACTOR, "kl_loss_type", "kl_loss_coef"),
        "baseline": (*shown(ALGORITHM, "adv_estimator"), *shown(ROLLOUT, "n")),
        "scale": shown(ALGORITHM, "adv_estimator", "norm_adv_by_std_in_grpo"),
        "length": shown(ACTOR, "loss_agg_mode"),
        "loss_kl_length": shown(ACTOR, "loss_agg_mode", "policy_loss.loss_mode"),
        "gamma": shown(ALGORITHM, "gamma"),
        "lam": shown(ALGORITHM, "lam"),
        "clip": shown(ACTOR, "clip_ratio_low", "clip_ratio_high"),
        "importance": shown(ACTOR, "policy_loss.loss_mode"),
        "updates": (*s.shown("data.train_batch_size"), *shown(ACTOR, "ppo_mini_batch_size", "ppo_epochs")),
        "shaping": s.shown("reward_model.overlong_buffer.enable"),
        "sampling": shown(ROLLOUT, "temperature", "top_p", "top_k"),
        "kl_target": shown(ALGORITHM, "kl_ctrl.type", "kl_ctrl.target_kl"),
        "entropy": shown(ACTOR, "entropy_coeff"),
        "drops_uniform_groups": shown(ALGORITHM, "filter_groups.enable"),
        "unmodelled": (*shown(ALGORITHM, "adv_estimator"), *shown(ACTOR, "policy_loss.loss_mode")),
    }
