"""Debian's package descriptions, in English and in translation, as apt's lists have them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiltlm.data.sources import AptList
from tiltlm.data.spec import DataSet, Progress, Row, Tally
from tiltlm.data.split import content_key, linked

LICENCE = "the packages' own, free licences; translations by the Debian project (DDTP)"
PLACEHOLDER = re.compile(r"\b(transitional|dummy|virtual|empty)\b.*\bpackage\b|\btransitional\b", re.IGNORECASE)
FEWEST, MOST = 20, 90
"""Words in a long description, for summaries."""


@dataclass(frozen=True)
class Description:
    """One description of a package.

    Attributes:
        md5: of the English description: it ties translations to their original.
        short: one line.
        long: the rest, its lines joined to paragraphs.
    """

    package: str
    md5: str
    short: str
    long: str


def read_descriptions(file: Path, language: str) -> Iterator[Description]:
    """The descriptions in a Translation list (Debian Policy 5.6.13; DebianRepository/Format, "Translation")."""
    for stanza in file.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): ?(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE))
        text = fields.get(f"Description-{language}")
        if text is not None and {"Package", "Description-md5"} <= fields.keys():
            short, _, long = text.partition("\n")
            yield Description(fields["Package"], fields["Description-md5"], _plain(short), paragraphs(long))


def _plain(line: str) -> str:
    """A line with its white space made plain, which translators also write as a dot."""
    return " ".join(line.replace("\u22c5", " ").split())


def paragraphs(long: str) -> str:
    """The lines of a long description as text: wrapped lines joined, " ." an end of paragraph, indented lines kept as lines."""
    out = [""]
    for line in long.splitlines():
        text = line.strip()
        if text == ".":
            out.append("")
        elif line.startswith(("  ", " \t")) or not out[-1]:
            out.append(text)
        else:
            out[-1] += f" {text}"
    return "\n".join(_plain(line) for line in out if line.strip())


def translations(language: str, tongue: str) -> DataSet:
    """The set of short descriptions in English and in another language.

    Args:
        language: as apt has it, such as "fr".
        tongue: its English name.
    """

    def rows(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
        english = {d.md5: d for d in read_descriptions(files["Translation-en"], "en")}
        found: dict[tuple[str, str], Row] = {}
        done = progress("translations", len(english))
        for other in read_descriptions(files[f"Translation-{language}"], language):
            done(1)
            original = english.get(other.md5)
            if original is None:
                tally.drop("translations of a description that is no longer there")
            elif not (original.short and other.short) or "<trans>" in other.short:
                tally.drop("translations that are not finished")
            elif content_key(original.short) == content_key(other.short):
                tally.drop("translations that are the same as the original")
            elif PLACEHOLDER.search(original.short):
                tally.drop("descriptions of transitional packages")
            else:
                row = {"prompt": original.short, "reference": other.short, "package": original.package}
                key = (content_key(original.short), content_key(other.short))
                if key in found:
                    tally.drop("pairs that are there already")
                else:
                    found[key] = row
        return list(found.values())

    return DataSet(
        task="machine translation",
        what=f"A Debian package's short description in English, and in {tongue} by Debian's translators.",
        licence=LICENCE,
        sources=(AptList("en"), AptList(language)),
        columns={"prompt": "English", "reference": tongue, "package": "the package's name"},
        content=("prompt", "reference"),
        split="by content: pairs that share either side, or whose English shares 70% of its word trigrams, are in one split",
        rows=rows,
        groups=linked(("prompt", "reference"), near={"prompt": 0.7}),
    )


def summaries(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
    """Long descriptions with their short ones."""
    found: dict[str, Row] = {}
    descriptions = list(read_descriptions(files["Translation-en"], "en"))
    done = progress("descriptions", len(descriptions))
    for item in descriptions:
        done(1)
        count = len(item.long.split())
        if not FEWEST <= count <= MOST:
            tally.drop(
                f"descriptions of fewer than {FEWEST} words"
                if count < FEWEST
                else f"descriptions of more than {MOST} words"
            )
        elif PLACEHOLDER.search(item.short):
            tally.drop("descriptions of transitional packages")
        elif content_key(item.long) in found:
            tally.drop("long descriptions that are there already")
        else:
            row = {"prompt": item.long, "reference": item.short, "package": item.package}
            found[content_key(item.long)] = row
    return list(found.values())
