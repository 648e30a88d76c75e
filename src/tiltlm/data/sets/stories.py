"""Story and dialogue prompts with a form to keep to: made of templates of ours, not collected."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiltlm.data.spec import DataSet, Progress, Row, Tally

PEOPLE = (
    "a baker",
    "a lighthouse keeper",
    "a young engineer",
    "an old sailor",
    "a librarian",
    "a shepherd",
    "a violinist",
    "a gardener",
)
THINGS = ("lantern", "key", "map", "letter", "clock", "boat", "mirror", "kite", "coin", "violin", "suitcase", "stone")
PLACES = (
    "in a small harbour",
    "on a night train",
    "at the edge of a forest",
    "in an empty theatre",
    "on a snowy mountain",
)
SPEAKERS = ("Ann and Ben", "Carla and David", "Emil and Fatima", "Grace and Hugo", "Ines and Jakob")
TOPICS = (
    "a lost dog",
    "the weather",
    "a new bridge",
    "a broken bicycle",
    "their favourite film",
    "an exam",
    "a birthday",
    "the sea",
)
COUNTS = {2: "two", 3: "three", 4: "four"}
SENTENCE = r"[^.!?]+[.!?]"


def rows(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
    """Every combination of the lists, in one of the forms."""
    return [*_stories(), *_dialogues()]


def _stories() -> list[Row]:
    found = []
    for number, (person, thing, place) in enumerate(itertools.product(PEOPLE, THINGS, PLACES)):
        count = list(COUNTS)[number % len(COUNTS)]
        prompt = f"Write a story of exactly {COUNTS[count]} sentences about {person} {place}. It must have the word {thing} in it."
        pattern = rf"(?is)^(?=.*\b{thing}\b)\s*({SENTENCE}\s*){{{count}}}$"
        truth = {"form": "story", "sentences": count, "word": thing}
        found.append(
            {"prompt": prompt, "pattern": pattern, "constraint": json.dumps(truth), "group": f"{thing} {place}"}
        )
    return found


def _dialogues() -> list[Row]:
    found = []
    for number, (speakers, topic, place) in enumerate(itertools.product(SPEAKERS, TOPICS, PLACES)):
        count = 2 * (1 + number % 3)
        one, other = speakers.split(" and ")
        prompt = (
            f"Write a dialogue of exactly {count} lines between {speakers} about {topic}, {place}. Begin each line with the speaker's "
            f"name and a colon; {one} begins."
        )
        turn = rf"{re.escape(one)}: [^\n]+\n{re.escape(other)}: [^\n]+"
        pattern = rf"^\s*{turn}(\n{turn}){{{count // 2 - 1}}}\s*$"
        truth = {"form": "dialogue", "lines": count, "speakers": [one, other]}
        found.append(
            {"prompt": prompt, "pattern": pattern, "constraint": json.dumps(truth), "group": f"{topic} {place}"}
        )
    return found


SET = DataSet(
    task="text generation",
    what="A request for a story or a dialogue, and the form that it must have. Made of templates, for want of a free collection.",
    licence="TiltLM's, Apache-2.0",
    sources=(),
    columns={
        "prompt": "the request",
        "pattern": "regular expression of completions that have the form",
        "constraint": "JSON: the form in a structure",
        "group": "thing or topic, and place",
    },
    content=("prompt", "group"),
    split="by thing or topic and place: no such combination is in two splits",
    rows=rows,
    groups=lambda rows, progress: [row["group"] for row in rows],
)
