"""How a recipe trains: the adapter, and the loop's settings."""

from __future__ import annotations

from tiltlm.inference.fit import Training
from tiltlm.lm.adapters import LoRA
from tiltlm.workflow.recipe import Recipe


def lora_of(recipe: Recipe) -> LoRA | None:
    """The adapter to train; None trains all weights."""
    r = recipe
    return LoRA(r.lora_r, r.lora_alpha, tuple(r.lora_targets) or "all-linear") if r.lora_r else None


def training_of(recipe: Recipe) -> Training:
    """The loop's settings."""
    names = set(Training.__dataclass_fields__)
    return Training(**{name: value for name, value in recipe.model_dump().items() if name in names})
