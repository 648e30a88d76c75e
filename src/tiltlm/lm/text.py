"""Texts to tokens and back: chat templates whole and once, never two BOS, never an EOS before the completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tiltlm.errors import InputError
from tiltlm.records import Prompts, Text

COLUMN = "prompt"


def encode(
    data: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    eos: tuple[int, ...],
    *,
    room: int | None = None,
    chat: bool | None = None,
    column: str = COLUMN,
) -> Prompts:
    """Tokenise prompts.

    Args:
        data: strings, conversations (lists of messages) or rows (mappings with `column` and further columns;
            a `datasets.Dataset` is such a sequence).
        room: most tokens a prompt may have, so that the completion still fits into the model's context.
        chat: True sends plain strings through the chat template as one user message; None and False leave
            strings as they are. Conversations always take the template.

    Raises:
        InputError: naming the prompt's number and what is wrong with it.
    """
    rows = [_row(item, column, number) for number, item in enumerate(data, 1)]
    if not rows:
        raise InputError("there are no prompts: the list is empty; give at least one")
    texts: list[Text] = [_text(row[column], number, chat) for number, row in enumerate(rows, 1)]
    ids = [_tokens(text, tokenizer, eos, number) for number, text in enumerate(texts, 1)]
    for number, tokens in enumerate(ids, 1):
        if room is not None and len(tokens) > room:
            raise InputError(
                f"prompt {number} has {len(tokens)} tokens, and with the completion the model's context leaves room "
                f"for {room}; shorten the prompt or lower max_new_tokens"
            )
    width = max(len(tokens) for tokens in ids)
    padded = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros(len(ids), width, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        padded[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = True
    names = [name for name in rows[0] if name != column]
    columns = {name: tuple(row.get(name) for row in rows) for name in names}
    return Prompts(padded, mask, tuple(texts), columns)


def _row(item: Any, column: str, number: int) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        return {column: item}
    if column not in item:
        raise InputError(
            f"prompt {number} has no column {column!r}; it has {', '.join(map(repr, item)) or 'none'}: "
            f"name the one that holds the prompt (column: NAME)"
        )
    return item


def _text(value: Any, number: int, chat: bool | None) -> Text:
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"prompt {number} is empty; remove it or write a text")
        return ({"role": "user", "content": value},) if chat else value
    if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        return tuple(dict(message) for message in value)
    raise InputError(
        f"prompt {number} is {type(value).__name__} {value!r:.60}; a prompt is a text, or a list of messages with "
        f"'role' and 'content'"
    )


def _tokens(text: Text, tokenizer: PreTrainedTokenizerBase, eos: tuple[int, ...], number: int) -> list[int]:
    if isinstance(text, str):
        ids = list(tokenizer(text)["input_ids"])  # pyright: ignore[reportArgumentType, reportCallIssue]
        while len(ids) > 1 and ids[-1] in eos and not text.endswith(str(tokenizer.decode(ids[-1]))):
            ids.pop()  # some tokenizers end every text; a prompt is not the end
    else:
        ids = tokens_of(render(text, tokenizer, number), tokenizer)
    bos = tokenizer.bos_token_id
    while len(ids) > 1 and bos is not None and ids[0] == bos and ids[1] == bos:
        ids.pop(0)
    if not ids:
        raise InputError(f"prompt {number} {text!r} has no tokens; write a text that the tokenizer knows")
    return ids


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text, with nothing added: special tokens are in it already, or are not wanted."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore


def render(messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, number: int, *, answered: bool = False) -> str:
    """A conversation as the chat template writes it: up to where the model goes on, or with the last turn ended.

    Args:
        number: of the prompt, for the error message.
        answered: the last message is the answer, and ends as the template ends it.

    Raises:
        InputError: if there is no template, or the messages do not fit it.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"prompt {number} is a list of messages, but the model has no chat template; use an instruction-tuned "
            f"model, or give the prompt as plain text"
        )
    answering = not answered and messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tokenize=False,
            add_generation_prompt=not answering and not answered,
            continue_final_message=answering,
        )
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"prompt {number} does not fit the model's chat template ({reason[:160]}); mend its messages"
        ) from error
    return str(text)


def decode(tokens: torch.Tensor, mask: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Each row's real tokens as text, without special tokens."""
    rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    return tuple(tokenizer.batch_decode(rows, skip_special_tokens=True))
