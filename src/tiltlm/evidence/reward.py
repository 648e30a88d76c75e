"""`Reward`: any function of prompts and completions as evidence."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tiltlm.errors import InputError
from tiltlm.evidence.algebra import Algebra
from tiltlm.records import Draws, Likelihood

RewardFunction = Callable[..., Sequence[float]]


@dataclass(frozen=True)
class Reward(Algebra):
    """A reward function at a temperature: the evidence r / beta.

    The function is called as TRL calls it, `fn(prompts=…, completions=…, completion_ids=…, **columns)`, and returns
    one number a completion. It gets those of the arguments that it names (all of them if it takes `**kwargs`). For
    conversational prompts both prompts and completions come as lists of messages.

    Attributes:
        fn: the function.
        beta: temperature in reward units per nat; halving it doubles the evidence.
        bounds: smallest and largest reward the function can return. They make rejection exact and give the
            certificate its upper side; a value outside them is an error, because then they were not bounds.
        name: how the reward is called in logs; the function's name by default.
        on_error: what to do with a completion for which the function raises, or whose reward is missing, no finite number
            or out of bounds: "fail" stops with the completion's text, "drop" leaves the completion out and counts it. The
            target is then conditioned on having a reward. (What does not return one value a completion always fails.)
    """

    fn: RewardFunction
    beta: float = 1.0
    bounds: tuple[float, float] | None = None
    name: str = ""
    on_error: Literal["fail", "drop"] = "fail"

    def __post_init__(self) -> None:
        if not isinstance(self.beta, int | float) or not 0 < self.beta < math.inf:
            raise InputError(
                f"beta is {self.beta!r}; it is a temperature in reward units per nat and must be a positive number"
            )
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise InputError(f"bounds are {self.bounds}; give them as (smallest, largest), or None if unknown")

    @property
    def label(self) -> str:
        return self.name or getattr(self.fn, "__name__", type(self.fn).__name__)

    @property
    def identity(self) -> str:
        """Tells this evidence from another; not by its code, which may be mended between a crash and --resume."""
        return f"{self.label} {self.bounds} {self.on_error}"

    def at(self, beta: float) -> Reward:
        """The same reward at another temperature."""
        return replace(self, beta=beta)

    def log_likelihood(self, draws: Draws) -> Likelihood:
        """r / beta of each completion, checked; see `on_error`."""
        returned = self._returned(draws)
        faults = [self._fault(value) for value in returned]
        wrong = next((row for row, fault in enumerate(faults) if fault is not None), None)
        if wrong is not None and self.on_error == "fail":
            raise InputError(
                f"reward {self.label!r} {faults[wrong]} for completion {draws.texts[wrong]!r:.120}; mend the reward, or set "
                f"on_error: drop to leave such completions out"
            )
        kept = torch.tensor([fault is None for fault in faults], dtype=torch.bool)
        numbers = [float(value) if fault is None else math.nan for value, fault in zip(returned, faults, strict=True)]
        reward = torch.tensor(numbers, dtype=torch.float64)
        return Likelihood(reward / self.beta, {self.label: reward}, kept)

    def _returned(self, draws: Draws) -> Sequence[Any]:
        """What the function says of each completion: a value, or the exception that it raised for it."""
        if not len(draws):
            return []
        try:
            returned: Any = self.fn(**self._arguments(draws))
        except InputError:
            raise
        except Exception as error:
            return self._one_by_one(draws, error)
        if isinstance(returned, torch.Tensor):
            raise InputError(
                f"reward {self.label!r} returned a tensor of shape {tuple(returned.shape)}; return a list with one number a "
                f"completion, for example rewards.tolist()"
            )
        if hasattr(returned, "tolist"):  # arrays and series
            returned = returned.tolist()
        if not isinstance(returned, Sequence) or isinstance(returned, str):
            raise InputError(
                f"reward {self.label!r} returned {type(returned).__name__}; return a list with one number a completion"
            )
        if len(returned) != len(draws):
            raise InputError(
                f"reward {self.label!r} returned {len(returned)} values for {len(draws)} completions; return one a completion"
            )
        return returned

    def _one_by_one(self, draws: Draws, error: Exception) -> Sequence[Any]:
        """The function raised for a batch: find the completions at fault (the first of them, if that is the end)."""
        values: list[Any] = []
        for row in range(len(draws)):
            try:
                (value,) = self.fn(**self._arguments(draws.select(torch.tensor([row]))))
            except Exception as own:
                value = own
            values.append(value)
            if isinstance(value, Exception) and self.on_error == "fail":
                return [*values, *[0.0] * (len(draws) - len(values))]
        if not any(isinstance(value, Exception) for value in values):
            raise InputError(
                f"reward {self.label!r} {_raised(error)} for {len(draws)} completions together, though for none of them alone; "
                f"mend the reward"
            ) from error
        return values

    @property
    def log_bounds(self) -> tuple[float, float] | None:
        """The bounds of r / beta, None where the reward's bounds are unknown."""
        return None if self.bounds is None else (self.bounds[0] / self.beta, self.bounds[1] / self.beta)

    def _fault(self, returned: Any) -> str | None:
        """What is wrong with a completion's reward, None if nothing is."""
        if isinstance(returned, Exception):
            return _raised(returned)
        if returned is None:
            return "is None"
        try:
            value = float(returned)
        except (TypeError, ValueError):
            return f"is {returned!r:.60}, which is not a number,"
        if not math.isfinite(value):
            return f"is {value}"
        if self.bounds is not None and not self.bounds[0] - 1e-9 <= value <= self.bounds[1] + 1e-9:
            return f"is {value}, outside its declared bounds [{self.bounds[0]}, {self.bounds[1]}],"
        return None

    def _arguments(self, draws: Draws) -> dict[str, Any]:
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
        parameters = inspect.signature(self.fn).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return dict(available)
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
        missing = [name for name in needed if name not in available]
        if missing:
            raise InputError(
                f"reward {self.label!r} asks for {missing[0]!r}, which is not among its arguments (prompts, completions, "
                f"completion_ids) nor the prompt file's columns ({', '.join(columns) or 'none'})"
            )
        return {name: available[name] for name in names if name in available}


def _raised(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"raised {type(error).__name__} ({message})" if message else f"raised {type(error).__name__}"
