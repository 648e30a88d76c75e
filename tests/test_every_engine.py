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


def test_a_critic_is_certified_and_decodes(cli, refused, here, models):
    """What a value engine learned is a policy for certify, a proposal for importance, and a twist for SMC."""
    write(here / "recipe.yaml", settings(models, max_new_tokens=4, batch=3))
    assert cli("train", "recipe.yaml", "--engine", "soft-value-regression", "--steps", "3").code == 0
    assert cli("certify", "recipe.yaml", "--json", "c.json").code == 0
    assert json.loads((here / "c.json").read_text())["kl_prior"]["value"] > 0
    for flags in (["value-guided", "--proposal", "run/policy"], ["smc", "--twist", "run/policy"]):
        ended = cli("sample", "recipe.yaml", "--engine", *flags, "--draws", "8")
        assert ended.code == 0, ended.err
    ended = cli(
        "sample", "recipe.yaml", "--engine", "smc", "--twist", "prefix", "--draws", "8", "--option", "threshold=0.9"
    )
    assert ended.code == 0, ended.err
    assert "resampled" in ended.err
    assert "use --engine smc" in refused("sample", "recipe.yaml", "--engine", "importance", "--twist", "prefix")


def test_compare(cli, refused, here):
    names = "prior,rejection,rloo,var-grad+replay,sft,rloo/importance"
    ended = cli("compare", "recipe.yaml", "--engines", names, "--budget", "36", "--seconds", "1", "--json", "c.json")
    assert ended.code == 0, ended.err
    samples, seconds = json.loads((here / "c.json").read_text())["comparisons"]
    assert [result["name"] for result in samples["results"]] == names.split(",")
    assert samples["budget"] == "36 samples"
    assert {result["samples"] for result in samples["results"] if result["steps"]} <= {36, 39, 45}
    assert seconds["budget"] == "1 seconds of training"
    assert "KL(q‖p*)" in (here / "run" / "compare.html").read_text()
    assert "raise it" in refused("compare", "recipe.yaml", "--engines", "rloo", "--budget", "2")


def test_the_list_of_engines(cli, refused, here):
    ended = cli("engines", "var-grad", "--prove", "--json", "e.json")
    assert ended.code == 0, ended.err
    (row,) = json.loads((here / "e.json").read_text())["engines"]
    assert all(check["passed"] for check in row["checks"])
    listed = cli("engines").out
    assert "var-grad " in listed  # whole, at whatever width
    assert "not asked" not in listed
    assert max(map(len, listed.splitlines())) <= 80
    assert "did you mean 'var-grad'" in refused("engines", "var-gard")


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
