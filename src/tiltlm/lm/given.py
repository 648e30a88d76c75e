"""Completions that somebody wrote, as records: preferences and demonstrations, in TRL's columns.

A completion is what the model would have said: a text by itself with an end token after it, or, in a conversation, the
assistant's turn as the chat template writes it, up to its end token. What is longer than the prior's law allows is cut there,
as the model would have been.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tiltlm.content import content
from tiltlm.errors import InputError, TiltWarning
from tiltlm.lm.text import render, tokens_of, written
from tiltlm.lm.view import View
from tiltlm.records import Prompts, Scored, Text, shown


def preferences(prior: View, rows: Sequence[Mapping[str, Any]]) -> Scored:
    """Rows with `prompt`, `chosen` and `rejected`, as completions with pairs between them.

    Each of the three is a text or a list of messages. Where `chosen` and `rejected` are whole conversations, the prompt is what
    they share, and needs no column. Rows with the same prompt share it.

    Returns:
        Two completions a row, with (chosen, rejected) in `pairs`. Whoever wrote them, their `log_q` is the prior's, and
        their evidence is NaN: not known. Train with `fit(target, scored.draws.prompts, engine=DPO(), source=Given(scored))`,
        where `target` is `prior * Preferences(beta=...)`, or the prior with a reward.

    Raises:
        InputError: naming the row and what is wrong with it.

    Warns:
        TiltWarning: how many completions were cut.
    """
    written = [comparison(row, number, prior.column, prior.image) for number, row in enumerate(rows, 1)]
    return _scored(prior, written, torch.arange(2 * len(written)).view(-1, 2))


def demonstrations(prior: View, rows: Sequence[Mapping[str, Any]]) -> Scored:
    """Rows with `prompt` and `completion`, or with `messages` that end with the assistant's, as completions to learn.

    Of `messages`, the last is the completion and all before it the prompt. Of a preference (`chosen` and `rejected`) the
    completion is the chosen one.

    Returns:
        One completion a row; `log_q` and the evidence as for `preferences`. Train with
        `fit(target, scored.draws.prompts, engine=SFT(), source=Given(scored))`.

    Raises:
        InputError: naming the row and what is wrong with it.

    Warns:
        TiltWarning: how many completions were cut.
    """
    written = [_demonstration(row, number, prior.column, prior.image) for number, row in enumerate(rows, 1)]
    return _scored(prior, written, None)


@dataclass(frozen=True)
class Written:
    """A row: its number from 1, a prompt, texts or messages that continue it, and the row's further columns."""

    number: int
    prompt: Any
    completions: tuple[Any, ...]
    columns: Mapping[str, Any]


def comparison(row: Mapping[str, Any], number: int, column: str, image: str | None = None) -> Written:
    """A row with `chosen` and `rejected`; the prompt is their column (or its image's), or what the two conversations share.

    Raises:
        InputError: if a column is missing.
    """
    chosen, rejected = field_of(row, "chosen", number), field_of(row, "rejected", number)
    rest = {name: value for name, value in row.items() if name not in (column, "chosen", "rejected")}
    shared = 0 if is_conversation(row.get(column)) else _shared(chosen, rejected)
    if shared:
        return Written(number, list(chosen[:shared]), (chosen[shared:], rejected[shared:]), rest)
    return Written(number, _prompt_of(row, column, image, number), (chosen, rejected), rest)


def _shared(chosen: Any, rejected: Any) -> int:
    """How many messages two conversations begin with in common, their last ones apart; 0 for texts."""
    if not (is_conversation(chosen) and is_conversation(rejected)):
        return 0
    both = zip(chosen[:-1], rejected[:-1], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))


def _demonstration(row: Mapping[str, Any], number: int, column: str, image: str | None) -> Written:
    if "messages" in row and "completion" not in row:
        messages = row["messages"]
        if not is_conversation(messages) or len(messages) < 2:
            raise InputError(f"row {number} has messages {messages!r:.60}; give at least a user's and the assistant's")
        rest = {name: value for name, value in row.items() if name not in (column, "messages")}
        return Written(number, list(messages[:-1]), (messages[-1:],), rest)
    if "chosen" in row and "completion" not in row:
        compared = comparison(row, number, column, image)
        return replace(compared, completions=compared.completions[:1])
    completion = field_of(row, "completion", number)
    rest = {name: value for name, value in row.items() if name not in (column, "completion")}
    return Written(number, _prompt_of(row, column, image, number), (completion,), rest)


def _prompt_of(row: Mapping[str, Any], column: str, image: str | None, number: int) -> Any:
    """A row's prompt; None where an image, which is among the further columns, is all of it."""
    alone = row.get(column) is None and image is not None and row.get(image) is not None
    return None if alone else field_of(row, column, number)


def field_of(row: Mapping[str, Any], name: str, number: int) -> Any:
    """A row's column, which has to be there."""
    if name in row and row[name] is None:
        raise InputError(f"row {number} has nothing (null) in {name!r}; fill it in, or leave the row out")
    if name not in row:
        raise InputError(
            f"row {number} has no {name!r}; it has {', '.join(map(repr, row)) or 'nothing'}: preferences need "
            f"prompt, chosen and rejected, demonstrations prompt and completion"
        )
    return row[name]


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, Sequence) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _scored(prior: View, written: Sequence[Written], pairs: Int[Tensor, "M 2"] | None) -> Scored:
    if not written:
        raise InputError("there are no rows: the list is empty; give at least one")
    prompts, places = _prompts(prior, written)
    ids: list[list[int]] = []
    for row, place in zip(written, places, strict=True):
        ids += [_ids(prior, prompts.texts[place], completion, row.number) for completion in row.completions]
    limit = prior.law.max_new_tokens
    cut = sum(len(some) > limit for some in ids)
    if cut:
        warnings.warn(
            f"{cut} of {len(ids)} completions are longer than max_new_tokens = {limit} and were cut there; raise it if "
            f"their ends matter",
            TiltWarning,
            stacklevel=3,
        )
    index = torch.tensor(places).repeat_interleave(len(written[0].completions))
    draws = prior.complete(prompts, index, [some[:limit] for some in ids])
    impossible = (draws.log_prob == -torch.inf).nonzero().flatten().tolist()
    if impossible:
        raise InputError(
            f"completion {draws.texts[impossible[0]]!r:.80} has probability zero under the prior, so that no posterior holds it; "
            f"leave its row out, or take a prior without top_k"
        )
    unknown = torch.full((len(draws),), torch.nan, dtype=torch.float64)
    return Scored(draws, log_prior=draws.log_q, log_evidence=unknown, pairs=pairs)


def _prompts(prior: View, written: Sequence[Written]) -> tuple[Prompts, list[int]]:
    """Every prompt once, and the place of each row's.

    A column goes with the prompts if all rows of a prompt agree on it; one on which they differ is about the completions.
    """
    keys = [content([row.prompt, row.columns.get(prior.image)]) for row in written]
    first: dict[str, Written] = {}
    for key, row in zip(keys, written, strict=True):
        first.setdefault(key, row)
    shared = [
        name
        for name in written[0].columns
        if all(
            content(row.columns.get(name)) == content(first[key].columns.get(name))
            for key, row in zip(keys, written, strict=True)
        )
    ]
    data = [
        {
            **({} if row.prompt is None else {prior.column: row.prompt}),
            **{name: row.columns.get(name) for name in shared},
        }
        for row in first.values()
    ]
    order = {key: place for place, key in enumerate(first)}
    return prior.encode(data), [order[key] for key in keys]


def _ids(prior: View, prompt: Text, completion: Any, number: int) -> list[int]:
    """A completion's tokens with the end token, before any cut."""
    tokenizer, eos = prior.body.tokenizer, prior.body.eos
    answer = answer_of(completion, number)
    on_its_own = prior.body.backbone.has_encoder  # a decoder begins its answer itself
    text = answer if isinstance(prompt, str) or on_its_own else _turn(prior, prompt, answer, number)
    before = None if on_its_own else written(prompt, prior.body.templater, number)
    if prior.law.stop:
        return _stopped(prior, text, before, number)
    ids = tokens_of(text, tokenizer, target=on_its_own, after=before)
    end = next((place for place, token in enumerate(ids) if token in eos), None)
    if end is not None:
        return ids[: end + 1]
    if eos:
        return [*ids, tokenizer.eos_token_id if tokenizer.eos_token_id in eos else eos[0]]
    if len(ids) < prior.law.max_new_tokens:
        raise InputError(
            f"row {number}: completion {answer!r:.60} has {len(ids)} tokens and cannot end, because the model has no end token; "
            f"give max_new_tokens = {prior.law.max_new_tokens} tokens"
        )
    return ids


def _stopped(prior: View, text: str, before: str | None, number: int) -> list[int]:
    """The tokens of a completion up to its first stop string, with which it ends; one is added where there is none.

    Args:
        before: the prompt that it goes on from; None where it is a text of its own.
    """
    whole = text if any(stop in text for stop in prior.law.stop) else text + prior.law.stop[0]
    ids = tokens_of(whole, prior.body.tokenizer, target=before is None, after=before)
    end = next((end for end in range(1, len(ids) + 1) if prior.ends(ids[:end])), None)
    if end is None:
        raise InputError(
            f"row {number}: completion {text!r:.60} does not end with stop {prior.law.stop} once it is tokenised; write it so that it does"
        )
    return ids[:end]


def answer_of(completion: Any, number: int) -> str:
    """The text of a completion, which may be a list with the assistant's message."""
    if isinstance(completion, str):
        return completion
    if is_conversation(completion) and len(completion) == 1 and completion[0]["role"] == "assistant":
        return str(completion[0]["content"])
    raise InputError(
        f"row {number} has completion {completion!r:.80}; a completion is a text, or a list with one message of the assistant"
    )


def _turn(prior: View, prompt: tuple[Mapping[str, Any], ...], answer: str, number: int) -> str:
    """What the chat template writes after the prompt when the assistant has answered."""
    templater = prior.body.templater
    start = render(prompt, templater, number)
    before, last = list(prompt), prompt[-1]
    if last["role"] == "assistant":  # the prompt begins the answer
        before, answer = before[:-1], shown((last,)) + answer
    content = answer if isinstance(last["content"], str) else [{"type": "text", "text": answer}]
    whole = render([*before, {"role": "assistant", "content": content}], templater, number, answered=True)
    if not whole.startswith(start):
        raise InputError(
            f"row {number}: the chat template writes the prompt differently once it is answered, so that the answer cannot be "
            f"told from it; give prompts and completions as plain text"
        )
    return whole[len(start) :]


__all__ = ["demonstrations", "preferences"]
