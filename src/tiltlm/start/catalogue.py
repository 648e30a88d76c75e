"""The starts there are: what each reads, how large its model is, and how its texts are judged."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tiltlm.errors import InputError
from tiltlm.lm.scratch.architecture import Size
from tiltlm.rewards.overlap import BLEU, CHRF
from tiltlm.start.training import Schedule

Metrics = Callable[[Sequence[str], Sequence[str], Sequence[str]], Mapping[str, float]]
"""(texts, references, sources) -> figures by name."""


@dataclass(frozen=True)
class Start:
    """A supervised start.

    Attributes:
        reads: the column that the model conditions on.
        data: the data set that it is trained on by default.
        size, schedule: of the model and the training, by default.
        vocabulary: most entries of the tokenizer.
        longest_source, longest_target: in tokens; longer rows are left out and counted.
        metrics: of greedy texts on the validation rows.
    """

    name: str
    what: str
    reads: Literal["prompt", "image"]
    data: str
    size: Size
    schedule: Schedule
    vocabulary: int
    longest_source: int
    longest_target: int
    metrics: Metrics

    @property
    def quick(self) -> Start:
        """The same in half a minute on two cores, for a test that everything runs; its texts are worth little."""
        smaller = replace(self.size, width=96, heads=4, feedforward=256)
        sooner = replace(self.schedule, steps=100, warmup=15, validate_every=50, batch_tokens=1024)
        return replace(self, size=smaller, schedule=sooner, vocabulary=min(self.vocabulary, 3000))


def _translation(texts: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> dict[str, float]:
    parts = (BLEU(column="reference"), CHRF(column="reference"))
    found = {name: value for part in parts for name, value in part.corpus(texts, reference=references).items()}
    copied = CHRF(column="reference").corpus(sources, reference=references)
    return {**found, **{f"{name} of the source itself": value for name, value in copied.items()}}


def _captions(texts: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> dict[str, float]:
    same = [" ".join(text.split()) == " ".join(truth.split()) for text, truth in zip(texts, references, strict=True)]
    return {
        "exact match": sum(same) / len(same),
        "chrf": CHRF(column="reference").corpus(texts, reference=references)["chrf"],
    }


TRANSLATION = Start(
    name="translation",
    what="an encoder–decoder (Marian) from one language into another",
    reads="prompt",
    data="packages-en-fr",
    size=Size(dropout=0.0),  # it sees each pair a few times: there is nothing to forget yet
    schedule=Schedule(steps=3500, lr=1e-3, smoothing=0.0, batch_tokens=512),
    vocabulary=2000,
    longest_source=160,
    longest_target=160,
    metrics=_translation,
)
VERSES = replace(
    TRANSLATION,
    name="translation-es",
    what="the same from English into Spanish, on verses of the Bible",
    data="bible-en-es",
    schedule=replace(TRANSLATION.schedule, steps=4000, validate_every=500),  # 400 verses take seconds to judge
    vocabulary=4000,  # whole words: no names of programs to copy piece by piece
    longest_source=64,
    longest_target=64,
)
CAPTIONS = Start(
    name="captions",
    what="a frozen EfficientNet-Lite0 and a decoder (GPT-2) that attends to its patches",
    reads="image",
    data="emoji-scenes",
    size=Size(width=160, layers=3, heads=5, feedforward=480),
    schedule=Schedule(steps=900, batch_tokens=1024, lr=2e-3, bfloat16=True),
    vocabulary=2000,
    longest_source=1,
    longest_target=40,
    metrics=_captions,
)
STAMPS = replace(
    CAPTIONS,
    name="captions-stamps",
    what="the same on photographs and drawings for children",
    data="stamps",
    schedule=replace(CAPTIONS.schedule, steps=540),
)
STARTS: Mapping[str, Start] = {start.name: start for start in (TRANSLATION, VERSES, CAPTIONS, STAMPS)}


def find_start(name: str) -> Start:
    """A start by its name.

    Raises:
        InputError: if there is none, naming those that there are.
    """
    if name not in STARTS:
        near = difflib.get_close_matches(str(name), STARTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(STARTS)}"
        raise InputError(f"start is {name!r}; {hint}")
    return STARTS[name]


Rows = Sequence[Mapping[str, Any]]


def columns_of(start: Start, rows: Rows, split: str) -> tuple[list[Any], list[str]]:
    """Sources and references of rows.

    Raises:
        InputError: naming the split, the row and what is wrong with it.
    """
    if not rows:
        raise InputError(
            f"the {split} rows are none; a start needs some to {'learn from' if split == 'train' else 'stop by'}"
        )
    sources, references = [], []
    for place, row in enumerate(rows):
        where = f"row {place + 1} of the {split} rows"
        for column in (start.reads, "reference"):
            if column not in row:
                raise InputError(f"{where} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
        source, reference = row[start.reads], row["reference"]
        texts = {"reference": reference, **({"prompt": source} if start.reads == "prompt" else {})}
        for column, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{column} of {where} is {text!r}; it must be a text that is not empty")
        sources.append(source)
        references.append(reference)
    return sources, references
