"""Requests for very short stories, with the number of sentences and a word that they must have."""

from __future__ import annotations

import itertools

from tiltlm.data.forms import PLACES, request, requests
from tiltlm.data.spec import Row

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
COUNTS = {2: "two", 3: "three", 4: "four"}
SENTENCE = r"[^.!?]+[.!?]"


def stories() -> list[Row]:
    """Every person, thing and place, with two to four sentences in turn."""
    found = []
    for number, (person, thing, place) in enumerate(itertools.product(PEOPLE, THINGS, PLACES)):
        count = list(COUNTS)[number % len(COUNTS)]
        prompt = f"Write a story of exactly {COUNTS[count]} sentences about {person} {place}. It must have the word {thing} in it."
        pattern = rf"(?is)^(?=.*\b{thing}\b)\s*({SENTENCE}\s*){{{count}}}$"
        truth = {"form": "story", "sentences": count, "word": thing}
        found.append(request(prompt, pattern, truth, f"{thing} {place}"))
    return found


SET = requests("A request for a story, and the form that it must have.", "thing", stories)
