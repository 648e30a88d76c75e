"""Bad input to the applications: one sentence, exit code 2, before anything is trained."""

import json
import shutil

import pytest
from PIL import Image

import tiltlm as tl
from conftest import settings, write
from kinds import text_model, words
from tiltlm import rewards
from tiltlm.data import sources
from tiltlm.workflow.references import require_references

GOOD = [{"prompt": "a b", "reference": "a"}, {"prompt": "b", "reference": "b"}]
MATCH = {"part": "exact-match", "column": "reference"}
FRENCH = [
    "un lecteur de musique pour le bureau",
    "une bibliothèque pour les fichiers de sons",
    "le jeu de cartes pour les enfants",
]
GERMAN = ["ein Programm für die Wiedergabe von Musik", "eine Bibliothek für das Lesen von Dateien"]


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """A small encoder–decoder whose encoder takes 16 tokens."""
    folder = tmp_path_factory.mktemp("models") / "marian"
    text_model("marian").save_pretrained(folder)
    words("a", "b").save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(here, models, marian):
    """Write rows and a recipe on them; its name."""

    def make(train_rows=GOOD, test_rows=GOOD, **changes):
        for name, rows in (("train", train_rows), ("test", test_rows)):
            (here / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        own = {"prompts": "train.jsonl", "test": "test.jsonl", "reward": [MATCH], "metrics": [MATCH], "lora_r": 0}
        small = {"model": str(marian), "steps": 1, "samples": 2, "exact_budget": 0, "bounds": None}
        return write(here / "own.yaml", settings(models, **own, **small) | changes).name

    return make


def rows(**changes):
    """Two rows, the second with something bad in it."""
    return [GOOD[0], GOOD[1] | changes]


BAD = {
    "an empty source": (rows(prompt=" "), "prompt 2 is empty; remove it or write a text"),
    "a source that is none": (rows(prompt=None), "prompt 2 is NoneType None"),
    "no reference": (rows(reference=None), "row 2 of {file} has no reference (None); give one, or leave the row out"),
    "an empty reference": (rows(reference=" "), "row 2 of {file} has no reference (' '); give one"),
    "no column of references": (
        [{"prompt": "a"}, {"prompt": "b"}],
        "part 'exact-match' reads 'reference', but {file} has the columns prompt; name the one",
    ),
    "no column of sources": (
        [{"text": "a", "reference": "b"}],
        "column is 'prompt', but {file} has the columns text, reference",
    ),
    "a long source": (rows(prompt="a " * 40), "prompt 2 has 41 tokens, and the encoder takes 16; shorten the source"),
    "a picture that does not decode": (
        [GOOD[0] | {"image": "good.png"}, GOOD[1] | {"image": "bad.png"}],
        "row 2 of {file} has an image that does not decode (bad.png)",
    ),
}


class TestRows:
    @pytest.fixture(autouse=True)
    def pictures(self, here):
        (here / "bad.png").write_bytes(b"\x89PNG and no more")
        Image.new("RGB", (4, 4)).save(here / "good.png")

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_each_is_named_before_training(self, refused, here, recipe, bad, split):
        given, says = BAD[bad]
        path = recipe(**{f"{split}_rows": given})
        assert says.format(file=f"{split}.jsonl") in refused("task", path, "--draws", 2)
        assert not (here / "run" / "seed-0").exists()

    @pytest.mark.parametrize("bad", BAD)
    def test_training_says_the_same(self, cli, recipe, bad):
        given, says = BAD[bad]
        ended = cli("train", recipe(given))
        assert ended.code == 2
        assert says.format(file="train.jsonl") in ended.errors[0]

    def test_a_reference_of_several(self, refused, recipe):
        given = [{"prompt": "a", "references": ["a"]}, {"prompt": "b", "references": []}]
        match = {"part": "exact-match", "column": "references"}
        path = recipe(given, given, reward=[match], metrics=[match])
        assert "row 2 of train.jsonl has no references ([])" in refused("task", path)

    def test_a_metric_is_looked_at_before_training(self, refused, here, recipe):
        path = recipe(metrics=[{"part": "chrf", "column": "gold"}])
        assert "part 'chrf' reads 'gold', but test.jsonl has the columns prompt, reference" in refused("task", path)
        passed = {"part": "pass-at-k", "k": 2, "of": {"part": "exact-match", "column": "answers"}}
        assert "reads 'answers'" in refused("task", recipe(metrics=[passed]))
        assert not (here / "run" / "seed-0").exists()

    def test_lines_have_no_columns(self, refused, here, recipe):
        path = recipe(prompts="lines.txt")
        (here / "lines.txt").write_text("a\nb\n")
        assert "part 'exact-match' reads 'reference', but lines.txt has no columns" in refused("task", path)


class TestLanguages:
    parts = (rewards.CHRF(column="reference"), rewards.Language(language="fr"))

    def look(self, texts, source="mine.jsonl"):
        require_references(self.parts, [{"reference": text} for text in texts], source)

    def test_one_language_passes_and_a_few_short_texts_do(self):
        self.look([*FRENCH * 3, "Emacs", "vim"])
        self.look([*FRENCH * 3, GERMAN[0]])

    def test_some_of_another_are_said(self):
        with pytest.warns(
            tl.TiltWarning,
            match="2 of 5 texts in 'reference' of mine.jsonl do not look like 'fr'.*row 4: 'ein Programm",
        ):
            self.look([*FRENCH, *GERMAN])

    def test_mostly_another_is_refused(self):
        with pytest.raises(
            tl.InputError, match="4 of 7 texts in 'reference' of mine.jsonl do not look like 'fr', which the part"
        ):
            self.look([*FRENCH, *GERMAN * 2])

    def test_on_the_command_line(self, refused, recipe):
        german = [{"prompt": "a", "reference": text} for text in GERMAN]
        parts = [{"part": "chrf", "column": "reference"}, {"part": "language", "language": "fr"}]
        assert "do not look like 'fr'" in refused("train", recipe(german, reward=parts))


def test_test_prompts_that_are_trained_on_are_told(cli, recipe):
    flags = ("task", recipe(), "--methods", "copy", "--table", "--samples", "2")
    said = "2 of the 2 test prompts (test.jsonl) are among those that are trained on (train.jsonl)"
    assert said in cli(*flags).err
    assert "among those" not in cli("task", recipe(test_rows=[GOOD[0] | {"prompt": "a a"}]), *flags[2:]).err


def test_methods_of_no_name_are_refused(refused, recipe):
    name = recipe(methods={"dpp": {"lr": 0.1}})
    assert "method is 'dpp'; choose prior, " in refused("task", name, "--methods", "copy", "--table")


def test_names(refused):
    assert "did you mean 'quiz'" in refused("data", "quizz")
    assert "split is 'dev'; data set 'stories' has train, validation, test" in refused(
        "data", "stories", "--show", 1, "--split", "dev"
    )
    assert "did you mean 'qa-chat'" in refused("task", "qa-chta")
    assert "did you mean 'translation-es'" in refused("start", "translation-se")
    assert "row 1 of the train rows has no column 'image'" in refused(
        "start", "captions", "--data", "stories", "--quick"
    )


def test_data_that_cannot_be_fetched(refused, tmp_path, monkeypatch):
    """The optional set: where its package is neither installed nor to be had, one sentence says what to install."""
    monkeypatch.setenv("TILTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    says = "'tuxpaint-stamps-default' is not here, and this machine has no apt to fetch it with; apt-get install"
    assert says in refused("task", "captions-stamps", "--out", tmp_path / "run")


def test_columns_of_ones_own(cli, here, recipe):
    """The same rows under other names: the recipe maps them."""
    given = [{"en": row["prompt"], "fr": row["reference"]} for row in GOOD]
    path = recipe(given, given, columns={"prompt": "en", "reference": "fr"})
    ended = cli("task", path, "--methods", "prior", "--draws", 2)
    assert ended.code == 0, ended.err


def test_a_data_set_of_the_hub_with_ones_own_columns(cli, refused, here, recipe):
    """`hub:` is datasets.load_dataset, which reads a folder on this disk as it reads the hub."""
    folder = here / "owner" / "name"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(
            "".join(f"{json.dumps({'en': r['prompt'], 'fr': r['reference']})}\n" for r in GOOD)
        )
    names = {
        "prompts": "hub:owner/name/train",
        "test": "hub:owner/name/test[:1]",
        "columns": {"prompt": "en", "reference": "fr"},
    }
    ended = cli("task", recipe(**names), "--methods", "prior", "--draws", 2, "--json", "t.json")
    assert ended.code == 0, ended.err
    assert json.loads((here / "t.json").read_text())["prompts"] == 1
    wrong = recipe(**names | {"columns": {"prompt": "english"}})
    assert "columns maps 'prompt' to 'english', but hub:owner/name/train has the columns en, fr" in refused(
        "task", wrong
    )
