"""Definitions of nouns: WordNet's glosses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tiltlm.data.sources import Debian
from tiltlm.data.spec import DataSet, Progress, Row, Tally
from tiltlm.data.split import linked

WORDNET = Debian("wordnet-base", "usr/share/wordnet")


def rows(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
    """A row for each synset that is some noun's first sense: that noun, and the gloss without examples (wndb(5WN))."""
    first = _first_senses(files[WORDNET.name] / "index.noun")
    found: list[Row] = []
    entries = _entries(files[WORDNET.name] / "data.noun")
    done = progress("glosses", len(entries))
    for line in entries:
        done(1)
        synset, _, gloss = line.partition(" | ")
        words = _words(synset)
        word = next((word for word in words if first.get(word.lower()) == synset.split()[0]), None)
        definition = gloss.split('; "')[0].strip().rstrip(";")
        if word is None:
            tally.drop("senses that are no noun's first")
        elif not definition:
            tally.drop("senses without a definition")
        else:
            noun = word.replace("_", " ")
            found.append({"prompt": f"Define the noun: {noun}", "reference": definition, "noun": noun})
    return found


def _first_senses(file: Path) -> dict[str, str]:
    """The synset of each noun's most frequent sense."""
    found = {}
    for line in _entries(file):
        parts = line.split()
        found[parts[0]] = parts[6 + int(parts[3])]
    return found


def _words(synset: str) -> list[str]:
    parts = synset.split()
    return parts[4 : 4 + 2 * int(parts[3], 16) : 2]


def _entries(file: Path) -> list[str]:
    return [
        line for line in file.read_text(encoding="utf-8").splitlines() if line[:1] != " "
    ]  # the licence is indented


SET = DataSet(
    task="text generation",
    what="A noun, and the definition of its first sense.",
    licence="WordNet 3.0 licence, Princeton University",
    sources=(WORDNET,),
    columns={"prompt": "Define the noun: …", "reference": "its definition", "noun": "the noun"},
    content=("prompt", "reference"),
    split="by content: rows with the same noun or the same definition are in one split",
    rows=rows,
    groups=linked(("prompt", "reference")),
)
