"""Captions against what is in the picture: objects, counts, colours and relations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part

ASPECTS = ("objects", "counts", "colours", "relations")
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "grey", "gray",
    "gold", "silver",
)  # fmt: skip
RELATIONS = (
    "to the left of", "to the right of", "left of", "right of", "in front of", "next to",
    "above", "below", "under", "over", "beside", "behind", "inside", "on",
)  # fmt: skip
SAME = {
    "left of": "to the left of",
    "right of": "to the right of",
    "over": "above",
    "under": "below",
    "beside": "next to",
}
CONVERSE = {"to the right of": "to the left of", "below": "above", "behind": "in front of"}
"""Whoever is `how` somebody has that one `CONVERSE[how]` themselves."""
MUTUAL = ("next to",)
COUNTED = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: number for number, word in enumerate(COUNTED)}
ARTICLES = ("a", "an", "the")
IRREGULAR = {
    "leaves": "leaf", "wolves": "wolf", "knives": "knife", "loaves": "loaf", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "children": "child", "men": "man", "women": "woman", "people": "person",
}  # fmt: skip

Fact = tuple[Any, ...]


@dataclass(frozen=True)
class Thing:
    """One kind of object in a picture. Names are compared in lower case and in the singular."""

    name: str
    count: int = 1
    colour: str = ""


@dataclass(frozen=True)
class Scene:
    """What is to be seen: objects, and relations as (name, relation, name)."""

    things: tuple[Thing, ...]
    relations: tuple[tuple[str, str, str], ...] = ()

    @staticmethod
    def of(value: Any, where: str = "scene") -> Scene:
        """A scene from JSON: {"objects": [{"name": "heart", "count": 2, "colour": "red"}], "relations": [["heart", "above", "tree"]]}.

        Where there are two objects, `"relation": "above"` says how the first stands to the second.

        Raises:
            InputError: naming `where` if it is not of that form.
        """
        try:
            plain = json.loads(value) if isinstance(value, str) else value
            things = [
                Thing(singular(str(o["name"])), int(o.get("count") or 1), str(o.get("colour") or "").lower())
                for o in plain["objects"]
            ]
            told = plain.get("relations") or []
            if plain.get("relation"):
                first, second = plain["objects"]
                told = [(first["name"], plain["relation"], second["name"])]
            relations = [(singular(str(a)), str(how).lower(), singular(str(b))) for a, how, b in told]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f'{where} holds {value!r:.60}, which is no scene; write {{"objects": [{{"name": …, "count": …, "colour": …}}], '
                f'"relations": [[name, relation, name]]}}'
            ) from error
        return Scene(tuple(things), tuple(relations))

    def facts(self, aspects: Sequence[str] = ASPECTS) -> frozenset[Fact]:
        """What it says of each aspect, as facts that can be counted.

        An object's count is the sum over its colours. "a cat below a tree" is the same fact as "a tree above a cat".
        """
        totals: dict[str, int] = {}
        for thing in self.things:
            totals[thing.name] = totals.get(thing.name, 0) + thing.count
        found = {
            "objects": {("objects", name) for name in totals},
            "counts": {("counts", name, n) for name, n in totals.items()},
            "colours": {("colours", t.name, t.colour) for t in self.things if t.colour},
            "relations": {("relations", *_one_way(*relation)) for relation in self.relations},
        }
        return frozenset().union(*(found[aspect] for aspect in aspects))


def _one_way(first: str, how: str, second: str) -> Fact:
    """One of the two ways to say how things stand to each other."""
    how = SAME.get(how, how)
    if how in CONVERSE:
        return (second, CONVERSE[how], first)
    return (*sorted((first, second)), how) if how in MUTUAL else (first, how, second)


def read_scene(
    text: str, names: Sequence[str] = (), relations: Sequence[str] = RELATIONS, colours: Sequence[str] = COLOURS
) -> Scene:
    """The scene that a caption describes: "two red hearts and a rooster above an umbrella".

    Phrases are parted by commas, "and", and the relations, each of which holds between its neighbours. A phrase is a number or an
    article, a colour, and the object's name, each but the name optional.

    Args:
        names: objects whose names hold such words themselves ("salt and pepper").
    """
    said = " ".join(text.lower().strip(" .!").split())
    for place, name in enumerate(names):
        said = re.sub(rf"\b{re.escape(name.lower())}(s|es)?\b", f"⟨{place}⟩", said)
    longest_first = sorted((r.lower() for r in relations), key=len, reverse=True)
    parting = "|".join([r",\s*and\b", ",", r"\band\b", *(rf"\b{re.escape(r)}\b" for r in longest_first)])
    split = re.split(rf"\s*({parting})\s*", said)
    things = [_thing(phrase, names, colours) for phrase in split[::2]]
    found = [
        (left.name, how, right.name)
        for left, how, right in zip(things, split[1::2], things[1:], strict=False)
        if how in longest_first and left and right
    ]
    return Scene(tuple(thing for thing in things if thing), tuple(found))


def _thing(phrase: str, names: Sequence[str], colours: Sequence[str]) -> Thing | None:
    words, count, colour = phrase.split(), 1, ""
    if words and words[0] == "there":
        words = words[2:]  # there is, there are
    if words and (words[0] in NUMBERS or words[0].isdecimal() or words[0] in ARTICLES):
        said, words = words[0], words[1:]
        count = int(said) if said.isdecimal() else NUMBERS.get(said, 1)
    if len(words) > 1 and words[0] in colours:
        colour, words = words[0], words[1:]
    if not words or count == 0:
        return None
    known = re.fullmatch(r"⟨(\d+)⟩", words[0])
    return Thing(singular(names[int(known[1])] if known else " ".join(words)), count, colour)


def singular(name: str) -> str:
    """A name in lower case with its last word's plural ending off; the same rule for both sides of a comparison."""
    words = name.lower().split()
    if not words:
        return ""
    last = words[-1]
    if last in IRREGULAR:
        return " ".join([*words[:-1], IRREGULAR[last]])
    for ending, kept in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh")):
        if last.endswith(ending) and len(last) > len(ending) + 1:
            return " ".join([*words[:-1], last[: -len(ending)] + kept])
    plural = last.endswith("s") and not last.endswith("ss") and len(last) > 2
    return " ".join([*words[:-1], last[:-1] if plural else last])


@dataclass(frozen=True)
class SceneF1(Part):
    """How much of a picture a caption tells, and how much of what it tells is true: F1 over objects, counts, colours and relations.

    Over a corpus, precision, recall and F1 of each aspect, with all facts in one count (micro-averaged).

    Attributes:
        column: holds each picture's scene, as JSON; see `Scene.of`.
        aspects: which facts count: objects, counts, colours, relations.
        names: objects whose names hold "and", a comma or a relation.
        relations: the relations that captions use.
        colours: the colours that captions use.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    column: str = "scene"
    aspects: tuple[str, ...] = ASPECTS
    names: tuple[str, ...] = ()
    relations: tuple[str, ...] = RELATIONS
    colours: tuple[str, ...] = COLOURS

    def __post_init__(self) -> None:
        wrong = next((a for a in self.aspects if a not in ASPECTS), None)
        if wrong is not None or not self.aspects:
            raise InputError(f"aspects are {self.aspects}; choose some of {', '.join(ASPECTS)}")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        pairs = zip(texts, self._truths(columns), strict=True)
        return [_f1(*_counts(self._read(text).facts(self.aspects), truth.facts(self.aspects))) for text, truth in pairs]

    def summable(
        self, texts: Sequence[str], **columns: Sequence[Any]
    ) -> tuple[Float[Tensor, "B S"], Callable[[Float[Tensor, " S"]], dict[str, float]]]:
        """Per caption the facts that are right, told and true, of each aspect; and what their sums over a corpus mean."""
        rows = [
            [n for aspect in self.aspects for n in _counts(self._read(text).facts([aspect]), truth.facts([aspect]))]
            for text, truth in zip(texts, self._truths(columns), strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64), self._from_sums

    def corpus(self, texts: Sequence[str], **columns: Sequence[Any]) -> dict[str, float]:
        """F1 of all facts together over all captions, and precision, recall and F1 of each aspect."""
        counts, meaning = self.summable(texts, **columns)
        return meaning(counts.sum(0))

    def _from_sums(self, sums: Float[Tensor, " S"]) -> dict[str, float]:
        found = {self.label: _f1(*sums.view(-1, 3).sum(0).tolist())}
        for aspect, (right, told, true) in zip(self.aspects, sums.view(-1, 3).tolist(), strict=True):
            found |= {
                f"{aspect}/precision": right / told if told else float(not true),
                f"{aspect}/recall": right / true if true else 1.0,
                f"{aspect}/f1": _f1(right, told, true),
            }
        return found

    def _read(self, text: str) -> Scene:
        return read_scene(text, self.names, self.relations, self.colours)

    def _truths(self, columns: Mapping[str, Sequence[Any]]) -> list[Scene]:
        return [Scene.of(value, f"column {self.column!r} of reward {self.label!r}") for value in columns[self.column]]


def _counts(told: frozenset[Fact], true: frozenset[Fact]) -> tuple[float, float, float]:
    return float(len(told & true)), float(len(told)), float(len(true))


def _f1(right: float, told: float, true: float) -> float:
    return 2 * right / (told + true) if told + true else 1.0
