"""What draws a recipe's completions, where that is not our own sampler."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from tiltlm.errors import InputError
from tiltlm.lm.generators.in_process import VLLM
from tiltlm.lm.generators.protocol import Generator
from tiltlm.lm.generators.server import VLLMServer
from tiltlm.mismatch import Tolerance
from tiltlm.workflow.recipe import Recipe


def generator_of(recipe: Recipe) -> Generator | None:
    """The generator that the recipe asks for; None leaves drawing to our sampler.

    Raises:
        InputError: for a generator that there is none of, and for settings that it does not have.
    """
    name, options = recipe.generator, dict(recipe.generator_options)
    if name is None:
        if options:
            raise InputError(
                f"generator_options are {options}, but generator is missing; give --generator, or leave them out"
            )
        return None
    if "tolerance" in options:
        options["tolerance"] = _tolerance(options["tolerance"])
    if name == "vllm":
        return VLLM(**options)
    if not name.startswith(("http://", "https://")):
        raise InputError(
            f"generator is {name!r}; write vllm, or the address of a vllm serve, such as http://localhost:8000"
        )
    known = [parameter for parameter in inspect.signature(VLLMServer).parameters if parameter != "url"]
    unknown = next((option for option in options if option not in known), None)
    if unknown is not None:
        raise InputError(f"generator_options has {unknown!r}, which a server has not; it has {', '.join(known)}")
    return VLLMServer(name, **options)


def _tolerance(value: Any) -> Tolerance:
    known = Tolerance.__dataclass_fields__
    if not isinstance(value, Mapping) or not set(value) <= set(known):
        raise InputError(f"tolerance is {value!r}; write it as {{{', '.join(f'{name}: …' for name in known)}}}")
    return Tolerance(**value)
