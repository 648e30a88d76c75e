"""Image description, the harder set: Tux Paint's stamps with their captions."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiltlm.data.sources import Debian
from tiltlm.data.spec import DataSet, Progress, Row, Tally
from tiltlm.data.split import linked

STAMPS = Debian("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
SIZE = 224
"""Longest side in pixels."""
LANGUAGES = ("de", "es", "fr")


def rows(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
    """A row for each PNG with a caption; drawings in SVG are left out, for pillow does not read them."""
    root = files[STAMPS.name]
    pictures = sorted(root.rglob("*.png"))
    tally.drop("drawings in SVG", sum(1 for _ in root.rglob("*.svg")))
    done = progress("stamps", len(pictures))
    found = []
    for picture in pictures:
        done(1)
        words = picture.with_suffix(".txt")
        captions = _captions(words) if words.is_file() else {}
        if not captions.get("en"):
            tally.drop("pictures without a caption")
            continue
        row = {"prompt": "Describe the picture.", "reference": captions.pop("en"), "image": _small(picture)}
        found.append(row | {"captions": json.dumps(captions), "category": picture.relative_to(root).parts[0]})
    return found


def _captions(file: Path) -> dict[str, str]:
    """The English caption, which is the first line, and those of `LANGUAGES` ("fr.utf8=…")."""
    first, *others = file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    found = {"en": first.strip()}
    for line in others:
        language, _, text = line.partition(".utf8=")
        if language in LANGUAGES and text.strip():
            found[language] = text.strip()
    return found


def _small(file: Path) -> bytes:
    """The picture on white, at most `SIZE` pixels a side, as PNG."""
    from PIL import Image

    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    picture.thumbnail((SIZE, SIZE))
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(picture, (0, 0), picture)
    out = io.BytesIO()
    ground.save(out, "PNG")
    return out.getvalue()


SET = DataSet(
    task="image description",
    what="A photograph or drawing for children, and its caption.",
    licence="GPL-2+, Tux Paint; some pictures public domain",
    sources=(STAMPS,),
    columns={
        "prompt": "the same in every row",
        "reference": "caption in English",
        "image": f"PNG, at most {SIZE} pixels a side",
        "captions": "JSON: captions in other languages",
        "category": "animals, food, …",
    },
    content=("reference", "image"),
    split="by content: pictures or captions that are the same, or captions that share 60% of their word trigrams, are in one split",
    rows=rows,
    groups=linked(("reference", "image"), near={"reference": 0.6}),
)
