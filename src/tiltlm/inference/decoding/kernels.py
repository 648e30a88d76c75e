"""What a Markov chain on completions proposes: a new end, or a token changed, put in or taken out in the middle.

Every kernel says with what it proposes how likely the way back is, so that `MCMC` accepts by one formula for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.protocols import PrefixSampler
from tiltlm.records import Draws, Prompts

if TYPE_CHECKING:
    from tiltlm.lm.masked import MaskedLM
    from tiltlm.lm.view import View

ROWS = 64
"""Most places that are filled in at a time: each takes a row as wide as the vocabulary."""

EditKind = Literal["substitute", "insert", "delete"]


@dataclass(frozen=True)
class Move:
    """What a kernel proposes for each chain.

    Attributes:
        draws: the proposed completions x', with their log-probability under the sampler that redraws ends.
        log_ratio: log g(x | x') - log g(x' | x), the way back against the way there, each through the same auxiliary
            choices (where to cut, what to edit).
    """

    draws: Draws
    log_ratio: Float[Tensor, " B"]


class Kernel(Protocol):
    """A proposal g(x'|x) on completions whose ratio of probabilities is known."""

    def propose(self, sampler: PrefixSampler, current: Draws, rng: Generator) -> Move:
        """Move every row. `sampler` draws the ends of completions, and its law is what `current.log_q` is of."""
        ...


@dataclass(frozen=True)
class SuffixResampling:
    """Cut x at a place drawn uniformly from its |x| tokens and draw the rest anew (QuEST, Faria et al. 2024).

    x' could have been cut at |x'| places, so g(x|x') / g(x'|x) = |x| q(x) / (|x'| q(x')): the factors of the common prefix cancel.
    """

    def propose(self, sampler: PrefixSampler, current: Draws, rng: Generator) -> Move:
        keep = self.cut(current.lengths, torch.rand(len(current), generator=rng, dtype=torch.float64))
        proposed = sampler.redraw(current, keep, rng)
        return Move(proposed, self.log_ratio(current, proposed))

    def cut(self, lengths: Int[Tensor, " B"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
        """How many tokens stay: 0 to |x| - 1, each as likely."""
        return torch.minimum((uniform * lengths).floor().long(), lengths - 1)

    def log_ratio(self, current: Draws, proposed: Draws) -> Float[Tensor, " B"]:
        """log of |x| q(x) / (|x'| q(x'))."""
        lengths = current.lengths.double().log() - proposed.lengths.double().log()
        return lengths + current.log_prob.double() - proposed.log_prob.double()


class Infiller(Protocol):
    """Says what a gap in a completion may hold; `tiltlm.lm.infill` makes one of any masked language model."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a completion, which no gap may hold."""
        ...

    def log_probs(
        self, prompts: Prompts, index: Sequence[int], left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]
    ) -> Float[Tensor, "B V"]:
        """Normalised log-probabilities, over the sampler's tokens, of the one between `left` and `right` in an answer to a prompt.

        They must depend on nothing else; `ends` have none.
        """
        ...


@dataclass(frozen=True)
class Edit:
    """A kind of change at a place of the completion, and the probability that it is chosen."""

    kind: EditKind
    place: int
    probability: float


@dataclass(frozen=True)
class MaskedEdits:
    """Change, insert or delete one token, as a masked language model would fill the place in.

    One place of the completion is masked and a token v' is drawn from the masked model's law m(. | left, right) for it. As m sees
    only what is not changed, the way back is known exactly, whatever the masked model and whether or not its conditionals belong
    to any joint law (they do not, in general; so Gibbs sampling with them and without a correction, Wang & Cho 2019, settles at no law that
    can be named). The correction is that of Goyal, Dyer & Berg-Kirkpatrick (2022, eq. 4), here for any target:

    - substitute a token v, at one of n places: g(x|x') / g(x'|x) = m(v) / m(v')
    - insert one into one of the n + 1 gaps: 1 / m(v'); deleting it again is one of n + 1 deletions
    - delete one of n tokens: m(v)

    The end of the completion stays as it is: of a completion that was cut at the longest length tokens are only substituted, and one that
    would become too long stays. So chains of edits alone do not reach every completion; mix them with `SuffixResampling`, as
    `masked_edits` does.

    Attributes:
        infiller: the masked language model.
        lengthen: probability of trying to insert, and of trying to delete, where the completion ended; the rest is substitution.
    """

    infiller: Infiller
    lengthen: float = 0.25

    def __post_init__(self) -> None:
        if not hasattr(self.infiller, "log_probs"):
            raise InputError(
                f"infiller is {self.infiller!r:.60}; make one of a masked language model: masked_edits(model, prior)"
            )
        if not 0 <= self.lengthen <= 0.5:
            raise InputError(
                f"lengthen is {self.lengthen}; it is a probability from 0 to 0.5, for inserting and for deleting"
            )

    def propose(self, sampler: PrefixSampler, current: Draws, rng: Generator) -> Move:
        """Edit every row.

        Raises:
            InputError: if completions end at stop strings, whose place an edit would move.
        """
        law, completions = sampler.law, _ids(current)
        if law.stop:
            raise InputError(
                f"stop is {law.stop!r}: an edit may make or break a stop string; use SuffixResampling, or no stop"
            )
        if not hasattr(sampler, "complete"):
            raise InputError(
                f"the proposal is a {type(sampler).__name__}, which has no complete() to score edits; draw from the prior"
            )
        uniform = torch.rand(len(current), generator=rng, dtype=torch.float64).tolist()
        edits = [_chosen(self.edits(ids, law.max_new_tokens), u) for ids, u in zip(completions, uniform, strict=True)]
        ratio = torch.full((len(current),), -torch.inf, dtype=torch.float64)  # to stay is no move that was accepted
        proposed = list(completions)
        moving = [row for row, edit in enumerate(edits) if edit is not None]
        for start in range(0, len(moving), ROWS):
            rows = moving[start : start + ROWS]
            some = [edit for row in rows if (edit := edits[row]) is not None]
            some_ids = [completions[row] for row in rows]
            log_m = self.log_fill(current.prompts, current.prompt_index[rows].tolist(), some_ids, some)
            token = torch.multinomial(log_m.exp(), 1, generator=rng)[:, 0].tolist()
            proposed_ids = [edited(ids, edit, v) for ids, edit, v in zip(some_ids, some, token, strict=True)]
            ratio[rows] = self.log_ratio(log_m, some_ids, proposed_ids, some)
            for row, ids in zip(rows, proposed_ids, strict=True):
                proposed[row] = ids
        complete: Any = sampler
        return Move(complete.complete(current.prompts, current.prompt_index, proposed), ratio)

    def edits(self, ids: Sequence[int], longest: int) -> list[Edit]:
        """Every edit of a completion with its probability; what is missing to 1 is the probability of leaving it alone."""
        ended = bool(ids) and ids[-1] in self.infiller.ends
        n = len(ids) - ended
        substitute = (
            1 - 2 * self.lengthen if ended else 1.0
        )  # edits leave the end alone, so the way back chooses likewise
        found = [Edit("substitute", place, substitute / n) for place in range(n)]
        if ended and self.lengthen:
            found += [Edit("delete", place, self.lengthen / n) for place in range(n)]
            if len(ids) < longest:
                found += [Edit("insert", gap, self.lengthen / (n + 1)) for gap in range(n + 1)]
        return found

    def log_fill(
        self, prompts: Prompts, index: Sequence[int], completions: Sequence[Sequence[int]], edits: Sequence[Edit]
    ) -> Float[Tensor, "B V"]:
        """log m of the token at each edit's place, given all others."""
        pairs = list(zip(completions, edits, strict=True))
        left = [ids[: edit.place] for ids, edit in pairs]
        right = [ids[edit.place + (edit.kind != "insert") :] for ids, edit in pairs]
        return self.infiller.log_probs(prompts, index, left, right).double()

    def log_ratio(
        self,
        log_m: Float[Tensor, "B V"],
        current: Sequence[Sequence[int]],
        proposed: Sequence[Sequence[int]],
        edits: Sequence[Edit],
    ) -> Float[Tensor, " B"]:
        """log g(x|x') - log g(x'|x) of every edit: m of the token that goes, over m of the one that comes."""
        found = [
            (row[x[edit.place]] if edit.kind != "insert" else row.new_zeros(()))
            - (row[y[edit.place]] if edit.kind != "delete" else row.new_zeros(()))
            for row, x, y, edit in zip(log_m, current, proposed, edits, strict=True)
        ]
        return torch.stack(found) if found else log_m.new_zeros(0)


@dataclass(frozen=True)
class Mixture:
    """One of several kernels, chosen anew for every chain and step. What each of them leaves as it is, the mixture does.

    Attributes:
        kernels: with their probabilities in `shares`.
    """

    kernels: tuple[Kernel, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.kernels or len(self.kernels) != len(self.shares):
            raise InputError(
                f"there are {len(self.kernels)} kernels and {len(self.shares)} shares; give each kernel its share"
            )
        if not all(share > 0 for share in self.shares) or abs(sum(self.shares) - 1) > 1e-9:
            raise InputError(f"shares are {self.shares}; they must be positive and add up to 1")

    def propose(self, sampler: PrefixSampler, current: Draws, rng: Generator) -> Move:
        chosen = torch.multinomial(torch.tensor(self.shares).double().expand(len(current), -1), 1, generator=rng)[:, 0]
        moves, order = [], []
        for number, kernel in enumerate(self.kernels):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                moves.append(kernel.propose(sampler, current.select(rows), rng))
                order.append(rows)
        place = torch.cat(order).argsort()
        return Move(
            Draws.concatenate([m.draws for m in moves]).select(place), torch.cat([m.log_ratio for m in moves])[place]
        )


def masked_edits(model: str | Path | MaskedLM, prior: View, *, share: float = 0.5, lengthen: float = 0.25) -> Mixture:
    """`MCMC(kernel=masked_edits("distilbert-base-uncased", prior))`: edits by a masked language model, and redrawn ends.

    Args:
        model: a hub id or folder of a masked language model, or what `load_masked_lm` gives.
        prior: the target's prior, whose tokens are changed. The tokenizers may differ; see `tiltlm.lm.infill`.
        share: of the steps that edit; the others redraw the end, so that every completion can be reached.
        lengthen: see `MaskedEdits`.

    Raises:
        InputError: if the model is none that fills in, or has hardly a token in common with the prior.
    """
    from tiltlm.lm.infill import infiller

    if not 0 < share < 1:
        raise InputError(f"share is {share}; it must be between 0 and 1: edits alone do not reach every completion")
    return Mixture((SuffixResampling(), MaskedEdits(infiller(model, prior), lengthen)), (1 - share, share))


def edited(ids: Sequence[int], edit: Edit, token: int) -> list[int]:
    """The completion after the edit; a deletion looks at no token."""
    new = [] if edit.kind == "delete" else [token]
    return [*ids[: edit.place], *new, *ids[edit.place + (edit.kind != "insert") :]]


def _chosen(edits: Sequence[Edit], uniform: float) -> Edit | None:
    """The edit in whose cell the uniform number is; None beyond them all."""
    for edit in edits:
        uniform -= edit.probability
        if uniform < 0:
            return edit
    return None


def _ids(draws: Draws) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(draws.tokens, draws.mask, strict=True)]


__all__ = ["Edit", "Infiller", "Kernel", "MaskedEdits", "Mixture", "Move", "SuffixResampling", "masked_edits"]
