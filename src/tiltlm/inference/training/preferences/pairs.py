"""Comparisons of completions: given with the data, or every pair of a prompt, labelled by the reward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.records import Forward, Scored

Label = Callable[[Float[Tensor, " M"]], Float[Tensor, " M"]]
"""Difference of two rewards, in reward units -> probability that the first completion is preferred."""


def bradley_terry(difference: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """sigma(r - r'), the label model of DPO (Bradley & Terry 1952), as its own expectation: no label is drawn."""
    return difference.sigmoid()


def winner(difference: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """1 for the higher reward, one half for equals; how far it is higher does not count."""
    return (difference.sign() + 1) / 2


def compare(scored: Scored, label: Label) -> tuple[Int[Tensor, "M 2"], Float[Tensor, " M"]]:
    """Which rows are compared, and with what probability the first of each pair is preferred.

    Pairs that came with the data are taken as they are, the first with certainty. Otherwise every two completions of a
    prompt are compared, and `label` says what their rewards mean.

    Raises:
        InputError: if there is nothing to compare: no pairs and no rewards, or no two completions of any prompt.
    """
    if scored.pairs is not None:
        pairs = scored.pairs
        preferred = torch.ones(len(pairs), dtype=torch.float64)
    else:
        if torch.isnan(scored.log_evidence).any():
            raise InputError(
                "the given completions have neither pairs nor rewards, so that nothing can be compared; make them with "
                "preferences(prior, rows), or give their rewards: Given(target.score(draws))"
            )
        pairs = pairs_within(scored.draws.prompt_index)
        first, second = (scored.beta * scored.log_evidence.double())[pairs].unbind(-1)
        preferred = label(torch.where(first == second, 0.0, first - second))  # two of -inf are equals as well
    if not len(pairs):
        raise InputError("no prompt of this step has two completions to compare; give pairs, or draw a larger group")
    return pairs, preferred


def pairs_within(prompt_index: Int[Tensor, " B"]) -> Int[Tensor, "M 2"]:
    """Every two rows of the same prompt, once."""
    return (prompt_index[:, None] == prompt_index[None, :]).triu(1).nonzero()


def log_ratio(forward: Forward, scored: Scored) -> Float[Tensor, " B"]:
    """log q(x|c) - log pi0(x|c) in nats, with gradient: up to log Z the log-evidence that the policy implies."""
    return (forward.log_q - scored.log_prior).sum(-1)
