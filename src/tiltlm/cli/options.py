"""Flags made from the recipe's fields, so that YAML and command line cannot differ."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rich.markup import escape

from tiltlm.errors import InputError
from tiltlm.workflow.recipe import MomentSpec, Recipe
from tiltlm.workflow.recipe_files import read_recipe

Json = Annotated[Path | None, typer.Option("--json", help="also write the result to this file", show_default=False)]
Seed = Annotated[int, typer.Option(help="of everything random", min=0)]

GROUPS = {
    "Prior": (
        "model",
        "prior_adapter",
        "dtype",
        "device",
        "prompts",
        "column",
        "template",
        "columns",
        "chat",
        "max_new_tokens",
        "temperature",
        "stop",
    ),
    "Evidence": (
        "reward",
        "beta",
        "kl_budget",
        "reward_goal",
        "bounds",
        "uncertainty",
        "uncertainty_options",
        "on_error",
        "moments",
        "gold",
    ),
    "Running the reward": (
        "reward_batch",
        "reward_workers",
        "reward_timeout",
        "reward_memory",
        "reward_retries",
        "reward_cache",
    ),
    "Run": ("generator", "generator_options", "out", "seed"),
    "Application": ("test", "completion", "baselines"),
    "Samples": ("samples", "exact_budget"),
    "Training": (
        "engine",
        "options",
        "group",
        "replay",
        "lag",
        "ahead",
        "teacher",
        "data",
        "steps",
        "batch",
        "lr",
        "engine_lr",
        "schedule",
        "warmup",
        "clip",
        "weight_decay",
        "lora_r",
        "lora_alpha",
        "lora_targets",
        "start",
        "micro_tokens",
        "gradient_checkpointing",
        "shard",
        "certify_every",
        "certify_samples",
        "patience",
        "checkpoint_every",
        "gold_every",
        "stop_on_hacking",
        "trackers",
    ),
}
"""The panels of --help, and which fields are in them."""
FILE_ONLY = ("metrics", "methods", "quick")
"""Fields that are too much for a flag."""


def recipe_command(
    *panels: str,
    kind: type[Recipe] = Recipe,
    find: Callable[[Path | None], Path | None] = lambda file: file,
    argument: str = "YAML file; flags go on top",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the argument RECIPE and a flag for every field of the panels; it receives the `Recipe`.

    Fields of other panels keep what the recipe's file says.

    Args:
        find: makes the file of what was given for RECIPE.
        argument: what RECIPE is, for --help.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "recipe"]
        fields = [(panel, name) for panel in panels for name in GROUPS[panel]]

        def run(recipe: Path | None, **values: Any) -> None:
            flags = {name: values.pop(name) for _, name in fields}
            flags = {name: value or None if isinstance(value, list) else value for name, value in flags.items()}
            flags |= {name: pairs(name, given) for name, given in flags.items() if _is_mapping(name) and given}
            command(recipe=read_recipe(find(recipe), flags, kind), **values)

        file = inspect.Parameter(
            "recipe",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[Path | None, typer.Argument(help=argument, show_default=False)],
        )
        parameters = [file, *[_flag(panel, name) for panel, name in fields], *own]
        run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])  # pyright: ignore
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _flag(panel: str, name: str) -> inspect.Parameter:
    field = Recipe.model_fields[name]
    kind = _plain_type(field.annotation)
    shown = "" if field.is_required() or field.default in (None, [], {}) else f" [dim](default: {field.default})[/dim]"
    option = typer.Option(help=f"{escape(field.description or '')}{shown}", rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _is_mapping(name: str) -> bool:
    return typing.get_origin(Recipe.model_fields[name].annotation) is dict


def pairs(name: str, given: list[str]) -> dict[str, Any]:
    """name=value, each value as YAML reads it."""
    pairs = [text.partition("=") for text in given]
    wrong = next((text for text, (key, equals, _) in zip(given, pairs, strict=True) if not key or not equals), None)
    if wrong is not None:
        raise InputError(f"--{name} is {wrong!r}; write it as name=value")
    try:
        return {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise InputError(f"--{name} {given[0]!r} is not a value that YAML can read; put it into quotes") from error


def _plain_type(annotation: Any) -> Any:
    """What Typer understands of a field's type: the first of a union, no constraints, literals as text."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is Annotated:
        return _plain_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is Literal:
        return str
    if typing.get_origin(annotation) is dict or annotation == list[MomentSpec]:
        return list[str]
    return annotation
