"""Every engine from the command line, with LoRA: on a small random model always, on SmolLM2 among the slow tests."""

import json
from dataclasses import fields

import pytest

from conftest import settings, write
from tiltlm.inference.catalogue import decoding_engines, training_engines

TRAINING, DECODING = training_engines(), decoding_engines()
REPLAYED = [name for name, engine in TRAINING.items() if engine.claim.data in ("weighted", "any")]


def flags_for(name):
    """What an engine needs beside its name."""
    return ["--teacher", "best-of-n"] if TRAINING[name].claim.data == "given" else []


@pytest.mark.parametrize("name", TRAINING)
def test_trains(cli, here, models, name):
    write(here / "recipe.yaml", settings(models, steps=2, max_new_tokens=4))
    ended = cli("train", "recipe.yaml", "--engine", name, *flags_for(name))
    assert ended.code == 0, ended.err
    steps = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["loss"] is not None and step["grad_norm"] is not None for step in steps)
    assert any((here / "run" / "policy").glob("*.safetensors"))


@pytest.mark.parametrize("name", REPLAYED)
def test_trains_from_earlier_draws(cli, here, models, name):
    write(here / "recipe.yaml", settings(models, steps=3, max_new_tokens=3))
    ended = cli("train", "recipe.yaml", "--engine", name, "--replay", "3", "--out", "replayed")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("name", sorted(set(TRAINING) - set(REPLAYED) - {"sft"}))
def test_refuses_earlier_draws(refused, here, name):
    assert "which" in refused("train", "recipe.yaml", "--engine", name, "--replay", "3")


@pytest.mark.parametrize("name", DECODING)
def test_decodes(cli, refused, here, name):
    flags = ["--engine", name, "--draws", "8", "--json", "s.json"]
    if name == "value-guided":
        assert "critic" in refused("sample", "recipe.yaml", *flags)
        return
    ended = cli("sample", "recipe.yaml", *flags)
    assert ended.code == 0, ended.err
    assert len(json.loads((here / "s.json").read_text())["prompts"]) == 3


def test_a_misspelt_option_says_what_there_is(refused, here):
    message = refused("train", "recipe.yaml", "--engine", "ppo", "--options", "gama=1")
    assert "option 'gama' is none of ppo's; it has" in message
    assert all(field.name in message for field in fields(TRAINING["ppo"]) if field.init)
    assert "write it as name=value" in refused("train", "recipe.yaml", "--engine", "ppo", "--options", "gamma")


def test_an_option_reaches_the_engine(cli, here):
    ended = cli("train", "recipe.yaml", "--engine", "var-grad", "--options", "updates=3", "--steps", "1")
    assert ended.code == 0, ended.err
    assert json.loads((here / "run" / "recipe.json").read_text())["options"] == {"updates": 3}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", TRAINING)
def test_trains_smollm2(cli, here, models, name):
    small = {"model": "smollm2-135m-instruct", "steps": 1, "group": 2, "batch": 2, "max_new_tokens": 3, "lora_r": 4}
    write(here / "recipe.yaml", settings(models, **small))
    ended = cli("train", "recipe.yaml", "--engine", name, *flags_for(name))
    assert ended.code == 0, ended.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(set(DECODING) - {"value-guided"}))
def test_decodes_smollm2(cli, here, models, name):
    write(here / "recipe.yaml", settings(models, model="smollm2-135m-instruct", max_new_tokens=3))
    ended = cli("sample", "recipe.yaml", "--engine", name, "--draws", "4")
    assert ended.code == 0, ended.err
