"""The answer patterns of BSD's quiz(6), written out.

`[a|b]` is a choice, `{a}` may be left out, `|` outside of brackets separates whole answers, and a backslash takes the next
character as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 64
"""Ways of writing an answer that are kept."""
OPEN, CLOSE = "[{", "]}"


def fields(line: str) -> list[str]:
    """The fields of a line, at colons that no backslash precedes."""
    found, at = [""], 0
    while at < len(line):
        if line[at] == "\\":
            found[-1] += line[at : at + 2]
            at += 2
            continue
        if line[at] == ":":
            found.append("")
        else:
            found[-1] += line[at]
        at += 1
    return [field.strip() for field in found]


def lines(text: str) -> list[str]:
    """The lines of a quiz file; a backslash at an end joins the next one."""
    return [line for line in text.replace("\\\n", "").splitlines() if line.strip()]


def expand(pattern: str) -> list[str]:
    """Every text that a pattern stands for, the fullest of its first choices first, at most `MOST`."""
    found, _ = _choices(pattern, 0)
    return list(dict.fromkeys(" ".join(text.split()) for text in found if text.strip()))[:MOST]


def _choices(pattern: str, at: int) -> tuple[list[str], int]:
    """The texts of a choice, up to its closing bracket or the end."""
    found: list[str] = []
    texts = [""]
    while at < len(pattern) and pattern[at] not in CLOSE:
        character = pattern[at]
        if character == "|":
            found += texts
            texts = [""]
            at += 1
        elif character in OPEN:
            inner, at = _choices(pattern, at + 1)
            at += 1  # its closing bracket
            texts = _joined(texts, [*inner, ""] if character == "{" else inner)
        else:
            if character == "\\":
                at += 1
            texts = _joined(texts, [pattern[at : at + 1]])
            at += 1
    return found + texts, at


def _joined(texts: Sequence[str], ends: Sequence[str]) -> list[str]:
    return [text + end for text in texts for end in ends][: MOST * MOST]
