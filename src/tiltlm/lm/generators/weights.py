"""A view's weights for a program that loads them from a folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError

from tiltlm.errors import InputError

if TYPE_CHECKING:
    from tiltlm.lm.view import View

BASE = "base"


@dataclass(frozen=True)
class Weights:
    """What a view draws from: the model as it was loaded, that with an adapter, or other weights of all its layers.

    Attributes:
        name: "base", or a hash of the weights: the same weights have the same name, in every process.
        rank: of the adapter; 0 without.
    """

    name: str
    kind: Literal["base", "adapter", "full"]
    rank: int = 0

    @staticmethod
    def of(view: View) -> Weights:
        """The weights as they are now."""
        if view.adapter is not None:
            parameters = view.body.adapters.parameters(view.adapter)
            rank = max(value.shape[0] for name, value in parameters.items() if "lora_A" in name)
            return Weights(_hash(parameters, view.body.adapters.scale(view.adapter)), "adapter", rank)
        prior = getattr(view, "prior", None)
        if prior is None or prior.body is view.body:
            return Weights(BASE, "base")
        return Weights(_hash(dict(view.body.model.named_parameters())), "full")

    def write(self, view: View, root: Path) -> Path:
        """The folder in `root` that holds these weights, written if it is not there; what is there is always whole.

        Raises:
            InputError: if it cannot be written.
        """
        folder = root / self.name
        if folder.is_dir():
            return folder
        partial = root / f".{self.name}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if self.kind == "adapter":
                assert view.adapter is not None
                view.body.adapters.save(view.adapter, partial)
            else:
                view.body.model.save_pretrained(partial)
                view.body.tokenizer.save_pretrained(partial)
            partial.rename(folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"folder {str(root)!r} cannot be written ({reason}); give the generator a folder that can"
            ) from error
        return folder


def forget(root: Path, name: str | None) -> None:
    """Remove what `Weights.write` wrote under a name. For the base it writes nothing: a folder of that name is somebody's own."""
    if name not in (None, BASE):
        shutil.rmtree(root / name, ignore_errors=True)


def _hash(parameters: Mapping[str, torch.Tensor], scale: float = 1.0) -> str:
    digest = hashlib.blake2b(repr(scale).encode(), digest_size=8)
    for name, value in parameters.items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
