"""What ends a completion besides its end token: stop strings, looked for where a new token can have completed one, and special tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tiltlm.errors import InputError
from tiltlm.lm.text import decode

BROKEN = "\ufffd"
"""What a token decodes to that holds a part of a character."""


@lru_cache(maxsize=8)
def tokens_and_texts(tokenizer: Any, stops: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stops as ids of special tokens and as texts to look for: texts are decoded without special tokens, and would never show one.

    Raises:
        InputError: for a stop with a special token and something else, which no text can have.
    """
    special = _special_tokens(tokenizer) if stops else {}
    for stop in stops:
        within = next((token for token in special if token in stop), None)
        if within is not None and stop not in special:
            raise InputError(
                f"stop is {stop!r}, in which {within!r} is a special token, and texts are looked at without those; give {within!r} alone"
            )
    return tuple(special[stop] for stop in stops if stop in special), tuple(s for s in stops if s not in special)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of the tokens that decoding leaves out, by their texts."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return named | {str(token): number for number, token in added.items() if token.special}


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a completion as soon as it contains one of them."""

    tokenizer: PreTrainedTokenizerBase
    texts: tuple[str, ...]
    on_its_own: bool = False
    """As for `decode`."""

    def within(self, tokens: Sequence[int]) -> bool:
        """Whether a completion contains one."""
        (text,) = decode([list(tokens)], self.tokenizer, on_its_own=self.on_its_own)
        return any(stop in text for stop in self.texts)

    def completed(self, last: Int[Tensor, " B"], so_far: Callable[[int], Sequence[int]]) -> Bool[Tensor, " B"]:
        """Which completions contain one, if none did without its last token.

        Args:
            last: the last token of each.
            so_far: all tokens of the completion in a row; asked for only where `last` can complete a stop string.
        """
        closers = _closers(self.tokenizer, self.texts)
        near = torch.ones(len(last), dtype=torch.bool) if closers is None else torch.isin(last.cpu(), closers)
        for row in near.nonzero().flatten().tolist():
            near[row] = self.within(so_far(row))
        return near


@lru_cache(maxsize=8)
def _closers(tokenizer: Any, texts: tuple[str, ...]) -> Int[Tensor, " C"] | None:
    """Tokens whose text has a stop string's last character, or a part of one; None where a token's text alone says too little.

    That is so for spaces, which some tokenizers leave out at the beginning of a text, and for tokenizers that tidy up what they
    decode.
    """
    last = {text[-1] for text in texts if text}
    tidy = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    if tidy or any(character.isspace() and character != "\n" for character in last) or not all(texts):
        return None
    alone = tokenizer.batch_decode([[number] for number in range(len(tokenizer))], skip_special_tokens=True)
    sought = last | {BROKEN}
    return torch.tensor([number for number, text in enumerate(alone) if not sought.isdisjoint(text)], dtype=torch.long)
