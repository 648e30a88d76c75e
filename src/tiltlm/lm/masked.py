"""Masked language models as scorers of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from tiltlm.errors import InputError
from tiltlm.lm.batching import in_batches, longest_text, padding_id, token_ids
from tiltlm.lm.load import load_as

ROWS = 64


@dataclass(frozen=True, eq=False)
class MaskedLM:
    """A model that fills in what is masked.

    Attributes:
        longest: tokens of a text that are read; None for all.
        rows: most masked copies in the model at a time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    longest: int | None = None
    rows: int = ROWS

    @property
    def vocabulary(self) -> int:
        """V, how many tokens the model chooses from."""
        return int(self.model.config.get_text_config().vocab_size)

    def pseudo_log_likelihood(self, texts: Sequence[str]) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        """Σ_t log P(x_t | x without x_t) of each text, and its number of tokens (Salazar et al. 2020, eq. 1).

        A text of T tokens costs T passes, a copy with each token masked. Special tokens are neither masked nor counted.
        """
        ids = token_ids(texts, self.tokenizer, self.longest)
        known: Any = self.tokenizer
        special = {known.cls_token_id, known.sep_token_id, known.bos_token_id, known.eos_token_id}
        places = [(row, t) for row, some in enumerate(ids) for t, token in enumerate(some) if token not in special]
        totals = torch.zeros(len(ids), dtype=torch.float64)
        counts = torch.zeros(len(ids), dtype=torch.long)
        if not places:
            return totals, counts
        owner, place = torch.tensor(places).unbind(-1)
        truth = torch.tensor([ids[row][t] for row, t in places])
        copies = [[*ids[row][:t], known.mask_token_id, *ids[row][t + 1 :]] for row, t in places]

        def log_prob(tokens: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
            device = self.model.device
            logits = self.model(input_ids=tokens.to(device), attention_mask=mask.long().to(device)).logits
            hidden = logits[torch.arange(len(rows)), place[rows]].float().log_softmax(-1)
            return hidden[torch.arange(len(rows)), truth[rows].to(device)]

        log_p = in_batches(copies, self.rows, padding_id(self.tokenizer), log_prob).double()
        return totals.index_add(0, owner, log_p), counts.index_add(0, owner, torch.ones_like(owner))


def load_masked_lm(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> MaskedLM:
    """Load a masked language model: a hub id, a folder, or a model in memory with its tokenizer.

    Raises:
        InputError: if there is nothing to load under that name, or its tokenizer has no mask token.
    """
    loaded, tokenizer = load_as(AutoModelForMaskedLM, model, tokenizer, dtype=dtype, device=device)
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"model {str(model)[:80]!r} has no mask token; take a masked language model, such as BERT's kin"
        )
    return MaskedLM(loaded, tokenizer, longest_text(loaded, tokenizer))
