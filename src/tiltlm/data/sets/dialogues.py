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


def dialogues() -> list[Row]:
    """All speakers, topics and places, with two or four lines in turn."""
    found = []
    for number, (speakers, topic, place) in enumerate(itertools.product(SPEAKERS, TOPICS, PLACES)):
        count = 2 * (1 + number % 2)
        one, other = speakers.split(" and ")
        prompt = (
            f"Write a dialogue of exactly {count} lines between {speakers} about {topic}, {place}. Begin each line with the speaker's "
            f"name and a colon; {one} begins."
        )
        turn = rf"{re.escape(one)}: [^\n]+\n{re.escape(other)}: [^\n]+"
        pattern = rf"^\s*{turn}(\n{turn}){{{count // 2 - 1}}}\s*$"
        truth = {"form": "dialogue", "lines": count, "speakers": [one, other]}
        found.append(request(prompt, pattern, truth, f"{topic} {place}"))
    return found


SET = requests("A request for a dialogue, and the form that it must have.", "topic", dialogues)
