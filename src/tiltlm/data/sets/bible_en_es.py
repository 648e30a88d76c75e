"""English to Spanish, in the public domain: the verses of the World English Bible and the Reina-Valera of 1909."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tiltlm.data.sources import Debian
from tiltlm.data.spec import DataSet, Progress, Row, Tally
from tiltlm.data.split import content_key, linked
from tiltlm.errors import InputError

ENGLISH = Debian("sword-text-web", "usr/share/sword/modules/texts/ztext/engWEB2015eb")
SPANISH = Debian("sword-text-sparv", "usr/share/sword/modules/texts/ztext/spaRV1909eb")
ABOVE = 4
"""Folders from the texts up to the library's."""
ASIDE = re.compile(r"<(note|title)\b.*?</\1>", re.DOTALL)


def rows(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
    """Verses that both have, by book, chapter and number."""
    english, spanish = (_Bible(files[source.name]) for source in (ENGLISH, SPANISH))
    books = [book for book in english.books if book in spanish.books]
    done = progress("books", len(books))
    found: dict[tuple[str, str], Row] = {}
    for book in books:
        for chapter, (one, other) in enumerate(zip(english.books[book], spanish.books[book], strict=False), 1):
            if one != other:
                tally.drop("verses of chapters that are counted in two ways", max(one, other))
                continue
            for verse in range(1, one + 1):
                prompt, reference = english.verse(book, chapter, verse), spanish.verse(book, chapter, verse)
                if not (prompt and reference):
                    tally.drop("verses that one of them does not have")
                    continue
                row = {"prompt": prompt, "reference": reference, "verse": f"{book} {chapter}:{verse}"}
                if found.setdefault((content_key(prompt), content_key(reference)), row) is not row:
                    tally.drop("verses that are there already")
        done(1)
    return list(found.values())


class _Bible:
    """A SWORD module: chapter lengths by book, and the text of a verse."""

    def __init__(self, folder: Path) -> None:
        try:
            from pysword.modules import SwordModules
        except ImportError as error:
            raise InputError(
                "data set 'bible-en-es' needs pysword, which is not installed; run: pip install pysword==0.2.8"
            ) from error
        modules = SwordModules(str(folder.parents[ABOVE - 1]))
        modules.parse_modules()
        self.module: Any = modules.get_bible_from_module(folder.name)
        # pysword 0.2.8 decompresses the whole book for every verse; with the last ones kept this takes seconds, not minutes
        self.module._decompressed_text = lru_cache(maxsize=4)(self.module._decompressed_text)
        listed = [book for part in self.module.get_structure().get_books().values() for book in part]
        self.names = {book.osis_name: book.name for book in listed}
        self.books = {book.osis_name: list(book.chapter_lengths) for book in listed}

    def verse(self, book: str, chapter: int, verse: int) -> str:
        marked = self.module.get(books=[self.names[book]], chapters=[chapter], verses=[verse], clean=False)
        return plain(marked)


def plain(marked: str) -> str:
    """The words of an OSIS verse: without notes, headings and tags; an opening in capitals becomes a capital letter."""
    text = html.unescape(re.sub(r"<[^>]+>", "", ASIDE.sub(" ", marked)))
    words = re.sub(r"\s+([,.;:?!”’])", r"\1", " ".join(text.split())).split(" ")
    if len(words[0]) > 1 and words[0].isupper():
        words[0] = words[0].capitalize()
    return " ".join(words)


SET = DataSet(
    task="machine translation",
    what="A verse in English (World English Bible) and in Spanish (Reina-Valera, 1909).",
    licence="public domain",
    sources=(ENGLISH, SPANISH),
    columns={"prompt": "English", "reference": "Spanish", "verse": "book, chapter and number"},
    content=("prompt", "reference"),
    split="by content: verses that are the same or share half of their word trigrams, in either language, are in one split",
    rows=rows,
    groups=linked(("prompt", "reference"), near={"prompt": 0.5, "reference": 0.5}),
)
