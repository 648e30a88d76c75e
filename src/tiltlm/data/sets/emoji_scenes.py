"""Image description: composed scenes of emoji, with the truth in a structure. The scenes are ours, the pictures Noto Color Emoji's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from tiltlm.data.scenes import NOUNS, caption, draw, random_scene, read_glyphs
from tiltlm.data.sources import Debian
from tiltlm.data.spec import DataSet, Progress, Row, Tally

EACH = 10
"""Scenes of every pair of objects."""
FONT = Debian("fonts-noto-color-emoji", "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def rows(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
    """`EACH` scenes of every pair of different objects."""
    glyphs = read_glyphs(files[FONT.name])
    pairs = list(itertools.combinations(sorted(NOUNS), 2))
    done = progress("scenes", len(pairs))
    found = []
    for one, other in pairs:
        seen: set[str] = set()
        rng = Random(f"emoji-scenes/{one}/{other}")
        while len(seen) < EACH:
            scene = random_scene(one, other, rng)
            text = caption(scene)
            if text in seen:
                continue
            seen.add(text)
            row = {"prompt": "Describe the picture.", "reference": text, "image": draw(scene, glyphs, rng)}
            found.append(row | {"truth": json.dumps(scene.as_dict()), "combination": f"{one} and {other}"})
        done(1)
    return found


SET = DataSet(
    task="image description",
    what="A picture of one to three emoji of one kind above, below or beside those of another, some tinted, and its caption.",
    licence="pictures: Noto Color Emoji, SIL Open Font License 1.1; scenes and captions: TiltLM's, Apache-2.0",
    sources=(FONT,),
    columns={
        "prompt": "the same in every row",
        "reference": "caption",
        "image": "PNG, 96 × 96 pixels",
        "truth": "JSON: objects (name, count, colour) in the caption's order, and relation",
        "combination": "the two objects",
    },
    content=("reference", "image", "combination"),
    split="by combination: no pair of objects is in two splits",
    rows=rows,
    groups=lambda rows, progress: [row["combination"] for row in rows],
)
