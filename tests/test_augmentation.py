"""Augmentation: what each says that it preserves is preserved, row by row."""

import json
import re
import warnings

import datasets
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.augmentation import (
    BackTranslation,
    CrossPromptNegatives,
    DeleteWords,
    FormatCounterfactual,
    LabelSwap,
    LengthCounterfactual,
    ReplaceWords,
    SwapWords,
    augment,
)
from tiltlm.augmentation.augment import AUGMENTATIONS, make_augmentation
from tiltlm.augmentation.pairs import FILLERS
from tiltlm.augmentation.words import NEGATIONS, frozen_words
from tiltlm.errors import InputError
from tiltlm.lm.translate import Translator, load_translator

GOOD = [
    "The film is good, and it never bores me for a moment. The two leads carry 3 long hours with ease and warmth.",
    "I don't think that anybody could have played the old captain better than she plays him in this quiet story.",
    "A warm, funny and generous picture about twenty-one friends who meet again after many years by the sea.",
    "Well told, well filmed; no scene is wasted and the ending stays with you for days.",
]
BAD = [
    "The plot is not clever, the jokes are old and the whole thing runs 40 minutes over what anyone can bear.",
    "Nothing happens here, and it happens slowly while a loud band plays the same tune again and again.",
    "A dull picture without a single idea, shot in the dark by people who seemed to want to go home.",
    "It fails as a comedy and hardly works as a drama, though the costumes are quite nice to look at.",
]


def plain():
    return [
        {"prompt": f"Review film {i}.", "chosen": good, "rejected": bad, "margin": 1.0, "place": i}
        for i, (good, bad) in enumerate(zip(GOOD, BAD, strict=True))
    ]


def said(role, text):
    return {"role": role, "content": text}


def conversational():
    return [
        {**row, "prompt": [said("user", row["prompt"])]}
        | {name: [said("assistant", row[name])] for name in ("chosen", "rejected")}
        for row in plain()
    ]


def implicit():
    """Whole conversations in chosen and rejected, and no prompt column."""
    return [
        {"place": row["place"], "margin": 1.0}
        | {name: [said("user", row["prompt"]), said("assistant", row[name])] for name in ("chosen", "rejected")}
        for row in plain()
    ]


def text(value):
    return value if isinstance(value, str) else value[-1]["content"]


def words(value):
    return re.findall(r"[\w']+", text(value).lower())


def new(rows, *augmentations, **settings):
    return [row for row in augment(rows, augmentations, **settings) if row["augmentation"] is not None]


FORMS = pytest.mark.parametrize("rows", [plain(), conversational(), implicit()], ids=["plain", "chat", "implicit"])
EDITS = pytest.mark.parametrize("kind", [DeleteWords, SwapWords, ReplaceWords])


class TestWords:
    @FORMS
    @EDITS
    def test_what_carries_the_label_stays_and_all_else_about_the_row(self, rows, kind):
        made = new(rows, kind(rate=0.5), n=5)
        assert len(made) >= 15
        for row in made:
            old = rows[row["place"]]
            assert {**row, "chosen": 0, "rejected": 0} == {**old, "chosen": 0, "rejected": 0, "augmentation": kind.name}
            for name in ("chosen", "rejected"):
                assert frozen_words(text(row[name])) == frozen_words(text(old[name]))
                assert type(row[name]) is type(old[name])
                if not isinstance(row[name], str):
                    assert row[name][:-1] == old[name][:-1]
            assert row["chosen"] != old["chosen"] or row["rejected"] != old["rejected"]
            assert row["chosen"] != row["rejected"]

    def test_the_frozen_words_are_negations_their_clause_and_numbers(self):
        found = frozen_words(
            "It isn't a good film, but 3 long hours fly by; never dull or slow. Twenty-one friends. Good!"
        )
        assert found == [
            "isn't",
            "a",
            "good",
            "film,",
            "3",
            "long",
            "never",
            "dull",
            "or",
            "slow.",
            "Twenty-one",
            "friends.",
        ]

    def test_an_edit_that_knows_no_negations_would_turn_the_label_round(self):
        """The negative control: with nothing frozen, deletion does drop a negation from these texts."""
        from tiltlm.augmentation import words as module

        rows, found = plain(), []
        for freeze in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not freeze:
                    patch.setattr(module, "_open", lambda words, protected: list(range(len(words))))
                made = new(rows, DeleteWords(rate=0.5), n=5)
            count = [sum(w in NEGATIONS for w in words(row["chosen"] + " " + row["rejected"])) for row in made]
            found.append(count)
        assert len(set(found[0])) <= 4
        assert min(found[1]) < min(found[0])

    def test_delete_keeps_order_and_leaves_half(self):
        for row in new(plain(), DeleteWords(rate=1.0), n=3):
            old = next(r for r in plain() if r["prompt"] == row["prompt"])
            for name in ("chosen", "rejected"):
                rest = iter(old[name].split())
                assert all(word in rest for word in row[name].split())  # a subsequence
                assert len(row[name].split()) >= len(old[name].split()) / 2

    def test_swap_keeps_every_word(self):
        for row in new(plain(), SwapWords(rate=0.4), n=3):
            old = next(r for r in plain() if r["prompt"] == row["prompt"])
            for name in ("chosen", "rejected"):
                assert sorted(row[name].split()) == sorted(old[name].split())

    @pytest.mark.parametrize(("rate", "edits"), [(0.01, 1), (0.2, 2), (0.5, 5)])
    def test_the_rate_is_a_share_of_the_open_words(self, rate, edits):
        row = {"prompt": "alpha bravo charlie delta echo foxtrot golf hotel india juliett", "completion": "x"}
        (made,) = new([row], ReplaceWords(rate=rate, lexicon={w: ["zulu"] for w in row["prompt"].split()}))
        assert made["prompt"].split().count("zulu") == edits
        (made,) = new([row], DeleteWords(rate=rate))
        assert len(made["prompt"].split()) == 10 - edits

    def test_replacements_are_words_of_the_rows_and_carry_nothing(self):
        vocabulary = {w for row in plain() for name in ("chosen", "rejected") for w in words(row[name])}
        for row in new(plain(), ReplaceWords(rate=0.6), n=4):
            old = next(r for r in plain() if r["prompt"] == row["prompt"])
            for name in ("chosen", "rejected"):
                assert len(row[name].split()) == len(old[name].split())
                assert set(words(row[name])) <= vocabulary | {"-"} | {"twenty", "one"}

    def test_a_lexicon_dresses_its_words(self):
        row = {"prompt": "Good films, (good) films.", "completion": "x"}
        (made,) = new([row], ReplaceWords(rate=1.0, lexicon={"good": ["fine"]}))
        assert made["prompt"] == "Fine films, (fine) films."

    def test_protected_words_of_the_user(self):
        row = {"prompt": "keep this and that and these", "completion": "x"}
        for made in new([row], DeleteWords(rate=1.0, protected=frozenset({"keep", "these"})), n=5):
            assert made["prompt"].split()[0] == "keep"
            assert made["prompt"].split()[-1] == "these"

    def test_of_a_demonstration_only_the_prompt_changes(self):
        messages = [
            said("user", "tell me a quiet story of two friends"),
            said("assistant", "They meet again by the sea."),
        ]
        rows = [{"messages": messages}]
        (made,) = new(rows, SwapWords(rate=0.5))
        assert made["messages"][1] == messages[1]
        assert made["messages"][0] != messages[0]
        rows = [{"prompt": "tell me a story of friends", "completion": "They meet again."}]
        (made,) = new(rows, DeleteWords())
        assert made["completion"] == rows[0]["completion"]

    @pytest.mark.parametrize("short", ["", "Good.", "Not good.", "   ", "7"])
    def test_what_cannot_be_edited_is_left_out(self, short):
        for kind in (DeleteWords, SwapWords):
            assert new([{"prompt": short, "completion": "x"}], kind(rate=1.0)) == []

    def test_layout_survives(self):
        row = {"prompt": "first came the rain\n\n- then a storm\n- wind everywhere ", "completion": "x"}
        (made,) = new([row], SwapWords(rate=0.2))
        assert made["prompt"].count("\n") == 3
        assert made["prompt"].endswith(" ")

    @pytest.mark.parametrize("rate", [0, -1, 1.5, float("nan")])
    def test_rates_that_are_none(self, rate):
        with pytest.raises(InputError, match=f"rate is {rate}; it is a share of the words"):
            DeleteWords(rate=rate)


class TestPairs:
    @FORMS
    def test_cross_prompt_negatives_are_answers_to_other_prompts(self, rows):
        for place, row in enumerate(new(rows, CrossPromptNegatives())):
            old = rows[place]
            assert row["chosen"] == old["chosen"]
            assert row.get("prompt") == old.get("prompt")
            assert text(row["rejected"]) in {text(r["chosen"]) for r in rows} - {text(old["chosen"])}
            assert isinstance(row["rejected"], type(old["rejected"]))
            assert "margin" not in row
            if "prompt" not in old:
                assert row["rejected"][:-1] == old["chosen"][:-1]  # the other answer, after this prompt

    def test_an_answer_that_also_fits_here_is_not_taken(self):
        rows = [
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "p", "chosen": "c", "rejected": "b"},
            {"prompt": "q", "chosen": "a", "rejected": "d"},
        ]
        made = new(rows, CrossPromptNegatives(), n=8)
        assert {(row["prompt"], row["chosen"], row["rejected"]) for row in made} == {("q", "a", "c")}

    @FORMS
    def test_length_is_a_tie_between_chosen_and_itself_with_filler(self, rows):
        made = new(rows, LengthCounterfactual(sentences=2))
        assert len(made) == 8
        for old, one, other in zip(rows, made[::2], made[1::2], strict=True):
            assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])
            assert one["chosen"] == old["chosen"]
            longer = text(one["rejected"])
            assert longer.startswith(text(old["chosen"]))
            rest = longer.removeprefix(text(old["chosen"]))
            assert sum(filler in rest for filler in FILLERS) == 2
            assert "margin" not in one

    @FORMS
    def test_format_keeps_every_word(self, rows):
        layouts = set()
        for _, row in enumerate(new(rows, FormatCounterfactual(), n=6)):
            assert words(row["chosen"]) == words(row["rejected"])
            assert text(row["chosen"]) != text(row["rejected"])
            layouts |= {text(row[name])[:2] for name in ("chosen", "rejected")}
        assert {"- ", "# ", "**"} <= layouts

    def test_both_orders_of_a_tie_are_least_where_the_rewards_are_equal(self):
        d = torch.linspace(-3, 3, 601, dtype=torch.float64)
        loss = -torch.nn.functional.logsigmoid(d) - torch.nn.functional.logsigmoid(-d)
        assert d[loss.argmin()].item() == pytest.approx(0, abs=1e-9)

    def test_label_swap_is_its_own_inverse(self):
        rows = [{"prompt": "p", "first": "a", "second": "b", "label": label} for label in (1, 0, 0.25)]
        made = new(rows, LabelSwap())
        assert [(r["first"], r["second"], r["label"]) for r in made] == [("b", "a", 0), ("b", "a", 1), ("b", "a", 0.75)]
        back = new([{k: v for k, v in row.items() if k != "augmentation"} for row in made], LabelSwap())
        assert [{k: v for k, v in row.items() if k != "augmentation"} for row in back] == rows
        assert new([{"first": "a", "second": "a", "label": 0.5}], LabelSwap()) == []

    @pytest.mark.parametrize(
        ("row", "kind", "message"),
        [
            ({"prompt": "p", "chosen": "a", "rejected": "b"}, LabelSwap, "label-swap needs first, second and label"),
            ({"first": "a", "second": "b", "label": 2}, LabelSwap, "row 1 has label 2; give the probability"),
            ({"first": "a", "second": "b", "label": True}, LabelSwap, "row 1 has label True"),
            ({"prompt": "p", "completion": "a"}, CrossPromptNegatives, "cross-prompt is for preferences"),
            ({"prompt": "p", "completion": "a"}, LengthCounterfactual, "length is for preferences"),
            ({"prompt": "p", "completion": "a"}, FormatCounterfactual, "format is for preferences"),
            ({"prompt": "p", "chosen": 3, "rejected": "b"}, LengthCounterfactual, "row 1 has 3 where a text"),
            ({"chosen": "a", "rejected": "b"}, CrossPromptNegatives, "row 1 has no prompt"),
            ({"text": "a"}, DeleteWords, "row 1 has the columns text; give prompt, chosen"),
        ],
    )
    def test_refusals(self, row, kind, message):
        with pytest.raises(InputError, match=message):
            augment([row], [kind()])


class TestAugment:
    @pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "label-swap"])
    def test_every_one_makes_rows_that_are_read_again_and_says_what_it_keeps(self, name, tmp_path):
        """Plain and conversational rows go through `datasets` and become records that engines train on."""
        made = make_augmentation(name)
        assert made.preserves
        for rows in (plain(), conversational()):
            found = augment(datasets.Dataset.from_list(rows), [made], n=2, seed=4)
            assert [row["augmentation"] for row in found[:4]] == [None] * 4
            assert {row["augmentation"] for row in found[4:]} == {name}
            assert len({json.dumps(row) for row in found}) == len(found)
            table = datasets.Dataset.from_list([{k: v for k, v in r.items() if k != "margin"} for r in found])
            prior = tl.load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=100)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", tl.TiltWarning)  # long texts are cut for the small model
                scored = tl.preferences(prior, list(table))
            assert len(scored.pairs) == len(found)

    def test_the_seed_decides_and_rows_do_not_disturb_each_other(self):
        some, more = plain()[:2], plain()
        for kind in (DeleteWords, SwapWords, LengthCounterfactual):
            alone = new(some, kind(), seed=3)
            assert alone == new(some, kind(), seed=3)
            assert alone == new(more, SwapWords(), kind(), seed=3)[-len(alone) * 2 :][: len(alone)] or kind is SwapWords
            assert alone != new(some, kind(), seed=4)

    def test_the_rows_given_are_left_as_they_are(self):
        rows = conversational()
        before = json.dumps(rows)
        augment(rows, [make_augmentation(name) for name in AUGMENTATIONS if name != "label-swap"], n=2)
        assert json.dumps(rows) == before

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: augment([], [DeleteWords()]), "there are no rows"),
            (lambda: augment(plain(), [DeleteWords()], n=0), "n is 0; make at least one"),
            (lambda: make_augmentation("shuffle"), "with is 'shuffle'; use delete, swap, replace, "),
            (lambda: LengthCounterfactual(sentences=0), "sentences is 0; give 1 to 6"),
        ],
    )
    def test_refusals(self, call, message):
        with pytest.raises(InputError, match=message):
            call()


def make_seq2seq(seed=0):
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 200,
        "init_std": 0.5,
    }
    ids = {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": 1,
    }
    return BartForConditionalGeneration(BartConfig(vocab_size=300, **sizes, **heads, **ids)).eval()


@pytest.fixture(scope="module")
def pair():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return [Translator(make_seq2seq(seed), tokenizer, max_new_tokens=12, beams=2, rows=3) for seed in (0, 1)]


class TestBackTranslation:
    def test_there_and_back_goes_through_both_in_order(self):
        calls = []

        def upper(texts, rng):
            calls.append("there")
            return [t.upper() for t in texts]

        def back(texts, rng):
            calls.append("back")
            assert all(t == t.upper() for t in texts)
            return [f" {t.lower()} " for t in texts]

        made = new(plain(), BackTranslation(upper, back))
        assert calls == ["there", "back"]
        for old, row in zip(plain(), made, strict=True):
            assert row["chosen"] == old["chosen"].lower()
            assert row["rejected"] == old["rejected"].lower()
            assert {k: row[k] for k in ("prompt", "margin", "place")} == {
                k: old[k] for k in ("prompt", "margin", "place")
            }

    def test_what_comes_back_empty_or_unchanged_is_left_out(self):
        same = BackTranslation(lambda texts, rng: texts, lambda texts, rng: texts)
        empty = BackTranslation(lambda texts, rng: texts, lambda texts, rng: [""] * len(texts))
        one = BackTranslation(lambda texts, rng: texts, lambda texts, rng: ["the same"] * len(texts))
        assert new(plain(), same) == new(plain(), empty) == new(plain(), one) == []

    def test_a_translator_that_loses_texts_is_named(self):
        with pytest.raises(InputError, match="translator 'there' returned 7 items for 8 texts"):
            augment(plain(), [BackTranslation(lambda texts, rng: texts[1:], lambda texts, rng: texts)])

    def test_a_real_architecture(self, pair):
        rows = conversational()
        made = new(rows, BackTranslation(*pair))
        assert all(row["prompt"] == rows[i]["prompt"] for i, row in enumerate(made))
        assert made

    def test_batches_do_not_change_translations_and_order_is_kept(self, pair):
        texts = ["the film", "a quiet story of two friends", "good", "two friends who meet again"]
        together = pair[0](texts, torch.Generator().manual_seed(0))
        alone = [pair[0]([t], torch.Generator().manual_seed(0))[0] for t in texts]
        assert together == alone
        assert len(set(alone)) > 1

    def test_sampling_follows_the_generator_and_leaves_torchs_own_alone(self, pair):
        sampler = Translator(pair[0].model, pair[0].tokenizer, max_new_tokens=12, temperature=1.0)
        before = torch.get_rng_state()
        one, same, other = (sampler(["the film"] * 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert one == same != other

    def test_what_is_longer_than_the_model_is_cut_and_said(self, pair):
        with pytest.warns(tl.TiltWarning, match="1 of 2 texts are longer than the 200 tokens"):
            assert len(pair[0](["good", "the film " * 300], torch.Generator())) == 2

    def test_a_decoder_only_model_is_no_translator(self, models):
        with pytest.raises(InputError, match="LlamaForCausalLM is no encoder–decoder"):
            Translator(make_model("llama"), make_tokenizer())
        with pytest.raises(InputError, match="cannot be loaded .* give a hub id or folder of an encoder–decoder"):
            load_translator(models / "chat")


class TestCommand:
    @pytest.fixture
    def file(self, here):
        (here / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain()))
        return here

    def test_a_larger_file(self, cli, file):
        done = cli("augment", "in.jsonl", "out.jsonl", "--with", "swap,delete,length", "--n", 2, "--seed", 7)
        assert done.code == 0, done
        rows = [json.loads(line) for line in (file / "out.jsonl").read_text().splitlines()]
        assert [row["augmentation"] for row in rows] == [None] * 4 + ["swap"] * 8 + ["delete"] * 8 + ["length"] * 16
        assert "swap: 8 new rows; keeps the label; every word" in done.out
        before = (file / "out.jsonl").read_bytes()
        again = cli("augment", "in.jsonl", "out.jsonl", "--with", "swap")
        assert again.code == 2
        assert "out 'out.jsonl' is there already; give another name, so that nothing is lost" in again.err
        assert (file / "out.jsonl").read_bytes() == before
        cli("augment", "in.jsonl", "again.jsonl", "--with", "swap,delete,length", "--n", 2, "--seed", 7)
        assert (file / "again.jsonl").read_bytes() == before

    def test_rows_of_a_judge(self, cli, file):
        (file / "judge.jsonl").write_text(json.dumps({"first": "a", "second": "b", "label": 1}) + "\n")
        assert cli("augment", "judge.jsonl", "out.jsonl", "--with", "label-swap").code == 0
        assert json.loads((file / "out.jsonl").read_text().splitlines()[1])["label"] == 0

    def test_back_translation_with_models_from_folders(self, cli, file, pair):
        for name, one in zip(("there", "back"), pair, strict=True):
            one.model.save_pretrained(file / name)
            one.tokenizer.save_pretrained(file / name)
        done = cli(
            "augment", "in.jsonl", "out.jsonl", "--with", "back-translation", "--there", "there", "--back", "back"
        )
        assert done.code == 0, done

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["in.jsonl", "out.csv", "--with", "swap"], "out 'out.csv' is not written as JSON lines"),
            (["in.jsonl", "in.jsonl", "--with", "swap"], "is the file that is read"),
            (["in.jsonl", "out.jsonl", "--with", "shuffle"], "with is 'shuffle'; use delete, swap"),
            (["in.jsonl", "out.jsonl", "--with", ","], "with is ','; use delete"),
            (["in.jsonl", "out.jsonl", "--with", "swap", "--rate", "2"], "rate is 2.0; it is a share"),
            (["in.jsonl", "out.jsonl", "--with", "label-swap"], "column is 'label', but in.jsonl has the columns"),
            (["in.jsonl", "out.jsonl", "--with", "back-translation"], "needs two models; give --there and --back"),
            (["no.jsonl", "out.jsonl", "--with", "swap"], "data 'no.jsonl': there is no such file"),
        ],
    )
    def test_refusals(self, refused, file, arguments, message):
        assert message in refused("augment", *arguments)
        assert not (file / "out.jsonl").exists()
