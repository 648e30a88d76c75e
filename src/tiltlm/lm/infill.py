"""What a masked language model would put into a gap of a completion, as a law over the prior's own tokens.

The two tokenizers may differ: BERT's word pieces serve a prior with byte pairs. A completion stays a sequence of the prior's tokens
throughout, so that nothing is ever tokenised again and the target is the usual one; only what the masked model looks at, and what its
answers mean, is translated. That makes for worse proposals, never for wrong ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tiltlm.errors import InputError
from tiltlm.lm.batching import in_batches, padding_id
from tiltlm.lm.masked import MaskedLM, load_masked_lm
from tiltlm.lm.view import View
from tiltlm.records import Prompts

LEAST = 0.02
"""Share of the prior's tokens that the masked model must be able to fill in."""
ALIKE = 0.95
"""Share of the prior's tokens that the masked model spells alike, above which the tokenizers are taken to be the same."""

Piece = tuple[bool, str]
"""A token as a reader sees it: whether a word begins there, and its text."""


@dataclass(frozen=True, eq=False)
class Infilling:
    """A masked language model's law of one token of a completion, given the prompt and all others.

    A token of the prior has the probability of the masked model's token with the same text at the same place in a word, shared evenly
    among those that it cannot tell apart (upper and lower case, for an uncased model); tokens that it does not know have none, and
    the rest is normalised. It sees as much to the left and the right of the gap as it can read.

    Attributes:
        tokenizer: the prior's.
        ends: the prior's tokens that end a completion, which no gap may hold.
        size: of the prior's vocabulary.
    """

    masked: MaskedLM
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    size: int

    def __post_init__(self) -> None:
        masked: Any = self.masked.tokenizer
        if masked.mask_token_id is None:
            raise InputError(f"masked model {masked.name_or_path!r} has no mask token; take one of BERT's kin")
        if self.coverage < LEAST:
            raise InputError(
                f"masked model {masked.name_or_path!r} knows {self.coverage:.1%} of the prior's tokens, and could fill in hardly "
                f"anything; take one with a tokenizer more like the prior's"
            )

    @property
    def coverage(self) -> float:
        """The share of the prior's tokens that can be put into a gap."""
        return float((self._meaning >= 0).double().mean())

    def log_probs(
        self, prompts: Prompts, index: Sequence[int], left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]
    ) -> Float[Tensor, "B V"]:
        """Normalised log-probabilities of the token between `left` and `right`, completions' tokens without prompts.

        Args:
            index: the prompt of each.
        """
        if not index:
            return torch.zeros(0, self.size, dtype=torch.float64)
        rows, places = [], []
        for prompt, before, after in zip(index, left, right, strict=True):
            asked = prompts.tokens[prompt][prompts.mask[prompt]].tolist()
            row, place = self._context([*asked, *before], [i for i in after if i not in self.ends])
            rows.append(row)
            places.append(place)
        place_of = torch.tensor(places)
        model, known = self.masked.model, self._meaning >= 0

        def log_prob(tokens: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
            device = model.device
            logits = model(input_ids=tokens.to(device), attention_mask=mask.long().to(device)).logits
            hidden = logits[torch.arange(len(numbers)), place_of[numbers]].double().log_softmax(-1).cpu()
            shared = hidden[:, self._meaning.clamp(min=0)] - self._alike
            return torch.where(known, shared, -torch.inf).log_softmax(-1)

        return in_batches(rows, self.masked.rows, padding_id(self.masked.tokenizer), log_prob)

    def _context(self, before: list[int], after: list[int]) -> tuple[list[int], int]:
        """What the masked model reads, and where in it the gap is."""
        masked: Any = self.masked.tokenizer
        first = [i for i in (masked.cls_token_id,) if i is not None]
        last = [i for i in (masked.sep_token_id,) if i is not None]
        left, right = self._translated(before), self._translated(after)
        if self.masked.longest is not None:
            room = self.masked.longest - len(first) - len(last) - 1
            take = min(len(right), max(room // 2, room - len(left)))
            right = right[:take]
            left = left[len(left) - min(len(left), room - take) :]
        return [*first, *left, masked.mask_token_id, *right, *last], len(first) + len(left)

    def _translated(self, ids: list[int]) -> list[int]:
        """The prior's tokens in the masked model's: one for one where the tokenizers are the same, by the text where not."""
        if self._same is not None:
            return [i for i in self._same[ids].tolist() if i >= 0] if ids else []
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        masked: Any = self.masked.tokenizer
        return list(masked(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def _same(self) -> Int[Tensor, " V"] | None:
        """The masked model's id of each of the prior's tokens, -1 for none, if they are spelt alike; else None."""
        ours, theirs = self.tokenizer.get_vocab(), self.masked.tokenizer.get_vocab()
        alike = sum(token in theirs for token in ours)
        if alike < ALIKE * len(ours):
            return None
        found = torch.full((self.size,), -1)
        for token, i in ours.items():
            if i < self.size:
                found[i] = theirs.get(token, -1)
        return found

    @cached_property
    def _meaning(self) -> Int[Tensor, " V"]:
        """The masked model's token that stands for each of the prior's, -1 for none."""
        if self._same is not None:
            found = self._same.clone()
        else:
            found = _by_text(pieces(self.tokenizer), pieces(self.masked.tokenizer), self.size)
        special = {int(i) for i in (*self.tokenizer.all_special_ids, *self.ends) if i is not None and i < self.size}
        found[sorted(special)] = -1
        return found

    @cached_property
    def _alike(self) -> Float[Tensor, " V"]:
        """log of how many of the prior's tokens share a token's meaning."""
        known = self._meaning >= 0
        counts = torch.bincount(self._meaning[known], minlength=1).double()
        return torch.where(known, counts[self._meaning.clamp(min=0)], 1.0).log()


def infiller(model: str | Path | MaskedLM, prior: View) -> Infilling:
    """A masked language model that fills gaps in completions of `prior`; `model` is loaded if it is not yet."""
    masked = model if isinstance(model, MaskedLM) else load_masked_lm(model)
    size = prior.body.model.config.get_text_config().vocab_size
    return Infilling(masked, prior.body.tokenizer, prior.eos, size)


def pieces(tokenizer: PreTrainedTokenizerBase) -> dict[int, Piece]:
    """Every token that is no special one, by whether a word begins there and its text; those that are no whole text are left out.

    Word pieces mark what continues a word (##), byte pairs and SentencePiece what begins one (Ġ, ▁).
    """
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    # byte pairs have ## too, for headings; what marks words is what is there most often
    counts = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in ("##", "Ġ", "▁")}
    mark = max(counts, key=lambda m: counts[m]) if any(counts.values()) else ""
    found = {}
    for token, i in vocabulary.items():
        marked = bool(mark) and token.startswith(mark)
        text = token[len(mark) :] if mark != "Ġ" else str(tokenizer.decode([i])).removeprefix(" ")
        text = text if marked or mark == "Ġ" else token
        if i not in special and text.strip() == text and text and "\ufffd" not in text:
            found[i] = (marked if mark in ("Ġ", "▁") else not marked, text)
    return found


def _by_text(ours: dict[int, Piece], theirs: dict[int, Piece], size: int) -> Int[Tensor, " V"]:
    """The token of `theirs` with the text of each of `ours`: as it is, in lower case, or, of punctuation, wherever it stands."""
    place = {piece: i for i, piece in reversed(theirs.items())}
    found = torch.full((size,), -1)
    for i, (begins, text) in ours.items():
        forms = [(begins, text), (begins, text.lower())]
        if not re.search(r"\w", text):
            forms.append((not begins, text))
        meaning = next((place[form] for form in forms if form in place), -1)
        if i < size:
            found[i] = meaning
    return found
