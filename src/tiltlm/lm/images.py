"""Images in prompts: from whatever a row holds to what the model's own processor makes of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.records import Text

if TYPE_CHECKING:
    from PIL.Image import Image

OBJECT = ("image", "path", "bytes")
"""Keys under which a part of a message, {"type": "image", ...}, may hold its image."""


def open_image(value: Any, number: int) -> Image:
    """An image in RGB, upright.

    Args:
        value: a path, encoded bytes, a PIL image, an array of uint8 (height, width) or (height, width, channels), or a mapping with
            `bytes` or `path`, as `datasets` has it.
        number: of the prompt, for the error message.

    Raises:
        InputError: if it is none of these, or does not decode.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError("images need pillow; run: pip install 'tiltlm[images]'") from error
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    what = f"image {str(value)!r}" if isinstance(value, str | Path) else f"an image ({type(value).__name__})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Exif that is out of order and the like; the pixels are what counts
            if isinstance(value, str | Path):
                value = Path(value).expanduser().read_bytes()
            if isinstance(value, bytes | bytearray):
                value = Image.open(io.BytesIO(value))
            elif hasattr(value, "__array__") and not isinstance(value, Image.Image):
                value = Image.fromarray(torch.as_tensor(value).cpu().numpy())
            if not isinstance(value, Image.Image):
                raise TypeError("no path, bytes, image or array")
            return ImageOps.exif_transpose(value).convert("RGB")
    except FileNotFoundError as error:
        raise InputError(
            f"prompt {number}: there is no {what}; check the path, relative to the prompts' file"
        ) from error
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"prompt {number}: {what} cannot be read ({reason}); give a path, bytes, a PIL image or an array of uint8"
        ) from error


def image_name(value: Any, number: int) -> str:
    """What an image is called in tables: its path, or its place."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return str(value) if isinstance(value, str | Path) and value != "" else f"image {number}"


def values_of(value: Any) -> list[Any]:
    """The images of a row's column: none, one, or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def pixels(processor: Any, image: Image, number: int) -> dict[str, Tensor]:
    """What an encoder of images reads, one row."""
    processor = getattr(processor, "image_processor", processor)
    return _processed(processor, number, images=[image])


def read_with_text(
    processor: Any, text: str, images: Sequence[Image], number: int, *, special: bool
) -> tuple[list[int], dict[str, Tensor]]:
    """The token ids of a text with images in it, and what the model reads beside them, one row.

    Args:
        special: add the tokenizer's special tokens; a chat template has written them already.
    """
    out = _processed(processor, number, text=[text], images=[list(images)], add_special_tokens=special)
    ids = out.pop("input_ids")[0].tolist()
    out.pop("attention_mask", None)
    return ids, out


def with_images(messages: Sequence[Mapping[str, Any]], extra: Sequence[Any]) -> tuple[Text, list[Any]]:
    """A conversation with plain places for images, and the images in their order.

    Args:
        extra: images of the row's own column. They fill the places that hold none, or begin the first message of the user.
    """
    left, found, turns = list(extra), [], []
    parts = [_parts(message["content"]) for message in messages]
    places = any(part.get("type") == "image" for some in parts for part in some)
    if left and not places:
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
        parts[first] = [*({"type": "image"} for _ in left), *parts[first]]
    for message, some in zip(messages, parts, strict=True):
        content = []
        for part in some:
            if part.get("type") != "image":
                content.append(part)
                continue
            held = next((part[key] for key in OBJECT if part.get(key) is not None), None)
            if held is not None:
                found.append(held)
            elif left:
                found.append(left.pop(0))
            content.append({"type": "image"})
        turns.append({**message, "content": content})
    return tuple(turns), [*found, *left]


def empty_like(tensor: Tensor, name: str, tokens: int) -> Tensor:
    """What a prompt without images has in place of `tensor`: nothing, or a 0 for each of its tokens."""
    return tensor.new_zeros((1, tokens) if name.endswith("token_type_ids") else (0, *tensor.shape[1:]))


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [dict(part) for part in content or []]


def _processed(processor: Any, number: int, **arguments: Any) -> dict[str, Tensor]:
    try:
        out = processor(**arguments, return_tensors="pt")
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"prompt {number} is refused by the model's processor ({reason}); give as many images as the text has places for"
        ) from error
    return {name: value for name, value in out.items() if isinstance(value, Tensor)}
