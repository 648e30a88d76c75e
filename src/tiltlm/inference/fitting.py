"""Work that is cut smaller until it fits into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from tiltlm.errors import InputError, TiltWarning
from tiltlm.inference.settings import Training

T = TypeVar("T")


def recomputing(policy: Any, settings: Training, shard: bool) -> AbstractContextManager[Any]:
    """Training that keeps of each layer only what goes in, if the settings ask for it.

    Raises:
        InputError: where the policy cannot, on entering.
    """
    if not settings.gradient_checkpointing:
        return nullcontext()
    if shard:
        raise InputError(
            "gradient_checkpointing and shard are both on, but the layers of sharded weights are run by transformers; leave out one "
            "of them"
        )
    return policy.body.backbone.recomputing()


class MicroBatches:
    """How many completion tokens go through the policy together with gradient: as many as wished, or as memory has.

    What ran out of memory is undone and tried again with half as many, and later work begins with what has fitted. The
    gradient is the same up to the order of its sums.

    Attributes:
        tokens: in one pass, about.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def run(self, work: Callable[[int], T], undo: Callable[[], None], least: int) -> T:
        """What `work` gives for a number of tokens that fits.

        Args:
            undo: takes back what an unfinished `work` has done.
            least: tokens of the longest completion, which is not cut.

        Raises:
            InputError: if one completion alone does not fit.
        """
        while True:
            try:
                return work(self.tokens)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            undo()  # outside the handler, whose traceback keeps the pass's tensors alive
            if self.tokens <= least:
                raise InputError(
                    f"one completion of {least} tokens does not fit into memory ({reason[:120]}); lower max_new_tokens, or take a "
                    f"smaller model"
                )
            self.tokens = max(least, self.tokens // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory: micro_tokens is {self.tokens} from here on; set it to save the retries",
                TiltWarning,
                stacklevel=2,
            )


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says so; on a CPU torch has no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
