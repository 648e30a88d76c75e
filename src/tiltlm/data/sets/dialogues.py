"""Requests for dialogues, with the number of lines and who speaks them."""

from __future__ import annotations

import itertools
import re

from tiltlm.data.forms import PLACES, request, requests
from tiltlm.data.spec import Row

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
    "a late train",
    "a recipe for soup",
    "an old photograph",
    "a new neighbour",
    "the stars",
    "a garden",
    "a holiday",
    "a football match",
)
EXAMPLES = (
    ("Lea and Tom", "a lost key, in a kitchen", "Lea: Did you lock the door?\nTom: I thought you had the key."),
    (
        "Max and Eva",
        "a boat, on a beach",
        "Max: Is that your boat?\nEva: It was my father's.\nMax: Will you sell it?\nEva: Never.",
    ),
)
"""Ours; they show the form."""


def dialogues() -> list[Row]:
    """All speakers, topics and places, with two or four lines in turn."""
    shown = [
        message
        for speakers, topic, lines in EXAMPLES
        for message in (_said("user", _asked(speakers, topic, lines.count("\n") + 1)), _said("assistant", lines))
    ]
    found = []
    for number, (speakers, topic, place) in enumerate(itertools.product(SPEAKERS, TOPICS, PLACES)):
        count = 2 * (1 + number % 2)
        one, other = speakers.split(" and ")
        prompt = _asked(speakers, f"{topic}, {place}", count)
        turn = rf"{re.escape(one)}: [^\n]+\n{re.escape(other)}: [^\n]+"
        pattern = rf"^\s*{turn}(\n{turn}){{{count // 2 - 1}}}\s*$"
        truth = {"form": "dialogue", "lines": count, "speakers": [one, other]}
        row = request(prompt, pattern, truth, f"{topic} {place}")
        found.append({**row, "messages": [*shown, _said("user", prompt)]})
    return found


def _asked(speakers: str, topic: str, count: int) -> str:
    first = speakers.partition(" ")[0]
    return (
        f"Write a dialogue of exactly {count} lines between {speakers} about {topic}. Begin each line with the speaker's name and a "
        f"colon; {first} begins."
    )


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SET = requests(
    "A request for a dialogue, and the form that it must have.",
    "topic",
    dialogues,
    {"messages": "the same as a conversation, after two requests with their dialogues"},
)
