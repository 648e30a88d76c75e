"""TiltLM's own configurations: {"engine": "grpo", "beta": 0.1, "group": 8, "options": {...}}.

The evidence is r / beta, so beta is the target's and every engine works in nats; options are the behaviours that a
policy-gradient engine was given, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiltlm.errors import InputError
from tiltlm.explain.objective import KLTerm, Objective, Sampling
from tiltlm.explain.readers.reading import Option, Reading, Settings

OPTIONS = {
    "beta": Option("number", None),
    "group": Option("count", 8),
    "kl": Option("text", "reward", ("reward", "loss", "both", "none")),
    "estimator": Option("text", "k1", ("k1", "k2", "k3", "full", "rao-blackwell")),
    "level": Option("text", "sequence", ("token", "sequence")),
    "corrected": Option("flag", False),
    "baseline": Option("text", "leave-one-out", ("none", "leave-one-out", "group mean", "critic")),
    "scale": Option("text", "none", ("none", "group std", "batch std")),
    "ddof": Option("count", 0),
    "eps": Option("number", 0.0),
    "length": Option("text", "sum", ("sequence mean", "batch mean", "constant", "sum")),
    "gamma": Option("number", 1.0),
    "lam": Option("number", 1.0),
    "clip": Option("pair", None),
    "importance": Option("text", "token", ("token", "sequence")),
    "updates": Option("count", 1),
    "temperature": Option("number", 1.0),
    "top_k": Option("count", None),
    "kl_target": Option("number", None),
    "sync_every": Option("count", 0),
    "entropy": Option("number", 0.0),
    "mask_truncated": Option("flag", False),
}
_GRPO = {"baseline": "group mean", "scale": "group std", "kl": "loss", "estimator": "k3", "level": "token", "eps": 1e-4}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "rloo": {},
    "reinforce": {"baseline": "none"},
    "ppo": {"baseline": "critic", "level": "token", "clip": (0.2, 0.2), "lam": 0.95, "updates": 4},
    "grpo": {**_GRPO, "length": "sequence mean", "clip": (0.2, 0.2)},
    "dr-grpo": {**_GRPO, "scale": "none", "length": "constant", "clip": (0.2, 0.2)},
    "dapo": {**_GRPO, "kl": "none", "length": "batch mean", "clip": (0.2, 0.28)},
    "gspo": {**_GRPO, "length": "sequence mean", "importance": "sequence", "clip": (3e-4, 4e-4)},
}
"""What an engine's name stands for where its options say nothing else; the papers' settings."""


def is_config(config: Any) -> bool:
    """Whether a mapping names one of our engines."""
    return isinstance(config, Mapping) and "engine" in config


def read(config: Mapping[str, Any]) -> Reading:
    """Read an engine with its options.

    Raises:
        InputError: for an engine that is not a policy gradient, or a value of the wrong kind.
    """
    name = str(config["engine"]).lower().replace("_", "-").replace("drgrpo", "dr-grpo")
    if name not in PRESETS:
        raise InputError(f"engine is {config['engine']!r}; explain knows the policy gradients {', '.join(PRESETS)}")
    options = config.get("options") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"options is {options!r}; it must be a mapping of option to value")
    given = {key: value for key, value in config.items() if key not in {"engine", "options"}} | dict(options)
    table = OPTIONS | {
        key: Option(OPTIONS[key].kind, value, OPTIONS[key].choices) for key, value in PRESETS[name].items()
    }
    settings = Settings(given, table, "TiltLM")
    if settings["beta"] is None:
        raise InputError(
            "beta is missing; it is the temperature of the target, in reward units per nat, for example 0.1"
        )
    objective = _objective(settings)
    return Reading(objective, f"TiltLM {name}", _origin(settings), settings.ignored, settings.suggestions())


def _objective(s: Settings) -> Objective:
    place = s["kl"] if s["beta"] else "none"
    term = KLTerm(s["beta"], s["estimator"], s["level"], s["corrected"])
    return Objective(
        reward_kl=term if place in {"reward", "both"} else None,
        loss_kl=term if place in {"loss", "both"} else None,
        baseline=s["baseline"],
        scale=s["scale"],
        ddof=s["ddof"],
        eps=s["eps"],
        group=s["group"],
        length=s["length"],
        gamma=s["gamma"],
        lam=s["lam"],
        clip=s["clip"],
        importance=s["importance"],
        updates=s["updates"],
        sampling=Sampling(s["temperature"], top_k=s["top_k"]),
        scoring_temperature=s["temperature"],
        mask_truncated=s["mask_truncated"],
        sync_every=s["sync_every"],
        kl_target=s["kl_target"],
        entropy=s["entropy"],
    )


def _origin(s: Settings) -> dict[str, tuple[str, ...]]:
    behind = {
        "beta": ("beta", "kl"),
        "reward_kl": ("kl", "estimator"),
        "loss_kl": ("kl", "estimator", "level"),
        "baseline": ("baseline", "group"),
        "scale": ("scale", "group"),
        "sampling": ("temperature", "top_k"),
    }
    own = (
        "length",
        "gamma",
        "lam",
        "clip",
        "importance",
        "updates",
        "mask_truncated",
        "sync_every",
        "kl_target",
        "entropy",
    )
    return {name: s.shown(*keys) for name, keys in behind.items()} | {name: s.shown(name) for name in own}
