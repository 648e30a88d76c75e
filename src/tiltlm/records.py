"""The records that cross folders. All are frozen; a stage that changes something returns a new record.

Shapes use these letters: P prompts, B completions (all prompts together), L prompt tokens, T completion
tokens. Log-probabilities are in nats. Rows of one prompt need not be neighbours: `prompt_index` says which
prompt a row belongs to.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiltlm.content import content
from tiltlm.estimates import Estimate

Message = Mapping[str, Any]
Text = str | tuple[Message, ...]
"""A plain text, or a conversation as messages with `role` and `content`: a text, or parts such as {"type": "image"}."""


def shown(text: Text) -> str:
    """A prompt as one reads it in a table: the text, or what the last message says."""
    if isinstance(text, str):
        return text
    content = text[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", f"<{part.get('type', 'part')}>")) for part in content)


@dataclass(frozen=True)
class Prompts:
    """What the model conditions on, and the data set's columns that rewards may ask for.

    Attributes:
        tokens: token ids, padded on either side; the source of an encoder–decoder; none (L = 0) where all is in `inputs`.
        mask: True where `tokens` holds a real token.
        texts: each prompt as the user wrote it, a string or messages.
        columns: further columns by name, one value a prompt.
        rows: the place of each prompt in the data set that it was selected from; 0, 1, … for a whole data set. It is how
            an engine finds what it keeps for a prompt, such as its log Z.
        inputs: what else the model reads, such as `pixel_values`: by name, a tensor a prompt. Those of several prompts are
            joined along their first axis, which has length 0 for a prompt without.
    """

    tokens: Int[Tensor, "P L"]
    mask: Bool[Tensor, "P L"]
    texts: tuple[Text, ...]
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rows: Int[Tensor, " P"] = field(default=None)  # pyright: ignore[reportAssignmentType]
    inputs: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows is None:
            object.__setattr__(self, "rows", torch.arange(len(self.texts)))

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index: Sequence[int]) -> Prompts:
        """The prompts at `index`, in that order; repeats are allowed."""
        rows = torch.as_tensor(index, dtype=torch.long)
        return Prompts(
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            texts=tuple(self.texts[i] for i in index),
            columns={name: tuple(values[i] for i in index) for name, values in self.columns.items()},
            rows=self.rows[rows],
            inputs={name: tuple(tensors[i] for i in index) for name, tensors in self.inputs.items()},
        )

    def fingerprint(self) -> str:
        """A hash of all that the model reads: tokens, pixels and the like."""
        digest = hashlib.sha256()
        for tokens, mask in zip(self.tokens, self.mask, strict=True):
            digest.update(str(tokens[mask].tolist()).encode())
        for name, tensors in sorted(self.inputs.items()):
            for tensor in tensors:
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def column_fingerprints(self) -> dict[str, str]:
        """A hash of each column's values, which the model does not read and rewards do."""
        return {
            name: hashlib.sha256(content(values).encode()).hexdigest()[:16] for name, values in self.columns.items()
        }


@dataclass(frozen=True)
class Draws:
    """Completions and the log-probability of the law that produced them.

    Attributes:
        tokens: completion ids, right-padded.
        mask: True on completion tokens, the ending EOS included.
        ended: True where the completion ended by itself, False where it was cut at the law's
            `max_new_tokens`. Both are outcomes.
        prompt_index: the row of `prompts` that each completion continues.
        log_q: log-probability of each token under the sampling law, 0 on padding.
        log_mu: the same under the law that really drew, where a program drew whose law is not quite the sampler's, which the
            draws count for (`tiltlm.mismatch`); None where it is.
        texts: the completions as text, without special tokens.
        sampler: identity of the sampler that drew them; lets a prior recognise its own draws.
    """

    prompts: Prompts
    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    ended: Bool[Tensor, " B"]
    prompt_index: Int[Tensor, " B"]
    log_q: Float[Tensor, "B T"]
    texts: tuple[str, ...]
    sampler: str = ""
    log_mu: Float[Tensor, "B T"] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens in each completion, the EOS included."""
        return self.mask.sum(-1)

    @property
    def log_prob(self) -> Float[Tensor, " B"]:
        """Log-probability of each whole completion under the sampling law."""
        return self.log_q.sum(-1)

    def select(self, rows: Tensor) -> Draws:
        """The completions at `rows` (indices or a boolean mask), of the same prompts."""
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return replace(
            self,
            tokens=self.tokens[index],
            mask=self.mask[index],
            ended=self.ended[index],
            prompt_index=self.prompt_index[index],
            log_q=self.log_q[index],
            log_mu=None if self.log_mu is None else self.log_mu[index],
            texts=tuple(self.texts[i] for i in index.tolist()),
        )

    def among(self, prompts: Prompts, index: Sequence[int]) -> Draws:
        """The same draws as draws for `prompts`, of which this record's prompts are the ones at `index`."""
        return replace(self, prompts=prompts, prompt_index=torch.as_tensor(index)[self.prompt_index])

    def of(self, index: Sequence[int]) -> Draws:
        """The draws of the prompts at `index`, as draws for those prompts alone; the inverse of `among`."""
        place = torch.full((len(self.prompts),), -1)
        place[torch.as_tensor(index)] = torch.arange(len(index))
        some = self.select(place[self.prompt_index] >= 0)
        return replace(some, prompts=self.prompts.select(index), prompt_index=place[some.prompt_index])

    @staticmethod
    def concatenate(parts: Sequence[Draws]) -> Draws:
        """Draws for the same prompts, one after the other; padded to the longest."""
        width = max(part.tokens.shape[1] for part in parts)
        drawn = [part.log_q if part.log_mu is None else part.log_mu for part in parts]
        return replace(
            parts[0],
            tokens=torch.cat([_wide(p.tokens, width) for p in parts]),
            mask=torch.cat([_wide(p.mask, width) for p in parts]),
            ended=torch.cat([p.ended for p in parts]),
            prompt_index=torch.cat([p.prompt_index for p in parts]),
            log_q=torch.cat([_wide(p.log_q, width) for p in parts]),
            log_mu=None if all(p.log_mu is None for p in parts) else torch.cat([_wide(t, width) for t in drawn]),
            texts=tuple(text for p in parts for text in p.texts),
            sampler=parts[0].sampler if len({p.sampler for p in parts}) == 1 else "",
        )


def _wide(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


@dataclass(frozen=True)
class Likelihood:
    """What the evidence says of a batch of completions.

    Attributes:
        log: log-likelihood r / beta of each completion, in nats; NaN where `kept` is False.
        rewards: the value of every part by name, in the part's own units.
        kept: False for completions that the evidence could not judge and that the user chose to drop.
    """

    log: Float[Tensor, " B"]
    rewards: Mapping[str, Float[Tensor, " B"]]
    kept: Bool[Tensor, " B"]


@dataclass(frozen=True)
class Scored:
    """Draws with both factors of the target: log pi0(x|c) and the evidence r(x, c) / beta.

    Attributes:
        log_prior: log-probability of each token under the prior, 0 on padding.
        log_evidence: log-likelihood of each completion.
        rewards: the value of every part of the evidence by name.
        beta: the temperature at which the evidence was taken.
        dropped: completions that were drawn but left out because the evidence could not judge them.
        pairs: rows (preferred, other) of completions that somebody compared; None where nobody did.
    """

    draws: Draws
    log_prior: Float[Tensor, "B T"]
    log_evidence: Float[Tensor, " B"]
    rewards: Mapping[str, Float[Tensor, " B"]] = field(default_factory=dict)
    beta: float = 1.0
    dropped: int = 0
    pairs: Int[Tensor, "M 2"] | None = None

    def __len__(self) -> int:
        return len(self.draws)

    def at(self, beta: float) -> Scored:
        """The same draws with the same rewards at another temperature."""
        return replace(self, log_evidence=self.log_evidence * (self.beta / beta), beta=beta)

    @property
    def log_target(self) -> Float[Tensor, " B"]:
        """log pi0(x|c) + r(x, c) / beta: the posterior up to log Z(c)."""
        return self.log_prior.sum(-1) + self.log_evidence

    @property
    def log_weight(self) -> Float[Tensor, " B"]:
        """Importance log-weight of each draw for the posterior, log pi0 + r / beta - log q."""
        return self.log_target - self.draws.log_prob

    def select(self, rows: Tensor) -> Scored:
        """The scored completions at `rows` (indices or a boolean mask); of the pairs, those that are still whole."""
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return replace(
            self,
            draws=self.draws.select(index),
            log_prior=self.log_prior[index],
            log_evidence=self.log_evidence[index],
            rewards={name: values[index] for name, values in self.rewards.items()},
            pairs=None if self.pairs is None else _pairs_among(self.pairs, index, len(self)),
        )

    def among(self, prompts: Prompts, index: Sequence[int]) -> Scored:
        """The same draws as draws for `prompts`, of which this record's prompts are the ones at `index`."""
        return replace(self, draws=self.draws.among(prompts, index))

    def of(self, index: Sequence[int]) -> Scored:
        """The draws of the prompts at `index`, as draws for those prompts alone; the inverse of `among`."""
        chosen = torch.isin(self.draws.prompt_index, torch.as_tensor(index))
        some = self.select(chosen)
        return replace(some, draws=some.draws.of(index))

    @staticmethod
    def concatenate(parts: Sequence[Scored]) -> Scored:
        """Scored draws of the same prompts, one after the other."""
        draws = Draws.concatenate([p.draws for p in parts])
        width = draws.tokens.shape[1]
        return Scored(
            draws=draws,
            log_prior=torch.cat([_wide(p.log_prior, width) for p in parts]),
            log_evidence=torch.cat([p.log_evidence for p in parts]),
            rewards={name: torch.cat([p.rewards[name] for p in parts]) for name in parts[0].rewards},
            beta=parts[0].beta,
            dropped=sum(p.dropped for p in parts),
            pairs=_joined_pairs(parts),
        )


def _pairs_among(pairs: Int[Tensor, "M 2"], index: Int[Tensor, " B"], rows: int) -> Int[Tensor, "K 2"]:
    """The pairs both of whose rows are in `index`, by their new places."""
    place = torch.full((rows,), -1)
    place[index] = torch.arange(len(index))
    moved = place[pairs]
    return moved[(moved >= 0).all(-1)]


def _joined_pairs(parts: Sequence[Scored]) -> Int[Tensor, "M 2"] | None:
    if all(part.pairs is None for part in parts):
        return None
    offsets = itertools.accumulate((len(part) for part in parts), initial=0)
    return torch.cat(
        [part.pairs + offset for part, offset in zip(parts, offsets, strict=False) if part.pairs is not None]
    )


@dataclass(frozen=True)
class Weighted:
    """A weighted sample: within a prompt, row i stands for the posterior in proportion to exp(log_w[i]).

    A log-weight of -inf marks a row that the engine looked at and did not keep.

    Attributes:
        log_z: estimate of log Z for each prompt, where the engine has one.
        diagnostics: how it went, by name, one number a prompt: such as the effective sample size or an acceptance rate.
        run: of rows that depend on each other, as a chain's states do, the chain or population of their prompt that they are of;
            None where every row is drawn by itself.
    """

    scored: Scored
    log_w: Float[Tensor, " B"]
    log_z: tuple[Estimate, ...] | None = None
    diagnostics: Mapping[str, Float[Tensor, " P"]] = field(default_factory=dict)
    run: Int[Tensor, " B"] | None = None

    def kept(self) -> Weighted:
        """Only the rows with positive weight."""
        keep = self.log_w > -torch.inf
        run = None if self.run is None else self.run[keep]
        return replace(self, scored=self.scored.select(keep), log_w=self.log_w[keep], run=run)


@dataclass(frozen=True)
class Forward:
    """One pass of the policy over a batch of draws: only what the engine's claim lists under `needs`.

    Column t belongs to the state s_t, the prompt and the t tokens before, and to the token a_t that follows it. Values are in
    nats: the value of a whole completion is its log-evidence r / beta. What is marked "no gradient" comes from the target
    network, a copy of the critic that is refreshed now and then.

    Attributes:
        log_q: log-probability of each token under the current policy, 0 on padding; carries gradient.
        kl: exact per-token KL(pi(.|s_t) || pi0(.|s_t)) over the vocabulary, 0 on padding.
        values: V(s_t); at the optimum V* = log E_pi0[exp(r / beta) | s_t].
        q: Q(s_t, a_t).
        q_target: Q(s_t, a_t), no gradient.
        soft_target: log sum_a pi0(a|s_t) exp Q(s_t, a), no gradient.
        max_target: max_a Q(s_t, a), no gradient.
        double_target: Q of the target network at the critic's own argmax_a Q(s_t, a), no gradient.
    """

    log_q: Float[Tensor, "B T"]
    kl: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    q: Float[Tensor, "B T"] | None = None
    q_target: Float[Tensor, "B T"] | None = None
    soft_target: Float[Tensor, "B T"] | None = None
    max_target: Float[Tensor, "B T"] | None = None
    double_target: Float[Tensor, "B T"] | None = None

    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors through which a loss depends on the policy's weights."""
        return tuple(value for f in fields(self) if (value := getattr(self, f.name)) is not None)


POLICY_FIELDS = frozenset({"log_q", "kl", "values"})
"""The fields of `Forward` that a policy gives; an engine whose loss reads another trains a critic."""

Info = Mapping[str, Tensor]
"""What an engine reports of a step: named tensors, detached; the loop logs their means."""
