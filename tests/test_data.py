"""Data sets: split without leakage, prepared whole or not at all, read with one's own names."""

import io
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

import tiltlm as tl
from tiltlm import data
from tiltlm.augmentation.pairs import LabelSwap
from tiltlm.data import leaks, parse_caption, preparation, read, sources
from tiltlm.data.catalogue import all_sets, find_set
from tiltlm.data.descriptions import paragraphs, read_descriptions, summaries
from tiltlm.data.patterns import expand, fields, lines
from tiltlm.data.reading import address
from tiltlm.data.scenes import COLOURS, NATURAL, NOUNS, RELATIONS, SIZE, Scene, Thing, caption, draw, random_scene
from tiltlm.data.sets import bible_en_es, films, glosses, quiz
from tiltlm.data.sets.dialogues import dialogues
from tiltlm.data.sets.stories import stories
from tiltlm.data.spec import SPLITS, DataSet, Tally, no_progress
from tiltlm.data.split import SHINGLE, content_key, linked, near_duplicates, split_of
from tiltlm.errors import InputError
from tiltlm.reward_models.data import task_of
from tiltlm.workflow.inputs import read_prompts, read_rows
from tiltlm.workflow.recipe_files import read_recipe
from tiltlm.workflow.references import require_references

ENGLISH = """\
Package: alpha
Description-md5: 01
Description-en: editor for texts
 Alpha is an editor
 for all kinds of texts.
 .
 It has
  * colours
  * folds

Package: beta
Description-md5: 02
Description-en: Editor, for TEXTS!
 Beta is short.

Package: gamma
Description-md5: 03
Description-en: transitional dummy package
 This is a transitional package.

Package: delta
Description-md5: 04
Description-en: player of songs
 Delta plays songs.
"""
FRENCH = """\
Package: alpha
Description-md5: 01
Description-fr: éditeur de textes
 Alpha est un éditeur.

Package: beta
Description-md5: 02
Description-fr: éditeur pour les textes
 Beta est court.

Package: gamma
Description-md5: 03
Description-fr: paquet de transition
 Paquet de transition.

Package: delta
Description-md5: 04
Description-fr: Player of songs

Package: gone
Description-md5: 99
Description-fr: n'existe plus
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "SYSTEM", tmp_path / "system")


@pytest.fixture
def games(tmp_path):
    """A quiz folder where Debian would install it."""
    folder = tmp_path / "system" / quiz.GAMES.path
    folder.mkdir(parents=True)
    for name in quiz.QUESTIONS:
        (folder / name).write_text("")
    (folder / "asia").write_text("".join(f"Land{n}:Town{n // 2}\n" for n in range(60)) + "Armenia:Yerevan|Erevan\n")
    (folder / "europe").write_text("Armenia:Erewan\nAndorra:Andorra la V[ell|iej]a\n")
    (folder / "pres").write_text("{G{eorge} }Washington:1789-{17}97:{J{ohn} }Adams:\\\n{J{ohn} }Adams\nLast:2000:x:\n")
    return folder


def picture(colour="red"):
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


class TestSplit:
    def test_the_split_follows_the_content_alone(self):
        keys = [f"key {n}" for n in range(4000)]
        found = Counter(split_of(key, (70, 10, 20)) for key in keys)
        for name, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):  # five standard errors
            assert abs(found[name] / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5
        assert content_key("  The  Cat, sat! ") == content_key("the cat sat") != content_key("the cat sits")
        assert content_key("ﬁlm É") == content_key("film É") == "film é"
        assert content_key("++") != content_key("--")

    def test_rows_are_linked_through_either_side_and_through_others(self):
        rows = [
            {"prompt": "A", "reference": "x"},
            {"prompt": "b", "reference": "Y."},
            {"prompt": "a!", "reference": "y"},  # links the first two
            {"prompt": "c", "reference": "z"},
        ]
        keys = linked(("prompt", "reference"))(rows, no_progress)
        assert keys[0] == keys[1] == keys[2] != keys[3]
        assert linked(("prompt", "reference"))(rows[::-1], no_progress) == keys[::-1]
        alone = linked(("prompt",))(rows, no_progress)
        assert alone[0] == alone[2] != alone[1]

    @pytest.mark.parametrize("least", [0.3, 0.5, 0.8, 1.0])
    def test_near_duplicates_are_those_of_all_pairs(self, least):
        rng = Random(least)
        texts = [" ".join(rng.choices("abc", k=rng.randint(1, 9))) for _ in range(120)]

        def shingles(text):
            words = text.split()
            return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}

        def similar(one, other):
            return len(one & other) / len(one | other) >= least - 1e-12

        every = {(i, j) for i, j in combinations(range(120), 2) if similar(shingles(texts[i]), shingles(texts[j]))}
        assert set(near_duplicates(texts, least)) == every
        assert len(every) > 20

    def test_leaks_are_counted_exactly_and_normalised(self):
        splits = {
            "train": {
                "prompt": ["one", "two", "three"],
                "references": [["a", "b"], ["c"], ["d"]],
                "image": [b"1", b"2", b"3"],
            },
            "test": {"prompt": ["One!", "four"], "references": [["B"], ["e", "c"]], "image": [b"9", b"2"]},
        }
        found = leaks(splits)
        assert dict(found.exact) == {"prompt": 0, "references": 1, "image": 1}
        assert dict(found.normalised) == {"prompt": 1, "references": 2, "image": 1}
        assert found.total == 6
        assert leaks(splits, ["prompt"]).total == 1
        same = {name: {"prompt": ["describe"] * 2, "reference": [name, f"{name}2"]} for name in SPLITS}
        assert leaks(same).total == 0
        assert leaks(same, ["prompt"]).exact["prompt"] == 1


class TestScenes:
    def test_every_kind_of_caption_reads_back_as_its_scene(self):
        things = [Thing(name, count, colour) for name, count, colour in product(NOUNS, (1, 2, 3), (None, *COLOURS))]
        for number, (first, relation) in enumerate(product(things, RELATIONS)):
            scene = Scene(first, things[number * 7 % len(things)], relation)
            assert parse_caption(caption(scene)) == scene
            assert Scene.of_dict(json.loads(json.dumps(scene.as_dict()))) == scene

    @pytest.mark.parametrize(
        ("text", "same"),
        [
            ("  Two red APPLES are above a car. ", "two red apples above a car"),
            ("an apple is to the left of one fish", "an apple to the left of a fish"),
        ],
    )
    def test_what_does_not_matter_in_a_caption(self, text, same):
        assert caption(parse_caption(text)) == same

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "a car",
            "two car above a cat",
            "a cars above a cat",
            "four cars above a cat",
            "a pink car above a cat",
            "a car near a cat",
            "a car above a cat above a dog",
            "a red above a cat",
            "a car above",
            "car above a cat",
        ],
    )
    def test_what_is_no_caption(self, text):
        assert parse_caption(text) is None

    def test_pictures_show_what_the_scene_says(self):
        from PIL import Image

        paint = {
            (name, colour): Image.new("RGBA", (20, 20), rgb)
            for name, rgb in (("cat", "black"), ("car", "blue"))
            for colour in [None]
        }
        for relation, axis, first_is_less in zip(RELATIONS, (1, 1, 0, 0), (True, False, True, False), strict=True):
            scene = Scene(Thing("cat", 3), Thing("car", 1), relation)
            png = draw(scene, paint, Random(1))
            assert png == draw(scene, paint, Random(1))
            opened = Image.open(io.BytesIO(png)).convert("RGB")
            assert opened.size == (SIZE, SIZE)
            where = {
                name: [p[axis] for p in product(range(SIZE), range(SIZE)) if opened.getpixel(p) == rgb]
                for name, rgb in (("cat", (0, 0, 0)), ("car", (0, 0, 255)))
            }
            assert (max(where["cat"]) < min(where["car"])) if first_is_less else (min(where["cat"]) > max(where["car"]))

    def test_tints_are_visible_ones(self):
        scenes = [random_scene("apple", "tree", Random(n)) for n in range(300)]
        seen = {(thing.name, thing.colour) for scene in scenes for thing in (scene.first, scene.second)}
        assert seen == {(n, c) for n in ("apple", "tree") for c in (None, *COLOURS) if c != NATURAL[n]}


class TestQuiz:
    @pytest.mark.parametrize(
        ("pattern", "texts"),
        [
            ("Algiers", ["Algiers"]),
            ("V[ell|iej]a", ["Vella", "Vieja"]),
            ("{G{eorge} }W", ["George W", "G W", "W"]),
            ("a|b{c}", ["a", "bc", "b"]),
            (r"5\|6", ["5|6"]),
            ("W[m|]", ["Wm", "W"]),
        ],
    )
    def test_patterns_are_written_out(self, pattern, texts):
        assert expand(pattern) == texts

    def test_lines_and_fields(self):
        assert lines("a:\\\nb\n\nc:d\n") == ["a:b", "c:d"]
        assert fields(r"a\:b: c:") == [r"a\:b", "c", ""]

    def test_rows_have_every_answer(self, games):
        tally = Tally()
        rows = {row["prompt"]: row for row in quiz.rows({"bsdgames": games}, tally, no_progress)}
        assert rows["What is the capital of Armenia?"]["references"] == ["Yerevan", "Erevan", "Erewan"]
        assert rows["Who became president of the United States after George Washington?"]["reference"] == "John Adams"
        assert tally.dropped["questions without an answer"] == 1
        assert rows["What is the capital of Land1?"]["few_shot"].endswith(
            "A: honey\nQ: What is the capital of Land1?\nA:"
        )


class TestDescriptions:
    @pytest.fixture
    def lists(self, tmp_path):
        found = {}
        for language, text in (("en", ENGLISH), ("fr", FRENCH)):
            found[f"Translation-{language}"] = tmp_path / language
            (tmp_path / language).write_text(text)
        return found

    def test_a_list_is_read(self, lists):
        alpha, *others = read_descriptions(lists["Translation-en"], "en")
        assert (alpha.package, alpha.md5, alpha.short) == ("alpha", "01", "editor for texts")
        assert alpha.long == "Alpha is an editor for all kinds of texts.\nIt has\n* colours\n* folds"
        assert [d.package for d in others] == ["beta", "gamma", "delta"]
        assert paragraphs(" a\n b\n .\n c") == "a b\nc"

    def test_pairs_go_by_the_originals_hash(self, lists):
        tally = Tally()
        spec = find_set("packages-en-fr")
        rows = spec.rows(lists, tally, no_progress)
        assert [(row["prompt"], row["reference"]) for row in rows] == [
            ("editor for texts", "éditeur de textes"),
            ("Editor, for TEXTS!", "éditeur pour les textes"),
        ]
        assert sum(tally.dropped.values()) == 3
        keys = spec.groups(rows, no_progress)
        assert keys[0] == keys[1]

    def test_summaries_are_of_20_to_90_words(self, tmp_path):
        def stanza(name, words):
            return (
                f"Package: {name}\nDescription-md5: {name}\nDescription-en: short {name}\n {' '.join([name] * words)}\n"
            )

        file = tmp_path / "list"
        file.write_text("\n".join(stanza(name, n) for name, n in (("a", 19), ("b", 20), ("c", 90), ("d", 91))))
        tally = Tally()
        rows = summaries({"Translation-en": file}, tally, no_progress)
        assert [row["reference"] for row in rows] == ["short b", "short c"]
        assert sum(tally.dropped.values()) == 2


def test_glosses_are_of_first_senses(tmp_path):
    (tmp_path / "index.noun").write_text("  1 licence\ncat n 2 1 @ 2 1 00000010 00000020\nwhip n 1 1 @ 1 1 00000020\n")
    (tmp_path / "data.noun").write_text(
        '  1 licence\n00000010 05 n 01 cat 0 000 | feline mammal; "a cat purrs"\n00000020 06 n 02 cat 0 whip 0 000 | a whip  \n'
    )
    rows = glosses.rows({"wordnet-base": tmp_path}, Tally(), no_progress)
    assert [(row["noun"], row["reference"]) for row in rows] == [("cat", "feline mammal"), ("whip", "a whip")]


def test_verses_without_their_notes():
    marked = '<w>EN</w> <w>God</w><note n="1">a <b>note</b></note><w>made</w> , “so <title>Psalm</title>&amp; so” .'
    assert bible_en_es.plain(marked) == "En God made, “so & so”."


def test_reviews_are_cleaned_and_halved(tmp_path):
    words = " ".join(f"w{n}" for n in range(20))
    file = tmp_path / "reviews.csv"
    file.write_text(f"text,label,source\n{words}<br /><br />end,1,imdb\n{words.upper()} END,0,imdb\nshort,0,imdb\n")
    tally = Tally()
    (row,) = films.rows({films.REVIEWS.name: file}, tally, no_progress)
    assert row["prompt"] == "w0 w1 w2 w3 w4 w5 w6 w7"
    assert row["reference"].endswith("w19 end")
    assert row["label"] == "positive"
    assert sum(tally.dropped.values()) == 2
    halves = Counter(films.half_of(str(n)) for n in range(1000))
    assert abs(halves["A"] - 500) < 5 * 250**0.5


def test_the_forms_of_stories_are_kept_by_what_keeps_them():
    rows = [*stories(), *dialogues()]
    story = next(
        row for row in rows if json.loads(row["constraint"]) == {"form": "story", "sentences": 2, "word": "key"}
    )
    assert re.search(story["pattern"], "He found the Key. Then he slept!")
    for wrong in (
        "He found the key.",
        "He found a keyhole. Then he slept.",
        "The key. Two. Three.",
        "The key. And then",
    ):
        assert not re.search(story["pattern"], wrong)
    four = next(
        row
        for row in rows
        if json.loads(row["constraint"]) == {"form": "dialogue", "lines": 4, "speakers": ["Ann", "Ben"]}
    )
    assert re.search(four["pattern"], "Ann: Hi.\nBen: Hello.\nAnn: So?\nBen: Well.\n")
    for wrong in (
        "Ann: Hi.\nBen: Hello.",
        "Ben: Hi.\nAnn: Hello.\nBen: So?\nAnn: Well.",
        "Ann: Hi.\nBen: \nAnn: So?\nBen: Well.",
    ):
        assert not re.search(four["pattern"], wrong)


class TestPreparation:
    def test_a_set_with_its_card(self, games):
        splits = data.load("quiz")
        card = data.card("quiz")
        assert card["rows"] == {name: len(part) for name, part in splits.items()}
        assert sum(card["rows"].values()) == 63
        assert card["leaks"]["normalised"] == {"prompt": 0, "references": 0}
        assert set(card["columns"]) == set(splits["train"].column_names)
        assert leaks(splits, ["references"]).total == 0  # Land0 and Land1 have the same capital
        text = (data.prepare("quiz") / "README.md").read_text()
        for word in ("bsdgames", "BSD-3-Clause", "0 by prompt", "1 questions without an answer"):
            assert word in text

    def test_a_split_by_row_would_leak(self, games, monkeypatch):
        by_row = DataSet(**{**vars(find_set("quiz")), "groups": lambda rows, progress: [row["prompt"] for row in rows]})
        monkeypatch.setattr(preparation, "find_set", lambda name: by_row)
        with pytest.raises(AssertionError, match="same content in two splits"):
            data.prepare("quiz")

    def test_the_same_bytes_again(self, games, tmp_path, monkeypatch):
        def files(folder):
            return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

        first = files(data.prepare("quiz"))
        monkeypatch.setenv("TILTLM_CACHE", str(tmp_path / "other"))
        second = files(data.prepare("quiz"))
        assert first == second
        assert any(name.endswith(".arrow") for name in first)

    def test_prepared_once_and_anew_when_the_source_changes(self, games, monkeypatch):
        folder = data.prepare("quiz")
        stamp = (folder / "card.json").stat().st_mtime_ns
        assert data.prepare("quiz") == folder
        assert (folder / "card.json").stat().st_mtime_ns == stamp
        monkeypatch.setattr(sources.Debian, "version", lambda self: "2.18")
        assert data.prepare("quiz") != folder

    def test_the_cache_depends_on_the_code_that_makes_the_rows_and_no_other(self):
        names = {file.name for file in preparation.code_of("quiz")}
        assert names == {"quiz.py", "patterns.py", "preparation.py", "sources.py", "spec.py", "split.py"}
        assert "descriptions.py" in {file.name for file in preparation.code_of("packages-en-fr")}

    def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(self, games, monkeypatch):
        def killed(card):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(preparation, "card_text", killed)
            with pytest.raises(KeyboardInterrupt):
                data.prepare("quiz")
        assert preparation.prepared("quiz") is None
        folder = data.prepare("quiz")
        (folder / "card.json").unlink()  # what a machine that lost power may leave
        assert preparation.prepared("quiz") is None
        assert (data.prepare("quiz") / "card.json").is_file()

    def test_unknown_and_missing_sets(self, monkeypatch):
        with pytest.raises(InputError, match="data set is 'quizz'; did you mean 'quiz'"):
            data.load("quizz")
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(
            InputError, match=r"'bsdgames' is not here, and this machine has no apt .* apt-get install bsdgames"
        ):
            data.load("quiz")
        with pytest.raises(InputError, match="'Translation-en' is not here, and this machine has no apt"):
            data.load("packages-summary")
        none = sources.PyPI("not-there==1", "not_there_at_all")
        with pytest.raises(InputError, match="'not-there==1' is not installed; run: pip install not-there==1"):
            none.fetch()

    def test_an_apt_that_fails_says_why(self, monkeypatch):
        failed = SimpleNamespace(
            returncode=100, stdout="", stderr="W: something\nE: Unable to locate package bsdgames\n"
        )
        monkeypatch.setattr(shutil, "which", lambda name: name)
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
        with pytest.raises(
            InputError, match=r"apt-get cannot fetch the data \(E: Unable to locate package bsdgames\); look at"
        ):
            data.load("quiz")

    def test_every_set_says_what_it_is(self):
        assert {
            "films",
            "quiz",
            "bible-en-es",
            "packages-en-fr",
            "packages-en-de",
            "packages-summary",
            "emoji-scenes",
        } < set(all_sets())
        for name, spec in all_sets().items():
            assert spec.content, name
            assert set(spec.content) <= set(spec.columns), name
            assert "prompt" in spec.columns, name
            assert sum(spec.shares) == 100, name


class TestReading:
    @pytest.fixture
    def mine(self, tmp_path):
        rows = [{"question": f"q{n}", "answer": f"a{n}", "prompt": "other"} for n in range(5)]
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / "mine.csv").write_text("question,answer\n" + "".join(f"q{n},a{n}\n" for n in range(5)))
        return file

    @pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
    def test_tables_with_ones_own_names(self, mine, kind):
        file = mine.with_suffix(kind)
        if kind == ".parquet":
            read(mine, need=("question",)).to_parquet(str(file))
        rows = read(file, {"prompt": "question", "reference": "answer"})
        assert rows["prompt"][:] == [f"q{n}" for n in range(5)]
        assert rows["reference"][:] == [f"a{n}" for n in range(5)]
        assert rows["question"][:] == rows["prompt"][:]  # the source's own columns stay
        assert read(f"{file}[1:3]", {"prompt": "question"})["prompt"][:] == ["q1", "q2"]
        assert read(f"{file}[-2:]", {"prompt": "question"})["prompt"][:] == ["q3", "q4"]

    def test_images_by_path_and_as_bytes(self, tmp_path):
        import datasets

        (tmp_path / "a.png").write_bytes(picture())
        (tmp_path / "rows.jsonl").write_text('{"picture": "a.png", "reference": "red"}\n')
        rows = read(tmp_path / "rows.jsonl", {"image": "picture"}, need=("image", "reference"))
        assert rows["image"][0] == picture()
        datasets.Dataset.from_dict({"image": [picture("blue")]}).to_parquet(str(tmp_path / "b.parquet"))
        assert read(tmp_path / "b.parquet", need=("image",))["image"][0] == picture("blue")

    @pytest.mark.parametrize(
        ("source", "columns", "message"),
        [
            ("none.jsonl", {}, r"data 'none.jsonl': there is no such file; give a .txt"),
            ("empty.csv", {}, "data 'empty.csv' is empty"),
            (
                "mine.jsonl",
                {"prompt": "quest"},
                "columns maps 'prompt' to 'quest', but mine.jsonl has the columns question, answer",
            ),
            ("ragged.csv", {}, "data 'ragged.csv' cannot be read as csv .*Row #3: Expected 2 columns, got 1"),
            ("twice.csv", {}, "data 'twice.csv' has the column 'prompt' twice; rename one"),
            ("latin.csv", {}, "data 'latin.csv' is not UTF-8 text"),
            ("half.jsonl", {}, "line 3 of data 'half.jsonl' is not JSON .*; write an object a line"),
            ("lists.jsonl", {}, r"line 2 of data 'lists.jsonl' is \['b'\]; write an object"),
            ("texts.json", {}, "item 1 of data 'texts.json' is 'a'; write an object"),
            ("open.json", {}, "line 2 of data 'open.json' is not JSON .*; write a list of objects"),
            ("mine.csv", {}, "column is 'prompt', but mine.csv has the columns question, answer"),
            ("mine.jsonl[9:]", {}, r"data 'mine.jsonl\[9:\]' has no rows; give at least one of the 5"),
            ("holes.jsonl", {"reference": "answer"}, "row 2 of holes.jsonl has no reference"),
            ("holes.jsonl[1:]", {"reference": "answer"}, "row 2 of holes"),
            ("images.jsonl", {}, "row 2 of images.jsonl has an image that does not decode"),
            ("gone.jsonl", {}, "row 1 of gone.jsonl has the image 'no.png', and there is no file"),
            ("numbers.jsonl", {}, "row 1 of numbers.jsonl has the image 7; give a path or the bytes"),
            ("data:quizz", {}, "data set is 'quizz'; did you mean 'quiz'"),
            ("data:stories/dev", {}, "split is 'dev', but data set 'stories' has train, validation, test"),
        ],
    )
    def test_what_cannot_be_read(self, mine, monkeypatch, source, columns, message):
        monkeypatch.chdir(mine.parent)
        Path("empty.csv").write_text("")
        Path("ragged.csv").write_text("prompt,answer\na,1\nb\n")
        Path("twice.csv").write_text("prompt,prompt\na,1\n")
        Path("latin.csv").write_bytes("prompt\né\n".encode("latin-1"))
        Path("half.jsonl").write_text('{"prompt": "a"}\n\n{"prompt":\n')
        Path("lists.jsonl").write_text('{"prompt": "a"}\n["b"]\n')
        Path("texts.json").write_text('["a", "b"]')
        Path("open.json").write_text('[{"prompt": "a"},\n{"prompt": }]')
        Path("holes.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": null}\n')
        Path("good.png").write_bytes(picture())
        Path("bad.png").write_bytes(picture()[:40])
        Path("images.jsonl").write_text('{"prompt": "a", "image": "good.png"}\n{"prompt": "b", "image": "bad.png"}\n')
        Path("gone.jsonl").write_text('{"prompt": "a", "image": "no.png"}\n')
        Path("numbers.jsonl").write_text('{"prompt": "a", "image": 7}\n')
        with pytest.raises(InputError, match=message):
            read(source, columns)

    def test_a_file_says_what_it_says(self, tmp_path):
        file = tmp_path / "mine.csv"
        lines = [
            "\ufeffprompt,answer",
            "Code?,NA",
            '"Bond,\r\n number?",007',
            "Zip?,01234",
            "Nothing?,None",
            "Blank?,",
            "",
        ]
        file.write_bytes("\r\n".join(lines).encode())
        answers = ["NA", "007", "01234", "None", ""]
        assert [dict(row) for row in read(file)] == [
            {"prompt": prompt, "answer": answer}
            for prompt, answer in zip(
                ["Code?", "Bond,\r\n number?", "Zip?", "Nothing?", "Blank?"], answers, strict=True
            )
        ]
        with pytest.raises(InputError, match=r"row 5 of .* has no reference \(''\)"):
            read(file, {"reference": "answer"})
        long = "x" * 3_000_000
        file.write_text(f"prompt,answer\n{long},1\n")
        assert read(file)["prompt"][0] == long

    @pytest.mark.parametrize("kind", [".jsonl", ".json", "list"])
    def test_json_stays_what_it_is(self, tmp_path, kind):
        rows = [
            {"prompt": "when?", "answer": "2024-01-02", "n": 1, "any": 1, "meta": {"x": 1}},
            {
                "prompt": "and\u2028now?\x85",
                "answer": "2024-01-02T03:04:05",
                "n": None,
                "any": "a",
                "meta": {"y": [2, "z"]},
            },
            {"prompt": "never", "answer": "NA", "n": 3, "any": None, "meta": None, "late": "007"},
        ]
        file = tmp_path / f"rows{kind if kind.startswith('.') else '.json'}"
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text(
            "[" + ",\n".join(lines) + "]" if kind == "list" else "\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8"
        )
        assert [dict(row) for row in read(file)] == [{**row, "late": row.get("late")} for row in rows]

    def test_one_object_over_several_lines(self, tmp_path):
        (tmp_path / "one.json").write_text(json.dumps({"prompt": "a", "n": 1}, indent=1))
        assert list(read(tmp_path / "one.json")) == [{"prompt": "a", "n": 1}]

    def test_lines_end_at_line_feeds(self, tmp_path):
        file = tmp_path / "mine.txt"
        file.write_bytes("\ufefffirst\u2028goes on\r\n\nsecond\x0cpage\x85\rstill\nthird \n\n \n".encode())
        lines = ["first\u2028goes on", "", "second\x0cpage\x85\rstill", "third "]
        assert read_prompts(str(file), "prompt") == lines
        assert read(file)["prompt"][:] == lines

    def test_numbers_are_made_by_who_needs_them(self, tmp_path):
        file = tmp_path / "rows.csv"
        file.write_text("prompt,completion,score,label\na,b,0.5,1\nc,d,-2,0\n")
        rows = read_rows(str(file))
        assert task_of(rows).target.tolist() == [0.5, -2.0]
        assert task_of(rows, "classification").classes == ("0", "1")
        file.write_text("prompt,chosen,rejected,margin\na,b,c,0.5\nc,d,e,\n")
        assert task_of(read_rows(str(file))).margin.tolist() == [0.5, 0.0]
        file.write_text("first,second,label\na,b,0.25\n")
        swapped = LabelSwap()(read_rows(str(file)), [])
        assert swapped == [[{"first": "b", "second": "a", "label": 0.75}]]

    @pytest.mark.parametrize(
        ("text", "made", "message"),
        [
            ("completion,score\na,1\nb,high\n", task_of, "row 2 has score 'high', which is not a number"),
            ("completion,score\na,1\nb,\n", task_of, "row 2 has score '', which is not a number"),
            ("completion,label\na,x\nb,y\nc,\n", task_of, "row 3 has no label"),
            ("first,second,label\na,b,1\nb,c,first\n", lambda r: LabelSwap()(r, []), "row 2 has label 'first'"),
            ("first,second,label\na,b,nan\n", lambda r: LabelSwap()(r, []), "row 1 has label 'nan'"),
            (
                "prompt,plus\na,1\nb,one\n",
                lambda r: require_references([tl.rewards.Length(most=3).offset("plus")], r, "rows.csv"),
                "row 2 of rows.csv: column 'plus' holds 'one', which is not a number",
            ),
        ],
    )
    def test_a_text_that_is_no_number_is_named_by_its_row(self, tmp_path, text, made, message):
        (tmp_path / "rows.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            made(read_rows(str(tmp_path / "rows.csv")))

    def test_sources(self, tmp_path):
        assert address("data:quiz") == address("data:quiz[:]")
        test = address("data:quiz/test[2:8]")
        assert (test.kind, test.place, test.split, test.rows) == ("data", "quiz", "test", slice(2, 8))
        hub = address("hub:owner/name/validation[:64]")
        assert (hub.kind, hub.place, hub.split, hub.rows) == ("hub", "owner/name", "validation", slice(None, 64))
        assert address("owner/name").kind == "hub"
        assert address("folder/rows.csv").kind == "file"
        odd = tmp_path / "a[1:2]"
        odd.write_text("x")
        assert address(odd).place == str(odd)

    def test_the_hubs_data_by_the_librarys_own_loader(self, monkeypatch):
        import datasets

        def loaded(name, *, split):
            if name != "owner/name":
                raise FileNotFoundError("no such data set\non the hub")
            return datasets.Dataset.from_dict({"text": [split, "b"]})

        monkeypatch.setattr(datasets, "load_dataset", loaded)
        assert read("owner/name", {"prompt": "text"}, split="dev")["prompt"][0] == "dev"
        with pytest.raises(InputError, match=r"prompts 'hub:a/b/train' cannot be read \(no such data set on the hub\)"):
            read_prompts("hub:a/b", "prompt")
        with pytest.raises(InputError, match=r"split is 'test', but data 'hub:owner/name/dev' names the split 'dev'"):
            read("hub:owner/name/dev", split="test")

    def test_a_recipe_takes_sets_slices_and_names(self, mine, tmp_path):
        rows = read_prompts("data:stories/test[:3]", "prompt")
        assert len(rows) == 3
        assert rows == read_prompts("data:stories/test[:9]", "prompt")[:3]
        (tmp_path / "data").mkdir()  # a folder of that name beside the recipe must not hide the sets
        (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
        for prompts, wanted in (
            ("data:stories/test[:3]", rows),
            ("lines.txt[1:]", ["two", "three"]),
            ("mine.csv[:1]", [{"question": "q0", "answer": "a0", "prompt": "q0"}]),
        ):
            names = {"columns": {"prompt": "question"}} if prompts.startswith("mine") else {}
            (tmp_path / "r.yaml").write_text(json.dumps({"model": "m", "prompts": prompts, "reward": "f.py:f"} | names))
            recipe = read_recipe(tmp_path / "r.yaml", {})
            assert read_prompts(recipe.prompts, recipe.column, recipe.columns) == wanted


class TestCommand:
    def run(self, *arguments):
        from typer.testing import CliRunner

        from tiltlm.cli.main import app

        done = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "200"})
        assert done.exit_code == 0
        return done.output

    def test_the_list(self, games, tmp_path):
        self.run("--json", tmp_path / "list.json")
        rows = {row["name"]: row for row in json.loads((tmp_path / "list.json").read_text())["sets"]}
        assert set(rows) == set(all_sets())
        assert rows["quiz"]["installed"]
        assert not rows["glosses"]["installed"]
        assert rows["glosses"]["install"] == ["apt-get install wordnet-base"]

    def test_a_set_to_look_at_and_to_write_out(self, games, tmp_path):
        out = self.run("quiz", "--show", 1, "--out", tmp_path / "files")
        assert "prompts: data:quiz/train[:64]" in out
        assert "What is the capital of" in out
        written = read_prompts(str(tmp_path / "files" / "test.jsonl"), "prompt")
        assert written == read_prompts("data:quiz/test", "prompt")

    def test_pictures_are_written_as_files_that_read_back(self, tmp_path, monkeypatch):
        rows = [{"prompt": "p", "reference": f"r{n}", "image": picture((n, 0, 0))} for n in range(30)]
        fake = DataSet(
            "t", "w", "l", (), dict.fromkeys(rows[0], ""), ("image",), "s", lambda *a: rows, linked(("image",))
        )
        monkeypatch.setattr(preparation, "find_set", lambda name: fake)
        self.run("stamps", "--out", tmp_path / "files")
        back = read(tmp_path / "files" / "train.jsonl")
        assert back["image"][:] == data.load("stamps")["train"]["image"][:]


def fetched(name):
    """A real set, from the installed package or through apt; skipped where neither is to be had."""
    try:
        return data.load(name)
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("quiz", 1000),
        ("emoji-scenes", 7800),
        ("glosses", 60_000),
        ("packages-en-fr", 15_000),
        ("packages-en-de", 10_000),
        ("packages-summary", 40_000),
        ("bible-en-es", 30_000),
        ("films", 30_000),
    ],
)
def test_the_real_sets(name, rows, monkeypatch):
    monkeypatch.setattr(sources, "SYSTEM", Path("/"))
    monkeypatch.setenv("TILTLM_CACHE", os.environ.get("TILTLM_TEST_CACHE") or os.environ["TILTLM_CACHE"])
    splits = fetched(name)
    spec = find_set(name)
    assert sum(map(len, splits.values())) >= rows
    assert leaks(splits, spec.content).total == 0
    assert min(len(part) for part in splits.values()) > 0.05 * sum(map(len, splits.values()))
    if name == "emoji-scenes":
        for row in splits["test"]:
            assert parse_caption(row["reference"]) == Scene.of_dict(json.loads(row["truth"]))
