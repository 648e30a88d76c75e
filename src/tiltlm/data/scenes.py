"""Scenes of emoji: a grammar of captions, its inverse, and the pictures.

A caption is two noun phrases and a relation: "two red apples above a car", "a fish to the left of three blue cups". What it says is a
`Scene`; `caption` writes one, `parse_caption` reads one, `draw` paints one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tiltlm.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

NOUNS: Mapping[str, tuple[str, str]] = {
    "airplane": ("airplanes", "✈"),
    "apple": ("apples", "🍎"),
    "balloon": ("balloons", "🎈"),
    "banana": ("bananas", "🍌"),
    "bell": ("bells", "🔔"),
    "bicycle": ("bicycles", "🚲"),
    "book": ("books", "📕"),
    "butterfly": ("butterflies", "🦋"),
    "cake": ("cakes", "🎂"),
    "car": ("cars", "🚗"),
    "carrot": ("carrots", "🥕"),
    "cat": ("cats", "🐈"),
    "chair": ("chairs", "🪑"),
    "clock": ("clocks", "⏰"),
    "cup": ("cups", "☕"),
    "dog": ("dogs", "🐕"),
    "duck": ("ducks", "🦆"),
    "elephant": ("elephants", "🐘"),
    "fish": ("fish", "🐟"),
    "flower": ("flowers", "🌻"),
    "guitar": ("guitars", "🎸"),
    "hammer": ("hammers", "🔨"),
    "hat": ("hats", "🎩"),
    "house": ("houses", "🏠"),
    "key": ("keys", "🔑"),
    "leaf": ("leaves", "🍁"),
    "moon": ("moons", "🌙"),
    "mushroom": ("mushrooms", "🍄"),
    "pencil": ("pencils", "✏"),
    "rocket": ("rockets", "🚀"),
    "rooster": ("roosters", "🐓"),
    "sailboat": ("sailboats", "⛵"),
    "shoe": ("shoes", "👞"),
    "snail": ("snails", "🐌"),
    "spoon": ("spoons", "🥄"),
    "star": ("stars", "⭐"),
    "train": ("trains", "🚂"),
    "tree": ("trees", "🌳"),
    "turtle": ("turtles", "🐢"),
    "umbrella": ("umbrellas", "☂"),
}
"""What is in scenes: singular, plural and the emoji that shows it."""
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 90, 230),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
}
"""Tints; an object without one has its own colours."""
NATURAL: Mapping[str, str] = {
    "apple": "red",
    "balloon": "red",
    "banana": "yellow",
    "bell": "yellow",
    "book": "red",
    "butterfly": "blue",
    "car": "red",
    "fish": "blue",
    "flower": "yellow",
    "guitar": "red",
    "key": "yellow",
    "leaf": "red",
    "moon": "yellow",
    "mushroom": "red",
    "rooster": "red",
    "star": "yellow",
    "tree": "green",
    "turtle": "green",
    "umbrella": "purple",
}
"""Objects whose own colour is near a tint, which they are not given: it could not be seen."""
COUNTS = {"one": 1, "two": 2, "three": 3}
RELATIONS = ("above", "below", "to the left of", "to the right of")
SIZE = 96
"""Side of a picture in pixels."""
ARTICLES = ("a", "an")
RELATION = re.compile(rf"\s+(?:is|are)?\s*\b({'|'.join(RELATIONS)})\b\s+")


@dataclass(frozen=True)
class Thing:
    """One side of a scene: so many of an object, in a tint or in their own colours."""

    name: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """The first thing stands in the relation to the second."""

    first: Thing
    second: Thing
    relation: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `objects` (name, count, colour), in the caption's order, and `relation`."""
        return {"objects": [asdict(self.first), asdict(self.second)], "relation": self.relation}

    @classmethod
    def of_dict(cls, truth: Mapping[str, Any]) -> Scene:
        """From what `as_dict` gives."""
        first, second = (Thing(**thing) for thing in truth["objects"])
        return cls(first, second, truth["relation"])


def caption(scene: Scene) -> str:
    """What a scene is called."""
    return f"{_phrase(scene.first)} {scene.relation} {_phrase(scene.second)}"


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption speaks of; None if it is no sentence of the grammar.

    Case, white space, a full stop and "is" or "are" before the relation do not matter; "one" is "a"; number and noun must agree.
    """
    parts = RELATION.split(f" {' '.join(text.lower().split()).rstrip(' .')} ")
    if len(parts) != 3:
        return None
    first, second = _thing(parts[0]), _thing(parts[2])
    return None if first is None or second is None else Scene(first, second, parts[1])


def _phrase(thing: Thing) -> str:
    plural = NOUNS[thing.name][0]
    words = [*([thing.colour] if thing.colour else []), thing.name if thing.count == 1 else plural]
    number = ("an" if words[0][0] in "aeiou" else "a") if thing.count == 1 else _word(thing.count)
    return " ".join([number, *words])


def _word(count: int) -> str:
    return next(word for word, number in COUNTS.items() if number == count)


def _thing(phrase: str) -> Thing | None:
    number, *rest = phrase.split() or [""]
    count = 1 if number in ARTICLES else COUNTS.get(number, 0)
    colour = rest.pop(0) if len(rest) == 2 and rest[0] in COLOURS else None
    if not count or len(rest) != 1:
        return None
    names = {singular if count == 1 else plural: singular for singular, (plural, _) in NOUNS.items()}
    name = names.get(rest[0])
    return None if name is None else Thing(name, count, colour)


def random_scene(first: str, second: str, rng: Random) -> Scene:
    """A scene of these two objects, in either order, with counts, visible tints (each with probability one half) and a relation."""
    names = [first, second]
    rng.shuffle(names)
    first_thing, second_thing = (_random_thing(name, rng) for name in names)
    return Scene(first_thing, second_thing, rng.choice(RELATIONS))


def _random_thing(name: str, rng: Random) -> Thing:
    tints = [colour for colour in COLOURS if colour != NATURAL.get(name)]
    return Thing(name, rng.randint(1, len(COUNTS)), rng.choice(tints) if rng.random() < 0.5 else None)


def read_glyphs(font: Path) -> dict[tuple[str, str | None], Image]:
    """The picture of each noun in each tint and in none, RGBA, out of a colour font's bitmaps (OpenType's table CBDT).

    Raises:
        InputError: if fonttools is not installed or the font has no such bitmaps.
    """
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise InputError(
            "data set 'emoji-scenes' needs fonttools, which is not installed; run: pip install fonttools"
        ) from error
    from PIL import Image

    with TTFont(font, lazy=True) as opened:
        if "CBDT" not in opened:
            raise InputError(
                f"font {str(font)!r} has no colour bitmaps (CBDT); install Debian's fonts-noto-color-emoji"
            )
        names = opened.getBestCmap() or {}
        bitmaps = {name: glyph for strike in opened["CBDT"].strikeData for name, glyph in strike.items()}
        found: dict[tuple[str, str | None], Any] = {}
        for noun, (_, emoji) in NOUNS.items():
            name = names.get(ord(emoji))
            if name not in bitmaps:
                raise InputError(
                    f"font {str(font)!r} has no picture of {emoji} ({noun}); install Debian's fonts-noto-color-emoji"
                )
            picture = _trimmed(Image.open(io.BytesIO(bitmaps[name].imageData)).convert("RGBA"))
            found |= {(noun, colour): _tinted(picture, colour) for colour in (None, *COLOURS)}
    return found


def draw(scene: Scene, glyphs: Mapping[tuple[str, str | None], Image], rng: Random) -> bytes:
    """A PNG of the scene, SIZE × SIZE pixels: each thing in its half, with places, sizes and a pale background by chance.

    Args:
        glyphs: as `read_glyphs` gives them.
    """
    from PIL import Image

    ground = tuple(rng.randint(225, 255) for _ in range(3))
    canvas = Image.new("RGB", (SIZE, SIZE), ground)
    upright = scene.relation in ("above", "below")
    leading, trailing = (
        (scene.first, scene.second) if scene.relation in ("above", RELATIONS[2]) else (scene.second, scene.first)
    )
    half = SIZE // 2
    for thing, start in ((leading, 0), (trailing, half)):
        cell = SIZE // 3 if thing.count > 1 else half
        along = [int(SIZE * (number + 0.5) / thing.count) for number in range(thing.count)]
        for place in along:
            side = int(cell * rng.uniform(0.8, 0.95))
            picture = _fitted(glyphs[thing.name, thing.colour], side)
            shift = rng.randint(-3, 3) if thing.count > 1 else rng.randint(-12, 12)
            middle = (place + shift, start + half // 2) if upright else (start + half // 2, place + shift)
            corner = [
                min(max(m - length // 2, 0), SIZE - length) for m, length in zip(middle, picture.size, strict=True)
            ]
            canvas.paste(picture, (corner[0], corner[1]), picture)
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()


def _trimmed(picture: Image) -> Image:
    return picture.crop(picture.getchannel("A").getbbox())


def _fitted(picture: Image, side: int) -> Image:
    from PIL import Image

    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _tinted(picture: Image, colour: str | None) -> Image:
    """The picture's light and dark in one colour, so that a tint shows whatever the object's own colours are."""
    if colour is None:
        return picture
    from PIL import ImageOps

    red, green, blue = COLOURS[colour]
    dark = (red // 3, green // 3, blue // 3)
    light = tuple((255 + 2 * channel) // 3 for channel in (red, green, blue))
    grey = ImageOps.autocontrast(picture.convert("L"))
    tint = ImageOps.colorize(grey, black=dark, white=light, mid=(red, green, blue)).convert("RGBA")
    tint.putalpha(picture.getchannel("A"))
    return tint
