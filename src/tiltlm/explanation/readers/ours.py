"""TiltLM's own recipes, and what is like them: {"engine": "dr-grpo-kl", "beta": 0.1, "group": 8, "options": {...}}.

The engine is built as `tiltlm train` builds it, and asked. A policy gradient's behaviours are put into the words of `Objective`
(`policy_gradients`), so that it is judged as other libraries' are; any other engine's verdict is its claim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tiltlm.errors import InputError
from tiltlm.explanation.objective import Claimed, Objective
from tiltlm.explanation.readers import policy_gradients
from tiltlm.explanation.readers.reading import Option, Reading, Settings
from tiltlm.explanation.rules.finding import FINE, NOISE, TARGET, Finding
from tiltlm.inference.catalogue import decoding_engines, make_engine, make_trainer
from tiltlm.inference.source import ACCEPTED, Origin
from tiltlm.protocols import Claim

OPTIONS = {
    "engine": Option("text", "rloo"),
    "options": Option("text", None),
    "beta": Option("number", None),
    "kl_budget": Option("number", None),
    "reward_goal": Option("number", None),
    "group": Option("count", 8),
    "max_new_tokens": Option("count", 64),
    "temperature": Option("number", 1.0),
    "on_error": Option("text", "fail", ("fail", "drop")),
    "replay": Option("count", 0),
    "lag": Option("count", 0),
    "teacher": Option("text", None),
    "data": Option("text", None),
}
"""A recipe's keys that bear on the law, with its defaults."""
TEMPERATURES = ("beta", "kl_budget", "reward_goal")
SOURCES: Mapping[str, Origin] = {"replay": "other", "lag": "other", "teacher": "given", "data": "given"}
"""Whose completions a recipe's sources give."""


def is_config(config: Any) -> bool:
    """Whether a mapping names one of our engines, or is a recipe that leaves the engine to its default."""
    if not isinstance(config, Mapping):
        return False
    return "engine" in config or ("model" in config and bool({"prompts", "reward", "data"} & config.keys()))


def read(config: Mapping[str, Any]) -> Reading:
    """Read a recipe.

    Raises:
        InputError: for an engine or an option that is not there, a value of the wrong kind, or no way to a beta.
    """
    settings = Settings(config, OPTIONS, "TiltLM")
    name, options = str(config.get("engine", OPTIONS["engine"].default)), config.get("options") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"options is {options!r}; it must be a mapping of option to value")
    engine = make_trainer(name, settings["group"], settings["max_new_tokens"], options)
    moments, has_reward = config.get("moments") or (), config.get("reward") is not None
    alone = bool(moments) and not has_reward
    beta, temperature = 1.0 if alone else _beta(settings), settings["temperature"]  # moments' weights are in nats
    source = _source(settings)
    unsound = source is not None and SOURCES[source] not in ACCEPTED[engine.claim.data]
    if policy_gradients.knows(engine) and not unsound:
        objective = policy_gradients.objective_of(engine, beta, temperature)
    else:
        objective = Claimed(
            engine.claim, name, beta, temperature, _taught(settings), _refusal(name, engine, source) if unsound else ""
        )
    shown = {**dict.fromkeys(options, ""), **({"group": ""} if "group" in config else {})}
    return Reading(
        objective,
        beta,
        f"TiltLM {name}",
        _origin(settings, engine, shown),
        settings.ignored,
        settings.suggestions(),
        (*_moments(moments, has_reward), *_findings(settings, name, engine, objective, beta, source)),
    )


def _beta(s: Settings) -> float | None:
    """The recipe's beta; None where a plan chooses it.

    Raises:
        InputError: if there is no way to it, more than one, or it is not positive.
    """
    given = [key for key in TEMPERATURES if s[key] is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are ways to choose the same thing; give one of them")
    if not given:
        raise InputError(
            "beta is missing; it is the temperature of the target, in reward units per nat, for example 0.1, "
            "or have it chosen by kl_budget or reward_goal"
        )
    for key in ("beta", "kl_budget"):
        if key in given and not s[key] > 0:
            raise InputError(f"{key} is {s[key]:g}; it must be positive, for example 0.1")
    return s["beta"]


def _source(s: Settings) -> str | None:
    given = [key for key in SOURCES if s[key]]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are ways to get completions to learn from; give one of them")
    return given[0] if given else None


def _taught(s: Settings) -> str:
    """The law of a teacher's samples."""
    return "" if s["teacher"] is None else make_engine(decoding_engines(), s["teacher"], {}).claim.fixed_point


_LEARNS = {
    "on-policy": "fresh completions of its policy",
    "prior": "fresh completions of the prior",
    "weighted": "completions whose log-probabilities are known",
    "any": "any completions",
    "given": "the completions that are to be learned",
}
"""What an engine learns from, by its claim's `data`."""


def _refusal(name: str, engine: Any, source: str | None) -> str:
    return f"{name} is right only for {_LEARNS[engine.claim.data]}, so tiltlm train refuses {source}"


def _findings(
    s: Settings, name: str, engine: Any, objective: Objective | Claimed, beta: float | None, source: str | None
) -> Iterator[Finding]:
    """What the recipe adds to its engine."""
    claim = engine.claim
    yield _claim(name, claim, objective)
    if source is not None and isinstance(objective, Claimed) and objective.refused:
        remedy = f"leave {source} out, or take an engine whose data are any: var-grad, for example"
        yield Finding("source", objective.refused, TARGET, remedy=remedy)
    elif source in {"replay", "lag"}:
        says = (
            f"{name} learns from {_LEARNS[claim.data]}; draws of an earlier policy, which carry their law, move nothing"
        )
        yield Finding("source", says, FINE)
    elif source == "teacher" and claim.fixed_point == "data":
        teacher = make_engine(decoding_engines(), s["teacher"], {}).claim
        says = f"what is learned is the law of the teacher's samples: {teacher.fixed_point}, bias {teacher.bias}"
        severity = TARGET if teacher.fixed_point != "p*" else FINE if teacher.bias == "none" else NOISE
        remedy = "" if severity == FINE else "teach with rejection, which is exact where the reward has bounds"
        yield Finding("source", says, severity, remedy=remedy)
    elif claim.data == "given" and source is None:
        says = f"{name} learns from completions that are given, and none are: tiltlm train refuses to begin"
        yield Finding("source", says, TARGET, remedy="name a teacher, rejection for example, or a file of data")
    if s["on_error"] == "drop":
        says = "completions without a usable reward are left out, and their KL too: where there are any, their mass is free"
        yield Finding("on_error", says, NOISE, remedy="give them a reward, the lowest for example")
    if beta is None:
        yield Finding("planned", "β follows from the plan; tiltlm plan says which", FINE)
    if isinstance(objective, Objective) and objective.scale != "none" and objective.loss_kl is not None:
        c = objective.loss_kl.beta
        says = f"the deviation takes β out of the advantage: the KL is weighed by {c:g} in units of it, whatever β is"
        yield Finding("coefficient", says, TARGET, remedy="do not divide by the deviation, or put k1 into the reward")


def _moments(moments: Any, has_reward: bool) -> Iterator[Finding]:
    """What moments make of the target, whatever the engine: the law nearest to the one without them under which they hold."""
    if not moments:
        return
    asked = ", ".join(_moment(moment) for moment in moments)
    if has_reward:
        says = f"p* is the law nearest to the reward's posterior with {asked}; their weights hold at this β alone"
        formula = "p* ∝ π0·exp(r/β + Σ λᵢφᵢ), λ in nats: argmin KL(p‖π0·exp(r/β)/Z) under the moments"
    else:
        says = f"p* is the law nearest to π0 with {asked}; there is no reward, and no temperature"
        formula = "p* ∝ π0·exp(Σ λᵢφᵢ), λ in nats: argmin KL(p‖π0) under the moments"
    yield Finding("moments", says, TARGET, formula)


def _moment(moment: Any) -> str:
    """E feature = mean, of a moment as recipes and flags write it."""
    if isinstance(moment, str):
        feature, _, mean = moment.rpartition("=")
        return f"E {feature.rpartition(':')[2]} = {mean}"
    if not isinstance(moment, Mapping) or "mean" not in moment or not {"function", "part"} & moment.keys():
        raise InputError(f"moments has {moment!r:.80}; give it a function or a part, and a mean")
    label = moment.get("name") or moment.get("part") or str(moment["function"]).rpartition(":")[2]
    return f"E {label} = {moment['mean']}"


def _claim(name: str, claim: Claim, objective: Objective | Claimed) -> Finding:
    """The claim in one sentence; for a policy gradient the findings about its settings say what is wrong with it."""
    severity = FINE
    if isinstance(objective, Claimed) and not objective.refused:
        severity = TARGET if objective.fixed_point != "p*" else FINE if claim.bias == "none" else NOISE
    says = (
        f"its claim: fixed point {claim.fixed_point}; objective {claim.objective}; bias {claim.bias}; data {claim.data}"
    )
    proof = f"tiltlm engines {name} --prove checks it"
    return Finding("engine", says.replace("pi0", "π0"), severity, f"{claim.source}; {proof}" if claim.source else proof)


# --- which settings stand behind a field of the objective ---

_BEHIND = {
    "reward_kl": ("kl", "place", "level", "kl_coefficient"),
    "loss_kl": ("kl", "place", "level", "kl_coefficient"),
    "baseline": ("advantage", "baseline", "group"),
    "scale": ("advantage", "scale", "group"),
    "length": ("aggregate",),
    "gamma": ("gamma",),
    "lam": ("lam",),
    "clip": ("clip_low", "clip_high"),
    "importance": ("importance",),
    "updates": ("updates",),
    "kl_target": ("controller", "kl_target"),
    "coefficient": ("kl_coefficient", "advantage"),
}
"""The engines' settings behind each field, as far as an engine has them."""


def _origin(s: Settings, engine: Any, given: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    fields = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}

    def shown(*names: str) -> tuple[str, ...]:
        return tuple(
            f"{name} = {_plain(fields[name])}{given.get(name, ' (default)')}" for name in names if name in fields
        )

    chosen = s.shown(*(key for key in TEMPERATURES if s[key] is not None))
    return {field: shown(*names) for field, names in _BEHIND.items()} | {
        "beta": (*chosen, *shown("kl", "kl_coefficient")),
        "planned": chosen,
        "sampling": s.shown("temperature"),
        "on_error": s.shown("on_error"),
        "source": s.shown(*(key for key in SOURCES if s[key])),
        "engine": s.shown("engine"),
    }


def _plain(value: Any) -> str:
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value:g}" if isinstance(value, float) else str(value)
