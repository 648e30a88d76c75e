"""What distribution an RL configuration really converges to.

explain("recipes/film.yaml")              # one of our recipes
explain("grpo.yaml")                      # a TRL or verl file, or an OpenRLHF or verl command line
explain(GRPOConfig(beta=0.04))            # the object itself
print(explain({"engine": "rloo", "beta": 0.1}))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tiltlm.errors import InputError
from tiltlm.explanation.closed_form import Law, law_of
from tiltlm.explanation.fixed_points import RestPoints, rest_points
from tiltlm.explanation.implied import implied_law
from tiltlm.explanation.objective import Claimed, KLTerm, Objective, PairLoss, Sampling
from tiltlm.explanation.readers import openrlhf, ours, trl, verl
from tiltlm.explanation.readers.reading import Reading
from tiltlm.explanation.rules.finding import Finding
from tiltlm.explanation.verdict import Explanation, verdict
from tiltlm.posterior.exact import Exact

FORMATS: Mapping[str, Callable[[Any], Reading]] = {
    "tiltlm": ours.read,
    "trl": trl.read,
    **{f"trl-{kind}": (lambda config, kind=kind: trl.read(config, kind)) for kind in trl.TABLES},
    "openrlhf": openrlhf.read,
    "verl": verl.read,
}
_ON_LINES = {"openrlhf", "verl"}
"""Formats that may be command lines."""


def explain(config: Any, *, format: str | None = None, p0: float = 0.2, exact: Exact | None = None) -> Explanation:  # noqa: A002
    """Say what a configuration converges to.

    Args:
        config: a file (YAML, JSON or a shell script), a mapping, a command line as text or words, a TRL configuration object,
            or an `Objective`.
        format: one of `FORMATS`; found out from the configuration by default.
        p0: the prior's success probability, for numbers about rewards of 0 or 1.
        exact: a language that can be listed; the law is then found on it, and its figures are in `numbers`.

    Raises:
        InputError: if it is none of these, or holds a value of the wrong kind.
    """
    if isinstance(config, Objective | PairLoss):
        return verdict(Reading(config, config.beta, "", {}), p0, exact)
    if format is not None and format not in FORMATS:
        raise InputError(f"format is {format!r}; choose {', '.join(FORMATS)}")
    content = _content(config)
    found = format or detect(content)
    if found is None:
        raise InputError(
            f"{_called(config)} is not a configuration of TiltLM, TRL, OpenRLHF or verl that can be recognised; "
            f"say which it is with format, one of {', '.join(FORMATS)}"
        )
    if isinstance(content, str | list) and found not in _ON_LINES:
        raise InputError(f"format is {found!r}, but {_called(config)} is not a mapping of settings; give YAML or JSON")
    if not isinstance(content, Mapping) and found == "tiltlm":
        raise InputError(
            f"{_called(config)} is not a mapping with an engine; give one, such as {{'engine': 'rloo', 'beta': 0.1}}"
        )
    if isinstance(content, Mapping) and found == "openrlhf":
        raise InputError(
            f"format is 'openrlhf', but {_called(config)} is not a command line; give the line or its script"
        )
    return verdict(FORMATS[found](content), p0, exact)


def detect(content: Any) -> str | None:
    """The format of what was given, by the names in it; None if nothing is familiar."""
    if ours.is_config(content):
        return "tiltlm"
    if isinstance(content, str | list | Mapping) and verl.is_config(content):
        return "verl"
    if isinstance(content, str | list):
        return "openrlhf" if openrlhf.is_command(content) else None
    return "trl" if trl.is_config(content) else None


def _content(config: Any) -> Any:
    """A file's content: a mapping, or a script as text. Anything else as it is."""
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [str(word) for word in config]
    if isinstance(config, str) and ("\n" in config or " " in config.strip()) and not Path(config[:200]).is_file():
        return config
    if not isinstance(config, str | Path):
        return config
    path = Path(config)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"{str(config)!r} cannot be read ({reason}); give a YAML, JSON or shell file") from None
    if path.suffix in {".sh", ".bash", ".txt", ""}:
        return text
    try:
        parsed = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        where = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path.name!r} is not {'JSON' if path.suffix == '.json' else 'YAML'} ({where}); mend the file"
        ) from None
    if not isinstance(parsed, Mapping):
        raise InputError(f"{path.name!r} holds no settings; give a mapping of field to value")
    return parsed


def _called(config: Any) -> str:
    if isinstance(config, str | Path):
        text = str(config)
        return repr(text if len(text) < 60 else f"{text[:57]}...")
    return f"a {type(config).__name__}"


__all__ = [
    "FORMATS",
    "Claimed",
    "Explanation",
    "Finding",
    "KLTerm",
    "Law",
    "Objective",
    "PairLoss",
    "RestPoints",
    "Sampling",
    "detect",
    "explain",
    "implied_law",
    "law_of",
    "rest_points",
]
