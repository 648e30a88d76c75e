"""Recipes from YAML files and flags, and what is wrong with them in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tiltlm.errors import InputError
from tiltlm.workflow.beside import PARTS, beside
from tiltlm.workflow.recipe import MomentSpec, Recipe


def read_recipe(file: Path | None, flags: Mapping[str, Any], kind: type[Recipe] = Recipe) -> Recipe:
    """A recipe from a YAML file, with flags on top.

    Paths in the file (prompts, reward, adapters) are relative to the file if they exist there, else to the working folder.

    Raises:
        InputError: naming the key, its value and the remedy.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = {name: beside(file, name, value) for name, value in _yaml(file).items()}
    given = {name: value for name, value in flags.items() if value is not None}
    choices = {"beta", "kl_budget", "reward_goal"}
    if given.keys() & choices:  # a flag replaces whichever way the file chose
        values = {name: value for name, value in values.items() if name not in choices}
    try:
        if "options" in given:
            given["options"] = {**values.get("options", {}), **given["options"]}
        return kind.model_validate(values | given)
    except ValidationError as error:
        raise InputError(_sentence(error, file, given)) from error


def quickened(recipe: Recipe) -> Recipe:
    """The recipe with the changes that its `quick` asks for, in a folder of its own.

    Raises:
        InputError: for a change that is no key of a recipe.
    """
    values = {**recipe.model_dump(), "out": f"{recipe.out}-quick", **recipe.quick, "quick": {}}
    return _validated(recipe, values, "quick")


def for_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe as its `methods` has it for one of them.

    Raises:
        InputError: for a change that is no key of a recipe.
    """
    return _validated(recipe, {**recipe.model_dump(), **recipe.methods.get(method, {})}, f"methods: {method}")


def _validated(recipe: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    try:
        return type(recipe).model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {_sentence(error, None, {})}") from error


class _Once(yaml.SafeLoader):
    """YAML in which a key that is there twice is a mistake, and not the last one's."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [str(key.value) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} is there twice in line {node.start_mark.line + 1} and after")
        return node


def _yaml(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(file.read_text(), _Once)
    except OSError as error:
        raise InputError(f"recipe {str(file)!r} cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {str(file)!r} is not YAML ({' '.join(str(error).split())[:160]}); mend it") from error
    if not isinstance(loaded, dict):
        raise InputError(f"recipe {str(file)!r} holds no keys; write lines like 'model: smollm2-135m-instruct'")
    return {str(key): value for key, value in loaded.items()}


def _sentence(error: ValidationError, file: Path | None, flags: Mapping[str, Any]) -> str:
    """The first fault as one sentence."""
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])  # a misspelt key is missing as well
    path = [str(part) for part in fault["loc"]]
    where = ".".join(path)
    if path and path[0] in PARTS:  # one fault for each thing that it might have been
        where = path[0]
    source = f" in {file}" if file is not None and where not in flags else ""
    fields = Recipe.model_fields if len(path) < 2 else MomentSpec.model_fields  # the only nested keys
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
        return f"unknown key {where!r}{source}; {hint}"
    if fault["type"] == "missing" and len(path) > 1:
        return f"{where} is missing{source}; write a moment as '- {{function: file.py:function, mean: 0.5}}'"
    if fault["type"] == "missing":
        return f"{where} is missing{source}; give --{where.replace('_', '-')} or write '{where}: …' into the recipe"
    if fault["type"] == "value_error":
        return str(fault["msg"]).removeprefix("Value error, ").replace(" is missing;", f" is missing{source};")
    description = Recipe.model_fields[path[0]].description
    if where in PARTS:
        return (
            f"{where} is {flags.get(where, fault['input'])!r:.80}{source}; give file.py:function, or a list of parts, each "
            f"with 'part: NAME' or 'function: file.py:f'"
        )
    return f"{where} is {fault['input']!r}{source}: {fault['msg'][0].lower()}{fault['msg'][1:]} ({description})"
