"""Rewards that are log-probabilities: of the completion under a language model, of an answer given it, of each word in its place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part
from tiltlm.lm.load import LanguageModel, load
from tiltlm.lm.masked import MaskedLM, load_masked_lm
from tiltlm.lm.text import tokens_of, written
from tiltlm.lm.view import ModelPrior
from tiltlm.records import Prompts
from tiltlm.rewards.references import AgainstReference

Given = Literal["prompt", "nothing"]
CONTEXTS = 32
"""Different contexts in the model at a time; completions of one prompt share theirs."""


@dataclass(frozen=True)
class Fluency(Part):
    """The log-probability of the completion's text under a language model, in nats; a mean over its tokens by default.

    The α·P(x) of a reward α·P(x) + β·cos(x, target): `0.3 * Fluency(lm) + TopicSimilarity(text="space travel")`. The text is
    tokenised afresh, so that equal texts have equal rewards. With the prior's own model, the total given the prompt is log pi0
    without the end token; for the whole of log pi0 there is `tiltlm.Power`.

    Attributes:
        lm: a language model, or what `tiltlm.load` loads; in recipes, the recipe's model if none is named.
        given: "prompt" scores the completion after its prompt; "nothing" as a text of its own, after the model's first token.
        normalise: divide by the number of tokens. The total grows with length, and makes the posterior prefer short texts.
        end: count the end token as well. A completion without tokens has only that to judge, and it is always counted there:
            silence is not fluent.
    """

    extent: ClassVar[Bounds] = (-float("inf"), 0.0)
    on_prefixes: ClassVar[bool] = True
    lm: LanguageModel | str
    given: Given = "prompt"
    normalise: bool = True
    end: bool = False

    def __post_init__(self) -> None:
        if self.given not in ("prompt", "nothing"):
            raise InputError(f"given is {self.given!r}; choose prompt, nothing")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("prompts",) if self.given == "prompt" else ()

    @cached_property
    def _lm(self) -> LanguageModel:
        return _judge(self.lm)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        if not texts:
            return []
        tokenizer, eos = self._lm.body.tokenizer, self._lm.body.eos
        befores = self._befores(columns.get("prompts", ()), len(texts))
        ids = [tokens_of(text, tokenizer, after=before) for text, before in zip(texts, befores, strict=True)]
        last = [tokenizer.eos_token_id if tokenizer.eos_token_id in eos else eos[0]] if eos else []
        ids = [some + last if self.end or not some else some for some in ids]
        if self.given == "nothing":
            prompts, index = _nothing(self._lm), torch.zeros(len(ids), dtype=torch.long)
        else:
            prompts, index = _distinct(self._lm, columns["prompts"], max(map(len, ids)))
        return _log_prob(self._lm, prompts, index, ids, self.normalise)

    def _befores(self, prompts: Sequence[Any], count: int) -> list[str | None]:
        """What each text goes on from; None where it is a text of its own."""
        if self.given == "nothing":
            return [None] * count
        return [written(prompt, self._lm.body.templater, number) for number, prompt in enumerate(prompts, 1)]


@dataclass(frozen=True)
class AnswerLikelihood(AgainstReference):
    r"""The log-probability of a reference answer after prompt and completion, in nats: does the completion lead to the answer?

    A verifier without rules, for reasoning: VeriFree (Zhou et al. 2025, arXiv:2505.21493) rewards the answer's probability, JEPO
    (Tang et al. 2025, arXiv:2503.19618) bounds its logarithm. The answer stands in the same turn as the completion. Of several
    references the likeliest counts.

    Attributes:
        lm: a language model, or what `tiltlm.load` loads; in recipes, the recipe's model if none is named.
        column: holds the answer.
        bridge: what stands between completion and answer, such as "\nThe answer is ".
        normalise: divide by the answer's number of tokens.
    """

    extent: ClassVar[Bounds] = (-float("inf"), 0.0)
    on_prefixes: ClassVar[bool] = True
    lm: LanguageModel | str = ""
    bridge: str = " "
    normalise: bool = False

    def __post_init__(self) -> None:
        if not self.lm:
            raise InputError("lm is missing; give AnswerLikelihood the language model that judges")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("prompts", self.column)

    @cached_property
    def _lm(self) -> LanguageModel:
        return _judge(self.lm)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        references = self.references({self.column: columns[self.column]})
        contexts = [_continued(p, text + self.bridge) for p, text in zip(columns["prompts"], texts, strict=True)]
        rows = [row for row, some in enumerate(references) for _ in some]
        if not rows:
            return []
        body, answers = self._lm.body, [answer for some in references for answer in some]
        befores = [written(contexts[row], body.templater, row + 1) for row in rows]
        ids = [tokens_of(text, body.tokenizer, after=before) for text, before in zip(answers, befores, strict=True)]
        empty = next((row for row, some in zip(rows, ids, strict=True) if not some), None)
        if empty is not None:
            raise InputError(f"column {self.column!r} of reward {self.label!r} holds an empty answer; give a text")
        prompts, index = _distinct(self._lm, [contexts[row] for row in rows], max(map(len, ids)))
        log_p = _log_prob(self._lm, prompts, index, ids, self.normalise)
        best = [-float("inf")] * len(texts)
        for row, value in zip(rows, log_p, strict=True):
            best[row] = max(best[row], value)
        return best


@dataclass(frozen=True)
class PseudoLogLikelihood(Part):
    """How well each token of the completion fits its place: Σ log P(x_t | all others) by a masked LM (Salazar et al. 2020), in nats.

    It costs a pass for every token. The sum over no tokens would be 0, the most there is, and silence the best of texts. A
    completion without tokens has the value `empty` instead.

    Attributes:
        mlm: a masked language model, or what `load_masked_lm` loads.
        normalise: divide by the number of tokens.
        empty: of a completion without tokens, in nats; None for that of one token drawn blindly from the vocabulary, -log V.
    """

    extent: ClassVar[Bounds] = (-float("inf"), 0.0)
    mlm: MaskedLM | str
    normalise: bool = True
    empty: float | None = None

    def __post_init__(self) -> None:
        if self.empty is not None and not -math.inf < self.empty <= 0:
            raise InputError(
                f"empty is {self.empty}; it is a log-probability, give a finite number up to 0, or leave it out"
            )

    @cached_property
    def _mlm(self) -> MaskedLM:
        return load_masked_lm(self.mlm) if isinstance(self.mlm, str) else self.mlm

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        totals, counts = self._mlm.pseudo_log_likelihood(texts)
        values = (totals / counts.clamp(min=1) if self.normalise else totals).clamp(max=0.0)
        silence = -math.log(self._mlm.vocabulary) if self.empty is None else self.empty
        return values.masked_fill(counts == 0, silence).tolist()


def _judge(lm: LanguageModel | str) -> LanguageModel:
    """The language model that judges; it has to be one that goes on with a text."""
    loaded = load(lm) if isinstance(lm, str) else lm
    if loaded.body.backbone.has_encoder:
        raise InputError(
            f"lm is {loaded.body.name!r}, an encoder–decoder, which does not go on with a text; name a causal language model (lm: NAME)"
        )
    return loaded


def _law(lm: LanguageModel, longest: int) -> ModelPrior:
    return lm.prior(max_new_tokens=max(1, longest))


def _nothing(lm: LanguageModel) -> Prompts:
    """The empty context: the token that texts begin with, or else the one that they end with, as GPT-2 has it."""
    tokenizer = lm.body.tokenizer
    first: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise InputError(
            f"given is 'nothing', but {lm.body.name} has neither a first nor an end token to begin with; use given='prompt'"
        )
    return Prompts(torch.tensor([[first]]), torch.ones(1, 1, dtype=torch.bool), ("",))


def _distinct(lm: LanguageModel, contexts: Sequence[Any], longest: int) -> tuple[Prompts, Int[Tensor, " B"]]:
    """Every context once, and the place of each row's."""
    keys = [c if isinstance(c, str) else repr([sorted(m.items()) for m in c]) for c in contexts]
    place: dict[str, int] = {}
    first = []
    for key, context in zip(keys, contexts, strict=True):
        if key not in place:
            place[key] = len(first)
            first.append(context)
    return _law(lm, longest).encode(first), torch.tensor([place[key] for key in keys])


def _continued(prompt: Any, text: str) -> Any:
    """The prompt with the beginning of its answer."""
    if isinstance(prompt, str):
        return prompt + text
    turns: list[Mapping[str, str]] = [dict(message) for message in prompt]
    if turns[-1]["role"] == "assistant":
        return [*turns[:-1], {**turns[-1], "content": turns[-1]["content"] + text}]
    return [*turns, {"role": "assistant", "content": text}]


def _log_prob(
    lm: LanguageModel, prompts: Prompts, index: Int[Tensor, " B"], ids: Sequence[Sequence[int]], normalise: bool
) -> list[float]:
    """log P of each row's ids after its prompt, a few contexts at a time; no gradient."""
    if any(not some for some in ids):
        raise InputError(f"{lm.body.name} has no end token, so that an empty completion has no probability; drop it")
    law = _law(lm, max(map(len, ids)))
    found: Float[Tensor, " B"] = torch.zeros(len(ids), dtype=torch.float64)
    for start in range(0, len(prompts), CONTEXTS):
        here = range(start, min(start + CONTEXTS, len(prompts)))
        rows = ((index >= here.start) & (index < here.stop)).nonzero().flatten()
        some = law.complete(prompts.select(list(here)), index[rows] - here.start, [ids[row] for row in rows.tolist()])
        found[rows] = some.log_q.double().sum(-1)
    lengths = torch.tensor([len(some) for some in ids], dtype=torch.float64)
    return (found / lengths if normalise else found).clamp(max=0.0).tolist()
