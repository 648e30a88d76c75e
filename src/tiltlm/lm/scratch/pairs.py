"""Sources and targets as a model reads them: token ids and frozen features, batched by length."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiltlm.errors import InputError

IGNORED = -100
"""The label that cross-entropy passes over."""
IMAGES = 32
"""Pictures in the encoder at a time."""
SHUFFLED_TOGETHER = 64
"""Batches whose rows are sorted by length together; more would make batches alike from epoch to epoch."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Sources and targets.

    Attributes:
        sources: each source's token ids, or the frozen encoder's states of all pictures.
        targets: each target's token ids, its end included.
        pad: the id that pads.
    """

    sources: Sequence[Sequence[int]] | Float[Tensor, "N P D"]
    targets: Sequence[Sequence[int]]
    pad: int

    def __len__(self) -> int:
        return len(self.targets)

    def inputs(self, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
        """What the model conditions on, by the names of its `forward` and `generate`."""
        if isinstance(self.sources, Tensor):
            from transformers.modeling_outputs import BaseModelOutput

            states = self.sources[torch.tensor(list(rows))].float().to(device)
            return {"encoder_outputs": BaseModelOutput(last_hidden_state=cast("Any", states))}
        ids, mask = _padded([self.sources[row] for row in rows], self.pad)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def labels(self, rows: Sequence[int]) -> Int[Tensor, "B T"]:
        """The targets' ids, `IGNORED` where there is none."""
        ids, mask = _padded([self.targets[row] for row in rows], self.pad)
        return ids.masked_fill(mask == 0, IGNORED)

    def cost(self, row: int) -> int:
        """Tokens of a row, source and target."""
        source = 0 if isinstance(self.sources, Tensor) else len(self.sources[row])
        return source + len(self.targets[row])

    def batches(self, tokens: int, rng: Generator | None = None) -> list[list[int]]:
        """Rows in batches of at most `tokens`, padding included; rows of like length go together.

        With a generator the rows come in random order, as do the batches; without one they come by length.
        """
        order = list(range(len(self))) if rng is None else torch.randperm(len(self), generator=rng).tolist()
        mean = max(1, sum(map(self.cost, order)) // max(1, len(order)))
        together = len(order) if rng is None else max(1, SHUFFLED_TOGETHER * tokens // mean)
        batches: list[list[int]] = []
        for start in range(0, len(order), together):
            batch: list[int] = []
            for row in sorted(order[start : start + together], key=self.cost):
                if batch and (len(batch) + 1) * self.cost(row) > tokens:
                    batches.append(batch)
                    batch = []
                batch.append(row)
            batches.append(batch)
        if rng is None:
            return batches
        return [batches[k] for k in torch.randperm(len(batches), generator=rng).tolist()]


def token_loss(
    model: PreTrainedModel, pairs: Pairs, rows: Sequence[int], smoothing: float = 0.0
) -> tuple[Float[Tensor, ""], int]:
    """Σ −log p(target | source) over the rows' tokens, in nats, and how many tokens there are.

    Args:
        smoothing: the share of each label that goes to all tokens alike (Szegedy et al. 2016).
    """
    known, labels = cast("Any", model), pairs.labels(rows).to(model.device)
    logits = known(
        **pairs.inputs(rows, model.device),
        decoder_input_ids=known.prepare_decoder_input_ids_from_labels(labels),
        use_cache=False,
    ).logits
    loss = cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )
    return loss, int((labels != IGNORED).sum())


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 where the hardware has them; weights stay in float32."""
    able = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=able)


def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    longest: int,
    tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's most likely text, token by token, of each source, in order.

    Args:
        longest: most tokens of a text.
        tokens: of sources, in the model at a time.
    """
    found = [""] * len(pairs)
    known = cast("Any", model)
    known.eval()
    for rows in pairs.batches(tokens):
        with torch.inference_mode():
            ids = known.generate(
                **pairs.inputs(rows, model.device), max_new_tokens=longest, do_sample=False, num_beams=1
            )
        for row, text in zip(rows, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            found[row] = text
        if progress is not None:
            progress(len(rows))
    return found


def read_image(value: Any, row: int, column: str = "image") -> Image.Image:
    """A picture of a row: bytes of a file (PNG and the like), a path, `datasets`' {"bytes", "path"}, or a PIL image.

    Raises:
        InputError: naming the row, if it is none.
    """
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        source = io.BytesIO(value) if isinstance(value, bytes) else Path(value)
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError, TypeError, ValueError, Image.DecompressionBombError) as error:
        shown = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)[:80]
        raise InputError(
            f"{column} of row {row + 1} is {shown} and no picture that can be read "
            f"({type(error).__name__}); give the bytes or the path of a PNG or JPEG file"
        ) from error


def image_states(
    encoder: PreTrainedModel,
    processor: Any,
    images: Sequence[Any],
    progress: Callable[[int], None] | None = None,
) -> Float[Tensor, "N P D"]:
    """The frozen encoder's states of each picture, computed once; half precision, for there are many."""
    parts = []
    for start in range(0, len(images), IMAGES):
        some = [read_image(value, start + k) for k, value in enumerate(images[start : start + IMAGES])]
        pixels = processor(some, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            states = cast("Any", encoder)(pixel_values=pixels.to(encoder.device)).last_hidden_state
        parts.append(states.cpu().half())
        if progress is not None:
            progress(len(some))
    return torch.cat(parts).clone()


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
