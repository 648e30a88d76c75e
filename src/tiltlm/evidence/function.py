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
from tiltlm.records import Draws

TextFunction = Callable[..., Sequence[float]]
"""`fn(prompts=…, completions=…, completion_ids=…, **columns)`, by name, any of them -> one value a completion."""

OnError = Literal["fail", "drop"]

Fault = Callable[[Any], str | None]
"""What is wrong with one returned value, as the end of a sentence; None if nothing is."""


def label_of(fn: TextFunction) -> str:
    """What a function is called where the user gave it no name: its `label` if it has one, as named parts do."""
    label = getattr(fn, "label", None)
    return label if isinstance(label, str) else getattr(fn, "__name__", type(fn).__name__)


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
    returned = _returned(fn, draws, who, on_error)
    faults = [_raised(value) if isinstance(value, Exception) else fault(value) for value in returned]
    wrong = next((row for row, found in enumerate(faults) if found is not None), None)
    if wrong is not None and on_error == "fail":
        raise InputError(
            f"{who} {faults[wrong]} for completion {draws.texts[wrong]!r:.120}; mend the {kind}, or set "
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
        except (TypeError, ValueError):
            return f"is {value!r:.60}, which is not a number,"
        if not math.isfinite(number):
            return f"is {number}"
        if bounds is not None and not bounds[0] - 1e-9 <= number <= bounds[1] + 1e-9:
            return f"is {number}, outside its declared bounds [{bounds[0]}, {bounds[1]}],"
        return None

    return fault


def truth_fault(value: Any) -> str | None:
    """A value must be true or false; 1 and 0 will do."""
    try:
        return None if value in (0, 1) else f"is {value!r:.60}, which is neither true nor false,"
    except (TypeError, ValueError, RuntimeError):  # arrays have no single truth value
        return f"is {value!r:.60}, which is neither true nor false,"


def _returned(fn: TextFunction, draws: Draws, who: str, on_error: OnError) -> Sequence[Any]:
    """What the function says of each completion: a value, or the exception that it raised for it."""
    if not len(draws):
        return []
    try:
        returned: Any = fn(**_arguments(fn, draws, who))
    except InputError:
        raise
    except Exception as error:
        return _one_by_one(fn, draws, who, on_error, error)
    if isinstance(returned, torch.Tensor):
        raise InputError(
            f"{who} returned a tensor of shape {tuple(returned.shape)}; return a list with one number a completion, for "
            f"example rewards.tolist()"
        )
    if hasattr(returned, "tolist"):  # arrays and series
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise InputError(f"{who} returned {type(returned).__name__}; return a list with one number a completion")
    if len(returned) != len(draws):
        raise InputError(f"{who} returned {len(returned)} values for {len(draws)} completions; return one a completion")
    return returned


def _one_by_one(fn: TextFunction, draws: Draws, who: str, on_error: OnError, error: Exception) -> Sequence[Any]:
    """The function raised for a batch: find the completions at fault (the first of them, if that is the end)."""
    values: list[Any] = []
    for row in range(len(draws)):
        try:
            (value,) = fn(**_arguments(fn, draws.select(torch.tensor([row])), who))
        except Exception as own:
            value = own
        values.append(value)
        if isinstance(value, Exception) and on_error == "fail":
            return [*values, *[0.0] * (len(draws) - len(values))]
    if not any(isinstance(value, Exception) for value in values):
        raise InputError(
            f"{who} {_raised(error)} for {len(draws)} completions together, though for none of them alone; mend it"
        ) from error
    return values


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
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(available)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    missing = [name for name in needed if name not in available]
    if missing:
        raise InputError(
            f"{who} asks for {missing[0]!r}, which is not among its arguments (prompts, completions, "
            f"completion_ids) nor the prompt file's columns ({', '.join(columns) or 'none'})"
        )
    return {name: available[name] for name in names if name in available}


def _raised(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"raised {type(error).__name__} ({message})" if message else f"raised {type(error).__name__}"
