"""Translation by any encoder–decoder of transformers: Marian, T5, M2M100, NLLB."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Generator
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tiltlm.errors import InputError, TiltWarning


@dataclass(frozen=True, eq=False)
class Translator:
    """Texts in, translations out.

    Attributes:
        max_new_tokens: longest translation.
        beams: of beam search, which is used without a temperature.
        temperature: sample at this temperature instead, for translations that differ from draw to draw.
        rows: most texts in the model at a time.
        prefix: put before every text, as T5 wants it ("translate English to German: ").
        target_language: the code that many-language models begin a translation with.
        progress: (what, how many) -> a function that is told how many more texts are done.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 256
    beams: int = 4
    temperature: float | None = None
    rows: int = 16
    prefix: str = ""
    target_language: str | None = None
    progress: Callable[[str, int], Callable[[int], None]] | None = None

    def __post_init__(self) -> None:
        if not self.model.config.is_encoder_decoder:
            raise InputError(
                f"{type(self.model).__name__} is no encoder–decoder; give a translation model such as Marian's"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; it must be positive, or None for beam search")

    def __call__(self, texts: Sequence[str], rng: Generator) -> list[str]:
        """A translation of each text; `rng` is for sampling, beam search does not use it."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: less padding
        found = [""] * len(texts)
        self._warn_of_cuts(texts)
        done = None if self.progress is None else self.progress("translations", len(texts))
        seed = int(torch.randint(2**31, (1,), generator=rng))
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed)  # generate() draws from torch's own generator; fork_rng gives it back as it was
            for start in range(0, len(order), self.rows):
                index = order[start : start + self.rows]
                for i, text in zip(index, self._batch([texts[i] for i in index]), strict=True):
                    found[i] = text
                if done is not None:
                    done(len(index))
        return found

    @property
    def _room(self) -> int | None:
        """The model's positions, where it has a limited number."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        tokenizer: Any = self.tokenizer
        room = self._room
        if room is None or max(map(len, texts), default=0) < room:  # a token has at least one character
            return
        cut = sum(
            len(ids) > room for ids in tokenizer([self.prefix + text for text in texts], verbose=False)["input_ids"]
        )
        if cut:
            warnings.warn(
                f"{cut} of {len(texts)} texts are longer than the {room} tokens that the translation model reads, and were cut there; "
                f"leave them out, or split them",
                TiltWarning,
                stacklevel=3,
            )

    def _batch(self, texts: list[str]) -> list[str]:
        tokenizer: Any = self.tokenizer
        room = self._room
        batch = tokenizer(
            [self.prefix + text for text in texts],
            padding=True,
            truncation=room is not None,
            max_length=room,
            return_tensors="pt",
        ).to(self.model.device)
        law: dict[str, Any] = {"do_sample": False, "num_beams": self.beams}
        if self.temperature is not None:
            law = {"do_sample": True, "num_beams": 1, "temperature": self.temperature, "top_k": 0}
        if self.target_language is not None:
            law["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(self.target_language)
        model: Any = self.model
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_new_tokens if room is None else min(self.max_new_tokens, room - 1),
            max_length=None,
            **law,
        )
        return tokenizer.batch_decode(out, skip_special_tokens=True)


def load_translator(model: str | Path, **settings: Any) -> Translator:
    """A translator from a hub id or folder; `settings` are the `Translator`'s.

    Raises:
        InputError: if there is no encoder–decoder under that name.
    """
    try:
        loaded = AutoModelForSeq2SeqLM.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"translation model {str(model)!r} cannot be loaded ({reason[:200]}); give a hub id or folder of an encoder–decoder"
        ) from error
    return Translator(loaded.eval().requires_grad_(False), tokenizer, **settings)
