"""Supervised starts: trained for a moment on made-up rows, saved, loaded by transformers alone, and gone on with after a kill."""

import io
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageDraw

import tiltlm as tl
from tiltlm.lm.scratch.efficientnet_lite import (
    MODULE,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    image_processor,
    load_efficientnet_lite,
)
from tiltlm.lm.scratch.pairs import Pairs, token_loss
from tiltlm.lm.scratch.vocabulary import train_tokenizer
from tiltlm.start import STARTS, Schedule, supervised, training

WORDS = {"a red": "une rouge", "a blue": "une bleue", "two red": "deux rouges"}
THINGS = {"house": "maison", "table": "table", "door": "porte", "car": "voiture", "apple": "pomme"}
PAIRS = [{"prompt": f"{a} {b}", "reference": f"{c} {d}"} for a, c in WORDS.items() for b, d in THINGS.items()] * 2
TINY = {"steps": 20, "seconds": 60.0, "validate_every": 10, "width": 32, "layers": 1, "heads": 2, "feedforward": 32}
QUICK = {**TINY, "vocabulary": 300, "batch_tokens": 256, "warmup": 2}

needs_lite0 = pytest.mark.skipif(
    __import__("importlib.util", fromlist=["util"]).find_spec(MODULE) is None,
    reason="EfficientNet-Lite0 is not installed",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tiltlm" / "starts"


def picture(colour, where):
    image = Image.new("RGB", (48, 48), "white")
    ImageDraw.Draw(image).rectangle((10, where, 38, where + 12), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PICTURES = [
    {"image": picture(colour, 4 if place == "above" else 30), "reference": f"a {colour} bar {place}"}
    for colour in ("red", "blue", "green")
    for place in ("above", "below")
] * 2


def test_the_tokenizer_gives_any_text_back_and_ends_it():
    tokenizer = train_tokenizer([row["prompt"] for row in PAIRS], 300)
    for text in ("a red house", "déjà vu – ümlaut", "日本 🙂 x", "two  spaces"):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_word_has_the_same_tokens_wherever_it_stands():
    tokenizer = train_tokenizer([row["prompt"] for row in PAIRS], 300)
    assert (
        tokenizer("house")["input_ids"][:-1]
        == tokenizer("red house")["input_ids"][-len(tokenizer("house")["input_ids"]) : -1]
    )


def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed():
    pairs = Pairs([[1] * (k % 7 + 1) for k in range(100)], [[1] * (k % 5 + 1) for k in range(100)], 0)
    for rng in (None, torch.Generator().manual_seed(1)):
        batches = pairs.batches(40, rng)
        assert sorted(row for batch in batches for row in batch) == list(range(100))
        assert all(len(batch) * max(map(pairs.cost, batch)) <= 40 for batch in batches)
    assert pairs.batches(40, torch.Generator().manual_seed(1)) == batches
    assert pairs.batches(40, torch.Generator().manual_seed(2)) != batches


def test_the_loss_is_transformers_own_and_padding_does_not_count():
    tokenizer = train_tokenizer([row["prompt"] for row in PAIRS], 300)
    start = STARTS["translation"]
    model = (
        supervised.make_translator(supervised.replace(start.size, width=16, heads=2), tokenizer, 32, 0).eval().double()
    )
    sources, targets = [[5, 6, 1], [7, 8, 9, 10, 1]], [[11, 1], [12, 13, 14, 1]]
    pairs = Pairs(sources, targets, tokenizer.pad_token_id)
    total, tokens = token_loss(model, pairs, [0, 1])
    assert tokens == 6
    each = [
        model(input_ids=torch.tensor([s]), labels=torch.tensor([t])).loss.item() * len(t)
        for s, t in zip(sources, targets, strict=True)
    ]
    assert total.item() == pytest.approx(sum(each), rel=1e-5)


def test_a_start_is_a_folder_that_transformers_loads(cache, tmp_path):
    found = tl.train_start("translation", PAIRS, PAIRS[:6], out=tmp_path / "mine", **QUICK)
    assert found.steps == 20
    assert found.loss < 5.7  # log 300: of a uniform guess
    assert set(found.metrics) == {"bleu", "chrf", "chrf of the source itself"}
    assert "nats a token" in str(found)
    code = (
        "import sys, torch; from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])\n"
        "ids = m.generate(**t(['a red house'], return_tensors='pt'), max_new_tokens=8, do_sample=False)\n"
        "assert 'tiltlm' not in sys.modules\n"
        "assert t('a red house').input_ids[-1] == t.eos_token_id\n"
        "print(ids[0].tolist(), m.config.decoder_start_token_id)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, found.folder], capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith("[0, ")
    assert [path.name for path in cache.glob("[!.]*")] == [path.name for path in cache.glob("translation-*")]
    assert [path.name for path in cache.glob(".*")] == [f".{found_in(cache)}.lock"]


def found_in(cache):
    (folder,) = cache.glob("translation-*")
    return folder.name


def test_two_processes_do_not_train_the_same_start_twice(cache):
    code = (
        "import sys, json, tiltlm as tl\n"
        "pairs, settings = json.loads(sys.argv[1])\n"
        "found = tl.train_start('translation', pairs, pairs[:4], **settings)\n"
        "print(found.folder, (found.folder / 'model.safetensors').stat().st_mtime_ns)"
    )
    given = json.dumps([PAIRS, QUICK])
    both = [subprocess.Popen([sys.executable, "-c", code, given], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0] for process in both)
    assert first == second != ""


@pytest.mark.parametrize("start", [*STARTS.values(), *(start.quick for start in STARTS.values())])
def test_what_a_start_becomes_does_not_depend_on_the_machines_speed(start):
    assert start.schedule.seconds is None


def test_it_learns_what_there_is_to_learn():
    found = tl.train_start(
        "translation", PAIRS, PAIRS[:15], **{**QUICK, "steps": 250, "validate_every": 50, "lr": 1e-2, "dropout": 0.0}
    )
    assert found.metrics["chrf"] > 0.9
    assert found.metrics["chrf"] > found.metrics["chrf of the source itself"] + 0.3


def test_the_second_time_it_comes_from_the_cache_and_another_seed_does_not(cache, monkeypatch):
    first = tl.train_start("translation", PAIRS, PAIRS[:4], **QUICK)
    other = tl.train_start("translation", PAIRS, PAIRS[:4], **QUICK, seed=1)
    assert other.folder != first.folder
    monkeypatch.setattr(supervised, "_make", lambda *given: pytest.fail("trained again"))
    again = tl.train_start("translation", PAIRS, PAIRS[:4], **QUICK)
    assert again == first
    (cache / first.folder.name / supervised.FACTS).unlink()  # half a folder is none
    with pytest.raises(pytest.fail.Exception):
        tl.train_start("translation", PAIRS, PAIRS[:4], **QUICK)


def test_an_interrupted_training_goes_on_to_the_same_weights(cache, monkeypatch):
    from safetensors.torch import load_file

    whole = tl.train_start("translation", PAIRS, PAIRS[:4], **QUICK)
    weights = load_file(whole.folder / "model.safetensors")
    (whole.folder / supervised.FACTS).unlink()
    step = training._step

    def killed(*given):
        if given[5] == 13:
            raise KeyboardInterrupt
        step(*given)

    monkeypatch.setattr(training, "_step", killed)
    import shutil

    shutil.rmtree(whole.folder)
    with pytest.raises(KeyboardInterrupt):
        tl.train_start("translation", PAIRS, PAIRS[:4], **QUICK)
    assert not whole.folder.exists()
    seen = []
    monkeypatch.setattr(training, "_step", lambda *given: (seen.append(given[5]), step(*given)))
    again = tl.train_start("translation", PAIRS, PAIRS[:4], **QUICK)
    assert seen == list(range(10, 20))
    assert again.loss == whole.loss
    for name, value in load_file(again.folder / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name


def test_the_best_weights_are_kept_and_patience_ends_it(tmp_path):
    model, losses = torch.nn.Linear(1, 1), iter([3.0, 1.0, 2.0, 2.0, 0.5])
    kept = []

    def validate():
        kept.append(model.weight.detach().clone())
        return next(losses)

    state = training.train(
        model,
        lambda rows: (model(torch.ones(1, 1)).sum(), 1),
        lambda rng: [[0]] * 3,
        validate,
        Schedule(steps=100, validate_every=2, patience=2, warmup=0, lr=0.1),
        folder=tmp_path,
        key="k",
        progress=lambda share: None,
    )
    assert (state.step, state.best, state.best_step, state.epoch) == (8, 1.0, 4, 2)
    assert torch.equal(model.weight, kept[1])
    assert not torch.equal(model.weight, kept[3])


# --- pictures ---


def random_encoder(image_size=32, stages=5):
    torch.manual_seed(0)
    return (
        EfficientNetLiteModel(EfficientNetLiteConfig(image_size=image_size, stages=stages)).requires_grad_(False).eval()
    )


def test_pixels_are_what_the_network_was_trained_on():
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    found = image_processor(32)(Image.fromarray(pixels.numpy()), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, (pixels.permute(2, 0, 1).float() - 127) / 128, atol=1e-5, rtol=0)


def test_patches_know_their_place_and_batch_norm_stays():
    encoder = random_encoder(64)
    before = encoder.stem.norm.running_mean.clone()
    encoder.train()
    states = encoder(pixel_values=torch.randn(2, 3, 64, 64)).last_hidden_state
    assert states.shape == (2, 16, 112 + 16)
    assert torch.equal(encoder.stem.norm.running_mean, before)
    places = states[0, :, 112:]
    assert torch.cdist(places, places).add(torch.eye(16) * 9).min() > 0.1
    with pytest.raises(tl.InputError, match="multiple of 16"):
        random_encoder(40)


@needs_lite0
def test_lite0_sees():
    """A stop sign is told from a face by pixels alone only with the right weights in the right places."""
    encoder = load_efficientnet_lite(64, 7)
    same, other = picture("red", 4), picture("blue", 30)
    pixels = image_processor(64)([Image.open(io.BytesIO(p)) for p in (same, other)], return_tensors="pt")[
        "pixel_values"
    ]
    states = encoder(pixel_values=pixels).last_hidden_state[..., :320]
    assert states.shape == (2, 4, 320)
    assert states.isfinite().all()
    assert 0.05 < states.std() < 10  # wrong weights or normalisation die out or explode over sixteen blocks


def test_captions_end_to_end(monkeypatch, cache):
    monkeypatch.setattr(supervised, "load_efficientnet_lite", random_encoder)
    monkeypatch.setattr(supervised, "IMAGE_SIZE", 32)
    found = tl.train_start("captions", PICTURES, PICTURES[:6], **QUICK)
    assert set(found.metrics) == {"exact match", "chrf"}
    assert found.trained < found.parameters
    from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(found.folder).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(found.folder), AutoTokenizer.from_pretrained(found.folder)
    some = [Image.open(io.BytesIO(row["image"])) for row in PICTURES[:3]]
    pixels = processor(some, return_tensors="pt")["pixel_values"]
    ids = model.generate(pixel_values=pixels, max_new_tokens=8, do_sample=False)
    assert len(tokenizer.batch_decode(ids, skip_special_tokens=True)) == 3
    frozen = random_encoder(32).state_dict()
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, frozen[name]), name


# --- bad input ---


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "the train rows are none"),
        ([{"prompt": "a"}], "no column 'reference'; it has prompt"),
        ([{"prompt": " ", "reference": "b"}], "prompt of row 1 of the train rows is ' '"),
        ([*PAIRS, {"prompt": "a", "reference": None}], "reference of row 31 of the train rows is None"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows, says):
    with pytest.raises(tl.InputError, match=says):
        tl.train_start("translation", rows, PAIRS[:2], **QUICK)


def test_a_picture_that_does_not_decode_is_named(monkeypatch):
    monkeypatch.setattr(supervised, "load_efficientnet_lite", lambda size, stages: random_encoder(32, 5))
    rows = [*PICTURES[:2], {"image": b"no picture", "reference": "nothing"}]
    with pytest.raises(tl.InputError, match="image of row 3 is 10 bytes and no picture"):
        tl.train_start("captions", rows, PICTURES[:2], **QUICK)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"heads": 3}, "heads is 3 and width 32"),
        ({"steps": 0}, "steps is 0"),
        ({"depth": 3}, "setting 'depth'"),
        ({"vocabulary": 10}, "vocabulary is 10"),
        ({"seconds": float("nan")}, "seconds is nan"),
    ],
)
def test_settings_that_cannot_be_used_are_named(changes, says):
    with pytest.raises(tl.InputError, match=says):
        tl.train_start("translation", PAIRS, PAIRS[:2], **{**QUICK, **changes})


def test_long_rows_are_counted_and_said():
    long = {"prompt": "".join(chr(0x4E00 + k) for k in range(100)), "reference": "y"}
    with pytest.warns(tl.TiltWarning, match="1 rows are longer than 160 tokens"):
        found = tl.train_start("translation", [*PAIRS, long], PAIRS[:4], **QUICK)
    assert (found.too_long, found.rows) == (1, (30, 4))


def test_the_command(cli, refused, tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    files = ["--train", tmp_path / "train.jsonl", "--validation", tmp_path / "validation.jsonl"]
    small = ["--steps", 4, "--width", 16, "--layers", 1, "--quick"]
    ended = cli("start", "translation", *files, *small, "--out", tmp_path / "out", "--json", tmp_path / "found.json")
    assert ended.code == 0, ended
    assert f"folder: {tmp_path / 'out'}" in ended.out
    assert json.loads((tmp_path / "found.json").read_text())["steps"] == 4
    assert "did you mean 'translation'" in refused("start", "translate")
    assert "something already" in refused("start", "translation", *files, "--out", tmp_path / "out")
    assert "without validation" in refused("start", "translation", "--train", "rows.jsonl")
