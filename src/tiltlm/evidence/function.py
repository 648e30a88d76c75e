"""Calling a user's function of prompts and completions: what goes in, and what may come out.

Rewards, constraints and moments are all such functions; the signature is TRL's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.running.calls import NotAsked, Request, TextFunction, answers_of, label_of, told
from tiltlm.evidence.running.tally import count, timed
from tiltlm.evidence.running.worker import Unusable
from tiltlm.records import Draws

OnError = Literal["fail", "drop"]

Fault = Callable[[Any], str | None]
"""What is wrong with one returned value, as the end of a sentence; None if nothing is."""


def values_of(
    fn: TextFunction, draws: Draws, kind: str, label: str, fault: Fault, on_error: OnError = "fail"
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """Call `fn` on the draws and check what it returns.

    Args:
        kind, label: what the function is and is called, for messages: "reward", "length".
        fault: judges each value; see `number_fault` and `truth_fault`.
        on_error: "fail" raises at the first completion with a fault, "drop" leaves it out.

    Returns:
        The values in float64, NaN where dropped; and which completions were kept.

    Raises:
        InputError: naming the completion and its fault; or if the function does not return one value a completion.
    """
    who = f"{kind} {label!r}"
    returned = _returned(fn, draws, who, label, on_error)
    faults = [told(value) if isinstance(value, Exception) else fault(value) for value in returned]
    wrong = next((row for row, found in enumerate(faults) if found and not isinstance(returned[row], NotAsked)), None)
    count("failed", sum(isinstance(value, Exception) for value in returned))
    if wrong is not None and on_error == "fail":
        columns = f" (the prompts' columns are {', '.join(draws.prompts.columns) or 'none'})"
        raise InputError(
            f"{who} {faults[wrong]} for completion {draws.texts[wrong]!r:.120}"
            f"{columns if isinstance(returned[wrong], KeyError) else ''}; mend the {kind}, or set "
            f"on_error: drop to leave such completions out"
        )
    kept = torch.tensor([found is None for found in faults], dtype=torch.bool)
    numbers = [float(value) if found is None else math.nan for value, found in zip(returned, faults, strict=True)]
    return torch.tensor(numbers, dtype=torch.float64), kept


def number_fault(bounds: tuple[float, float] | None) -> Fault:
    """A value must be a finite number, within the bounds if there are any."""

    def fault(value: Any) -> str | None:
        if value is None:
            return "is None"
        try:
            number = float(value)
        except Exception:  # a user's class may raise anything here
            return f"is {_written(value)}, which is not a number,"
        if not math.isfinite(number):
            return f"is {number}"
        if bounds is not None and not bounds[0] - 1e-9 <= number <= bounds[1] + 1e-9:
            return f"is {number}, outside its declared bounds [{bounds[0]}, {bounds[1]}],"
        return None

    return fault


def truth_fault(value: Any) -> str | None:
    """A value must be true or false; 1 and 0 will do."""
    try:
        known = value in (0, 1)
    except Exception:  # arrays have no single truth value, and a user's class may raise anything here
        known = False
    return None if known else f"is {_written(value)}, which is neither true nor false,"


def _written(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except Exception:
        return f"a {type(value).__name__}"


def _returned(fn: TextFunction, draws: Draws, who: str, label: str, on_error: OnError) -> Sequence[Any]:
    """What the function says of each completion: a value, or the exception that it raised for it."""
    if not len(draws):
        return []
    with timed(label):
        request = Request(_arguments(fn, draws, who), len(draws), stop=on_error == "fail")
        try:
            return answers_of(fn, request)
        except Unusable as error:
            raise InputError(f"{who} {error}") from error


def _arguments(fn: TextFunction, draws: Draws, who: str) -> dict[str, Any]:
    index = draws.prompt_index.tolist()
    texts = [draws.prompts.texts[i] for i in index]
    columns = {name: [values[i] for i in index] for name, values in draws.prompts.columns.items()}
    chat = bool(texts) and not isinstance(texts[0], str)
    available: Mapping[str, Any] = {
        **columns,
        "prompts": [list(text) if chat else text for text in texts],
        "completions": [[{"role": "assistant", "content": t}] if chat else t for t in draws.texts],
        "completion_ids": [ids[keep].tolist() for ids, keep in zip(draws.tokens, draws.mask, strict=True)],
    }
    parameters = inspect.signature(fn).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in named if p.default is p.empty]
    missing = [name for name in needed if name not in available]
    if missing:
        raise InputError(
            f"{who} asks for {missing[0]!r}, which is not among its arguments (prompts, completions, "
            f"completion_ids) nor the prompt file's columns ({', '.join(columns) or 'none'})"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(available)
    return {p.name: available[p.name] for p in named if p.name in available}


__all__ = ["Fault", "OnError", "TextFunction", "label_of", "number_fault", "truth_fault", "values_of"]
