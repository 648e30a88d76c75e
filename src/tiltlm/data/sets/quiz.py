"""Short questions with short answers: the quiz files of BSD's games."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiltlm.data.patterns import expand, fields, lines
from tiltlm.data.sources import Debian
from tiltlm.data.spec import DataSet, Progress, Row, Tally
from tiltlm.data.split import content_key, linked

GAMES = Debian("bsdgames", "usr/share/games/bsdgames/quiz")
CAPITAL = ("capital", 0, 1, "What is the capital of {}?")
QUESTIONS: Mapping[str, Sequence[tuple[str, int, int, str]]] = {
    "africa": [CAPITAL],
    "america": [CAPITAL],
    "asia": [CAPITAL],
    "europe": [CAPITAL],
    "province": [CAPITAL],
    "state": [CAPITAL],
    "elements": [
        ("element", 0, 3, "Which chemical element has the symbol {}?"),
        ("element", 1, 3, "Which chemical element has the atomic number {}?"),
    ],
    "pres": [("president", 0, 3, "Who became president of the United States after {}?")],
    "babies": [("animal", 0, 1, "Which animal's young is called a {}?")],
    "collectives": [("collective", 0, 1, "What is a group of {} called?")],
    "sexes": [("female", 0, 1, "What is the female counterpart of {}?")],
    "posneg": [("opposite", 0, 1, "What is the opposite of {}?")],
    "murders": [("murder", 0, 1, "Who or what killed {}?")],
    "latin": [("latin", 0, 1, "What does the Latin word {} mean in English?")],
    "bard": [("play", 0, 2, 'Which of Shakespeare\'s works has the line "{}"?')],
    "poetry": [("poet", 0, 3, 'Which poet wrote the line "{}"?')],
    "seq-easy": [("sequence", 0, 1, "Which number comes next: {}?")],
}
"""Of each file: category, field that is asked with, field that is asked for, question."""
EXAMPLES = (
    ("What colour is the sky on a clear day?", "blue"),
    ("How many days are in a week?", "seven"),
    ("What do bees make?", "honey"),
)
"""Ours, in none of the files: they show the form, not the answers."""
REMARK = re.compile(r"\(|\b[IVX]+-[ivx]+\b")
"""The name of a sequence, an act and scene."""
SHOTS = "".join(f"Q: {question}\nA: {answer}\n" for question, answer in EXAMPLES)


def rows(files: Mapping[str, Path], tally: Tally, progress: Progress) -> Sequence[Row]:
    """A row for each question; questions that several files ask are one, with all their answers."""
    found: dict[str, Row] = {}
    done = progress("quiz files", len(QUESTIONS))
    for file, questions in QUESTIONS.items():
        for line in lines((files[GAMES.name] / file).read_text(encoding="utf-8", errors="replace")):
            given = fields(line)
            for category, asked, wanted, form in questions:
                entities = expand(given[asked]) if asked < len(given) else []
                answers = _answers(given[wanted]) if wanted < len(given) else []
                if not entities or not answers:
                    tally.drop("questions without an answer")
                    continue
                prompt = form.format(entities[0])
                row = found.get(content_key(prompt))
                if row is None:
                    found[content_key(prompt)] = _row(prompt, category, entities[0], answers)
                else:
                    tally.drop("questions that are there already (their answers are kept)")
                    row["references"] = list(dict.fromkeys([*row["references"], *answers]))
        done(1)
    return list(found.values())


def _answers(pattern: str) -> list[str]:
    """The ways of writing an answer, without those with a remark (where there are others)."""
    found = expand(pattern)
    return [text for text in found if not REMARK.search(text)] or found


def _row(prompt: str, category: str, entity: str, answers: list[str]) -> Row:
    shots = f"{SHOTS}Q: {prompt}\nA:"
    return {
        "prompt": prompt,
        "references": answers,
        "reference": answers[0],
        "few_shot": shots,
        "category": category,
        "entity": entity,
    }


SET = DataSet(
    task="question answering",
    what="A question of BSD's quiz, such as a capital or an element, and every way of writing its answer.",
    licence="BSD-3-Clause, The Regents of the University of California",
    sources=(GAMES,),
    columns={
        "prompt": "question",
        "references": "all answers that count, the fullest first",
        "reference": "the first of them",
        "few_shot": "three examples of ours, then the question, as Q: and A:",
        "category": "capital, element, opposite, …",
        "entity": "what is asked about",
    },
    content=("prompt", "references"),
    split="by content: questions that are the same or share an answer are in one split",
    rows=rows,
    groups=linked(("prompt", "references")),
    shares=(60, 15, 25),
)
