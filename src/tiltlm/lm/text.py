"""Prompts to tokens and back: chat templates whole and once, never two BOS, never an EOS before the completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tiltlm.errors import InputError
from tiltlm.lm.images import empty_like, image_name, open_image, pixels, read_with_text, values_of, with_images
from tiltlm.records import Prompts, Text

COLUMN, IMAGE = "prompt", "image"

ANCHORS = (":", ".", ")", "\n")
"""Texts that another one can go on from, for tokenizers that put a space in front of a text: any that its tokens do not merge with."""


@dataclass(frozen=True)
class Reader:
    """How a model reads prompts.

    Attributes:
        eos: ids that end a completion.
        processor: transformers' processor, for a model that reads images.
        source: prompts are sources of an encoder, which keep the tokenizer's end token.
        image_alone: an image is the whole prompt.
        reads_images: images may be in prompts, or are prompts.
    """

    tokenizer: PreTrainedTokenizerBase
    eos: tuple[int, ...] = ()
    processor: Any = None
    source: bool = False
    image_alone: bool = False
    reads_images: bool = False

    @property
    def templater(self) -> Any:
        """Whose chat template holds: the processor's, if it has one."""
        return self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer


@dataclass(frozen=True)
class _Read:
    """One prompt: as the user wrote it, its tokens, and what the model reads beside them."""

    text: Text
    ids: list[int]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


def encode(
    data: Sequence[Any],
    reader: Reader,
    *,
    room: int | None = None,
    chat: bool | None = None,
    column: str = COLUMN,
    image: str = IMAGE,
) -> Prompts:
    """Tokenise prompts.

    Args:
        data: strings, conversations (lists of messages) or rows (mappings with `column`, or with `image`, and further columns;
            a `datasets.Dataset` is such a sequence). Where an image is the whole prompt, images by themselves.
        room: most tokens a prompt may have: what the encoder takes, or what leaves space for the completion.
        chat: True sends plain strings through the chat template as one user message; None and False leave
            strings as they are. Conversations always take the template.
        image: the column that holds a prompt's image (or a list of them), where the model reads images.

    Raises:
        InputError: naming the prompt's number and what is wrong with it.
    """
    rows = [_row(item, column, image, reader, number) for number, item in enumerate(data, 1)]
    if not rows:
        raise InputError("there are no prompts: the list is empty; give at least one")
    read = [_read(row, column, image, chat, reader, number) for number, row in enumerate(rows, 1)]
    for number, prompt in enumerate(read, 1):
        if room is not None and len(prompt.ids) > room:
            raise InputError(_too_long(number, len(prompt.ids), room, reader))
    width = max(len(prompt.ids) for prompt in read)
    padded = torch.zeros(len(read), width, dtype=torch.long)
    mask = torch.zeros(len(read), width, dtype=torch.bool)
    for row, prompt in enumerate(read):
        padded[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids, dtype=torch.long)
        mask[row, width - len(prompt.ids) :] = True
    own = {column, image} if reader.processor is not None else {column}
    names = [name for name in rows[0] if name not in own]
    columns = {name: tuple(row.get(name) for row in rows) for name in names}
    return Prompts(padded, mask, tuple(prompt.text for prompt in read), columns, inputs=_together(read))


def _too_long(number: int, tokens: int, room: int, reader: Reader) -> str:
    if reader.source:
        return f"prompt {number} has {tokens} tokens, and the encoder takes {room}; shorten the source, or split it"
    return (
        f"prompt {number} has {tokens} tokens, and with the completion the model's context leaves room "
        f"for {room}; shorten the prompt or lower max_new_tokens"
    )


def _together(read: Sequence[_Read]) -> dict[str, tuple[Tensor, ...]]:
    """The inputs by name, a tensor a prompt."""
    some = {name: tensor for prompt in read for name, tensor in prompt.inputs.items()}
    return {
        name: tuple(p.inputs.get(name, empty_like(tensor, name, len(p.ids))) for p in read)
        for name, tensor in some.items()
    }


def _row(item: Any, column: str, image: str, reader: Reader, number: int) -> Mapping[str, Any]:
    if reader.image_alone:
        row = item if isinstance(item, Mapping) and not {"bytes", "path"} & set(item) else {image: item}
        if row.get(image) is None:
            raise InputError(
                f"prompt {number} has no image in column {image!r}; it has {', '.join(map(repr, row)) or 'none'}: name the one "
                f"that holds the image (image: NAME)"
            )
        return row
    if not isinstance(item, Mapping):
        return {column: item}
    if column not in item:
        raise InputError(
            f"prompt {number} has no column {column!r}; it has {', '.join(map(repr, item)) or 'none'}: "
            f"name the one that holds the prompt (column: NAME)"
        )
    return item


def _read(row: Mapping[str, Any], column: str, image: str, chat: bool | None, reader: Reader, number: int) -> _Read:
    if reader.image_alone:
        return _read_image(row, column, image, reader, number)
    text = _text(row[column], number, chat)
    if reader.processor is None:
        if _asks_for_image(text) or (reader.reads_images and values_of(row.get(image))):
            raise InputError(f"prompt {number} has an image, {_no_processor(reader)}")
        return _Read(text, _tokens(text, reader, number))
    images, token = values_of(row.get(image)), getattr(reader.processor, "image_token", None)
    if isinstance(text, str):
        rendered = text if not images or token is None or token in text else token * len(images) + text
    else:
        text, images = with_images(text, images)
        rendered = render(text, reader.templater, number)
    if not images and (_asks_for_image(text) or (token is not None and token in rendered)):
        raise InputError(f"prompt {number} has a place for an image and no image; put one into its column {image!r}")
    if not images:
        return _Read(text, _tokens(text, reader, number))
    opened = [open_image(value, number) for value in images]
    ids, inputs = read_with_text(reader.processor, rendered, opened, number, special=isinstance(text, str))
    return _Read(text, _one_bos(ids, reader.tokenizer), inputs)


def _read_image(row: Mapping[str, Any], column: str, image: str, reader: Reader, number: int) -> _Read:
    if reader.processor is None:
        raise InputError(f"prompt {number} is an image, {_no_processor(reader)}")
    if row.get(column) is not None:
        raise InputError(
            f"prompt {number} has a text in column {column!r}, but the model reads its image alone; leave that column out, or name "
            f"another one (column: NAME)"
        )
    values = values_of(row[image])
    if len(values) != 1:
        raise InputError(f"prompt {number} has {len(values)} images; the model reads one")
    return _Read(image_name(values[0], number), [], pixels(reader.processor, open_image(values[0], number), number))


def _no_processor(reader: Reader) -> str:
    if reader.reads_images:
        return (
            "and the model comes without an image processor; put one into its folder, or give load(..., processor=...)"
        )
    return "and the model reads texts alone; take a vision-language model"


def _asks_for_image(text: Text) -> bool:
    contents = [] if isinstance(text, str) else [message.get("content") for message in text]
    return any(part.get("type") == "image" for some in contents if isinstance(some, list) for part in some)


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


def _tokens(text: Text, reader: Reader, number: int) -> list[int]:
    tokenizer: Any = reader.tokenizer
    if not isinstance(text, str):
        text = render(text, reader.templater, number)
        ids = list(tokenizer(text)["input_ids"]) if reader.source else tokens_of(text, tokenizer)
    else:
        ids = list(tokenizer(text)["input_ids"])
        while (
            not reader.source
            and len(ids) > 1
            and ids[-1] in reader.eos
            and not text.endswith(str(tokenizer.decode(ids[-1])))
        ):
            ids.pop()  # some tokenizers end every text; a prompt is not the end
    ids = _one_bos(ids, tokenizer)
    if not ids:
        raise InputError(f"prompt {number} {text!r} has no tokens; write a text that the tokenizer knows")
    return ids


def _one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    while len(ids) > 1 and bos is not None and ids[0] == bos and ids[1] == bos:
        ids = ids[1:]
    return ids


def tokens_of(
    text: str, tokenizer: PreTrainedTokenizerBase, *, target: bool = False, after: str | None = None
) -> list[int]:
    """The ids of a text, with nothing added: special tokens are in it already, or are not wanted.

    SentencePiece puts a space in front of every text. One that goes on from another has none that nobody wrote: its tokens are
    those that follow when both are tokenised together, if the first keeps its own.

    Args:
        target: the text is what an encoder–decoder writes, whose tokenizer may have a second vocabulary for it.
        after: what the text goes on from; None for a text of its own.
    """
    known: Any = tokenizer

    def ids(some: str) -> list[int]:
        return list(known(**{"text_target" if target else "text": some}, add_special_tokens=False)["input_ids"])

    if after is not None and (anchors := _anchors(tokenizer)):
        for before in (after, *anchors):
            first, both = ids(before), ids(before + text)
            if both[: len(first)] == first:
                return both[len(first) :]
    return ids(text)


@lru_cache(maxsize=8)
def _anchors(tokenizer: Any) -> tuple[str, ...]:
    """Those of `ANCHORS` after which a text has no space; none for a tokenizer that does not put one in front of a text anyway."""

    def shows(anchor: str) -> bool:
        alone, first, both = (
            list(tokenizer(some, add_special_tokens=False)["input_ids"]) for some in ("a", anchor, f"{anchor}a")
        )
        after = both[len(first) :]
        if not first or both[: len(first)] != first or after in ([], alone):
            return False
        return tokenizer.decode(both) == tokenizer.decode(first) + "a"

    try:
        return tuple(filter(shows, ANCHORS))
    except Exception:  # `tokenizers` has no other class; one without an unknown token stops at a text it does not know
        return ()


@lru_cache(maxsize=8)
def _stripped(tokenizer: Any) -> tuple[list[int], str] | None:
    """What to decode a completion after, as ids and text, where decoding it by itself would lose the space that it begins with."""
    anchors = _anchors(tokenizer)
    if not anchors:
        return None
    first, spaced = (list(tokenizer(some, add_special_tokens=False)["input_ids"]) for some in (anchors[0], "a"))
    text = tokenizer.decode(first)
    loses = tokenizer.decode(spaced) == "a" and tokenizer.decode([*first, *spaced]) == f"{text} a"
    return (first, text) if loses else None


def written(prompt: Text, templater: Any, number: int) -> str:
    """A prompt as the text that its completion goes on from; arguments and errors as for `render`."""
    return prompt if isinstance(prompt, str) else render(prompt, templater, number)


def render(messages: Sequence[Any], templater: Any, number: int, *, answered: bool = False) -> str:
    """A conversation as the chat template writes it: up to where the model goes on, or with the last turn ended.

    Args:
        templater: the tokenizer, or a processor with a template of its own.
        number: of the prompt, for the error message.
        answered: the last message is the answer, and ends as the template ends it.

    Raises:
        InputError: if there is no template, or the messages do not fit it.
    """
    if templater.chat_template is None:
        raise InputError(
            f"prompt {number} is a list of messages, but the model has no chat template; use an instruction-tuned "
            f"model, or give the prompt as plain text"
        )
    answering = not answered and messages[-1]["role"] == "assistant"
    try:
        text = templater.apply_chat_template(
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


def decode(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, *, on_its_own: bool) -> tuple[str, ...]:
    """Completions as texts without special tokens.

    Args:
        on_its_own: a completion is a text of its own, as an encoder–decoder's; others go on from their prompts, and a space that
            one of them begins with is there.
    """
    anchor = None if on_its_own else _stripped(tokenizer)
    if anchor is None:
        return tuple(tokenizer.batch_decode(rows, skip_special_tokens=True))
    first, begun = anchor
    texts = tokenizer.batch_decode([[*first, *row] for row in rows], skip_special_tokens=True)
    return tuple(
        text[len(begun) :] if text.startswith(begun) else str(tokenizer.decode(row, skip_special_tokens=True))
        for text, row in zip(texts, rows, strict=True)
    )
