"""Held-out rewards and moments from the command line, through to the report."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs

import tiltlm as tl
from conftest import REWARDS, settings, write
from tiltlm.diagnostics.degeneracy import length_correlation
from tiltlm.diagnostics.overoptimisation import curve
from tiltlm.report.folder import read_run
from tiltlm.report.hacking import fitted, hacking_lines, overoptimisation_figure
from tiltlm.report.html import write_report
from tiltlm.workflow.recipe_files import read_recipe
from tiltlm.workflow.run import Run

MORE = (
    REWARDS
    + """

def held_out(completions):
    return [1.0 - len(set(c)) % 8 / 8 for c in completions]


def short(completions):
    return [float(len(c) < 12) for c in completions]


def an_e(completions):
    return [float("e" in c) for c in completions]


def always(completions):
    return [1.0 for c in completions]
"""
)


@pytest.fixture
def place(here):
    (here / "rewards.py").write_text(MORE)
    return here


def numbers(file):
    return json.loads(file.read_text())


class TestGold:
    def test_from_plan_to_report(self, cli, place, models):
        write(place / "recipe.yaml", settings(models, gold="rewards.py:held_out", steps=9, gold_every=1, stop=["e"]))
        ended = cli("plan", "recipe.yaml")
        assert "E gold, held out" in ended.out
        assert re.search(r"\ngold: \w+", ended.out)
        plan = numbers(place / "run/plan.json")
        assert plan["gold"]["name"] == "held_out"
        assert len(plan["gold"]["points"]) == len(plan["frontier"])
        for point in plan["gold"]["points"]:  # gold is 1 - reward here
            assert point["gold"]["value"] == pytest.approx(1 - point["proxy"]["value"], abs=1e-9)
        ended = cli("train", "recipe.yaml")
        assert "Held out: gold went from" in ended.out
        rows = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
        assert all(row["gold"] == pytest.approx(1 - row["reward"]) for row in rows)
        ended = cli("certify", "recipe.yaml")
        assert "E gold" in ended.out
        assert numbers(place / "run/certificate.json")["gold"]["n"] == 3 * 16
        kept = numbers(place / "run/hacking.json")
        assert kept["gold"]["name"] == "held_out"
        assert len(kept["draws"]["policy"]) == 3 * 16
        weights = [entry["log_weight"] for entry in kept["heaviest"]]
        assert weights == sorted(weights, reverse=True)
        assert all(entry["gold"] == pytest.approx(1 - entry["reward"]) for entry in kept["heaviest"])
        assert "Held out: gold went from" in cli("report", "run").out
        html = (place / "run/report.html").read_text().replace(get_plotlyjs(), "")
        assert "Is the reward being hacked?" in html
        assert "the posterior wants most" in html
        assert html.count('class="spec"') == 5 + 1 + 2 + 1  # both over KL, the parts, the lengths

    def test_without_gold_the_report_says_how_to_have_it(self, cli, place, models):
        write(place / "recipe.yaml", settings(models, stop=["e"]))
        for command in ("plan", "train", "certify"):
            assert cli(command, "recipe.yaml").code == 0
        cli("report", "run")
        html = (place / "run/report.html").read_text()
        assert "No reward was held out" in html
        assert "Reward against length" in html
        assert "gold" not in numbers(place / "run/plan.json")

    def test_what_became_of_each_part(self, cli, place, models):
        parts = [{"part": "length", "weight": 0.1}, {"function": "rewards.py:an_e", "bounds": [0, 1]}]
        write(place / "recipe.yaml", settings(models, reward=parts, bounds=None))
        for command in ("plan", "train"):
            assert cli(command, "recipe.yaml").code == 0
        ended = cli("certify", "recipe.yaml")
        line = r"\nan_e: 0\.\d+ under the prior, 0\.\d+ under the policy \([+-][\d.e-]+ \[.*\]\)\n"
        assert re.search(line, ended.out)
        assert "\nlength: " in ended.out
        assert numbers(place / "run/hacking.json")["parts"].keys() >= {"length", "an_e"}
        assert "\nan_e: " in cli("report", "run").out
        assert "under the policy (" in (place / "run/report.html").read_text()
        assert "under the policy (" not in cli("certify", "recipe.yaml", "--policy", "prior").out

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--gold", "rewards.py"], "gold is 'rewards.py'; write it as file.py:function"),
            (["--gold", "no.py:f"], "gold: there is no file 'no.py'"),
            (["--gold", "rewards.py:nobody"], "gold 'rewards.py:nobody': rewards.py has no function 'nobody'"),
            (["--gold", "rewards.py:nan"], "reward 'nan' is nan for completion"),
        ],
    )
    def test_bad_gold(self, refused, place, flags, message):
        assert message in refused("plan", "recipe.yaml", *flags)

    @pytest.mark.parametrize(
        ("gold", "message"),
        [
            ({"part": "fluent"}, "gold: part is 'fluent'; did you mean 'fluency'?"),
            ({"part": "length", "mots": 3}, "gold: setting 'mots' is none of part length's"),
            ([{"part": "length", "weight": "x"}], "weight of part 1 of gold is 'x'"),
            ({"function": "rewards.py:nobody"}, "gold 'rewards.py:nobody': rewards.py has no function 'nobody'"),
            ([], "gold is an empty list"),
            (3, "gold is 3 in recipe.yaml; give file.py:function, or a list of parts"),
        ],
    )
    def test_bad_parts_are_said_before_a_model_is_loaded(self, refused, place, models, gold, message):
        write(place / "recipe.yaml", settings(models, gold=gold, model="no/such-model"))
        assert message in refused("plan", "recipe.yaml")

    def test_parts_as_gold_and_as_reward(self, cli, place, models):
        both = [{"part": "length", "unit": "characters"}, {"function": "rewards.py:good", "weight": -2}]
        write(place / "recipe.yaml", settings(models, gold=both, reward={"function": "rewards.py:good"}))
        assert cli("plan", "recipe.yaml", "--gold", "rewards.py:held_out").code == 0  # the flag goes on top
        assert cli("plan", "recipe.yaml").code == 0
        run = Run(read_recipe(place / "recipe.yaml", {}))
        texts = ["a good film", "no"]
        assert run.gold is not None
        values = run.gold.fn(completions=texts)
        good = run.reward_function(completions=texts)
        assert list(values) == [len(text) - 2 * value for text, value in zip(texts, good, strict=True)]


class TestMoments:
    def recipe(self, place, models, **changes):
        return write(place / "recipe.yaml", settings(models, **{"samples": 64, **changes}))

    def test_alone_they_are_the_target(self, cli, place, models):
        moments = [{"function": "rewards.py:an_e", "mean": 0.5, "bounds": [0, 1]}]
        self.recipe(place, models, reward=None, beta=None, bounds=None, moments=moments)
        ended = cli("plan", "recipe.yaml")
        assert re.search(r"moment an_e: lambda -?[\d.]+ ± [\d.]+ nats, mean 0.500 ± ", ended.out)
        found = numbers(place / "run/moments.json")
        assert found["moments"]["an_e"]["achieved"]["value"] == pytest.approx(0.5, abs=1e-6)
        chosen = numbers(place / "run/plan.json")["chosen"]
        assert chosen["beta"] == 1.0
        weight = found["moments"]["an_e"]["weight"]["value"]  # E r = lambda * mean, of the same draws
        assert chosen["reward"]["value"] == pytest.approx(0.5 * weight, abs=0.05 * abs(weight))
        assert cli("train", "recipe.yaml").code == 0
        before = (place / "run/moments.json").read_bytes()
        assert cli("certify", "recipe.yaml", "--samples", "24").code == 0  # the same target, whatever is drawn
        assert (place / "run/moments.json").read_bytes() == before
        ended = cli(
            "sample", "recipe.yaml", "--engine", "importance", "--draws", "64", "--count", "8", "--json", "s.json"
        )
        assert ended.code == 0

    def test_beside_a_reward_they_hold_under_its_posterior(self, cli, place, models):
        self.recipe(place, models, moments=["rewards.py:an_e=0.4"], samples=128)
        assert cli("plan", "recipe.yaml").code == 0

        run = Run(read_recipe(place / "recipe.yaml", {}))
        target = run.target(0.25)
        scored = target.score(run._drawn)
        assert target.beta == 0.25
        assert set(scored.rewards) == {"good", "an_e"}
        means = []
        for p in range(3):
            rows = scored.draws.prompt_index == p
            means.append(float((scored.log_evidence[rows].softmax(0) * scored.rewards["an_e"][rows]).sum()))
        assert sum(means) / 3 == pytest.approx(0.4, abs=1e-6)
        again = run.target(1.0).score(run._drawn).at(0.25)
        assert torch.allclose(again.log_evidence, scored.log_evidence)

    def test_a_mean_of_one_is_a_hard_constraint(self, cli, place, models):
        self.recipe(place, models, reward=None, beta=None, bounds=None, moments=["rewards.py:an_e=1"])
        ended = cli("plan", "recipe.yaml")
        assert numbers(place / "run/moments.json")["moments"] == {}
        assert "violate a hard constraint" in ended.out

    def test_another_mean_is_another_target(self, cli, place, models):
        self.recipe(place, models, reward=None, beta=None, bounds=None, moments=["rewards.py:an_e=0.4"])
        cli("plan", "recipe.yaml")
        first = numbers(place / "run/moments.json")["moments"]["an_e"]["weight"]["value"]
        cli("plan", "recipe.yaml", "--moments", "rewards.py:an_e=0.6")
        assert numbers(place / "run/moments.json")["moments"]["an_e"]["weight"]["value"] > first + 0.3

    def test_a_named_part_is_the_function_that_it_is(self, cli, place, models):
        moments = [{"part": "pattern", "pattern": "e", "mean": 0.4, "name": "an_e"}]
        found = []
        for given in (moments, ["rewards.py:an_e=0.4"]):
            self.recipe(place, models, reward=None, beta=None, bounds=None, moments=given)
            assert cli("plan", "recipe.yaml").code == 0
            found.append(numbers(place / "run/moments.json")["moments"]["an_e"])
        assert found[0] == found[1]

    def test_there_is_no_reward_to_judge_prefixes_by(self, refused, place, models):
        self.recipe(place, models, reward=None, beta=None, bounds=None, moments=["rewards.py:an_e=0.4"])
        sample = ("sample", "recipe.yaml", "--engine", "smc", "--draws", 4)
        assert "the recipe has no reward that could judge" in refused(*sample, "--twist", "prefix")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"moments": ["rewards.py:an_e"]}, "moments is 'rewards.py:an_e'; write it as file.py:function=mean"),
            (
                {"moments": [{"function": "rewards.py:an_e"}]},
                "moments.0.mean is missing in recipe.yaml; write a moment as",
            ),
            ({"moments": [{"function": "rewards.py:an_e", "maen": 1, "mean": 1}]}, "did you mean 'mean'?"),
            ({"moments": ["rewards.py:nobody=0.5"]}, "moments 'rewards.py:nobody': rewards.py has no function"),
            ({"moments": ["rewards.py:an_e=0.5", "rewards.py:an_e=0.5"]}, "moments has 'an_e' twice"),
            ({"moments": ["rewards.py:an_e=much"]}, "moments.0.mean is 'much'"),
            ({"moments": [{"part": "fluent", "mean": 1}]}, "moments: part is 'fluent'; did you mean 'fluency'?"),
            (
                {"moments": [{"part": "length", "maen": 1, "mean": 1}]},
                "moments: setting 'maen' is none of part length's",
            ),
            (
                {"moments": [{"mean": 1}]},
                "a moment has one feature; give it a function: file.py:function, or a part: NAME",
            ),
            ({"moments": ["rewards.py:always=0.5"]}, "moment 'always' asks for mean 0.5, but its values in"),
            (
                {"moments": ["rewards.py:an_e=0.5"], "beta": None, "kl_budget": 0.1},
                "moments beside a reward hold at one",
            ),
            ({"moments": ["rewards.py:an_e=0.5"], "reward": None}, "beta has no meaning for moments alone"),
            (
                {"moments": [{"function": "rewards.py:an_e", "mean": 2, "bounds": [0, 1]}]},
                "moment 'an_e' asks for mean 2, outside its bounds",
            ),
        ],
    )
    def test_bad_moments(self, refused, place, models, changes, message):
        self.recipe(place, models, **changes)
        assert message in refused("plan", "recipe.yaml")
        assert not (place / "run/plan.json").exists()


def hacked_run(folder, a=0.9, b=0.7, alarm=True):
    """A run whose gold follows the law exactly, but for noise."""
    rng, rows = np.random.default_rng(0), []
    for step in range(1, 121):
        kl = 5 * step / 120
        gold = 0.2 + curve(kl**0.5, a, b) + 0.03 * rng.normal()
        rows.append({"step": step, "reward": 0.1 + 0.5 * kl**0.5, "kl_prior": kl, "elbo": 0.0, "gold": gold})
        rows[-1] |= {"gold_stderr": 0.03, "reward/good": 0.3 * kl, "reward/long": 0.2}
    if alarm:
        rows[90]["alarm"] = {"step": 91, "sentence": "reward hacking: from step 60 to 91 the trained reward rose"}
    point = {"value": 0.2, "low": 0.1, "high": 0.3}
    empty = {"prior_reward": point, "frontier": [], "best_of_n": [], "chosen": None, "per_prompt": [], "notes": []}
    plan = empty | {"gold": {"prior": point, "points": [], "sentence": "gold: …"}}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class TestReport:
    def test_the_fitted_peak_is_marked_and_told(self, tmp_path):
        run = read_run(hacked_run(tmp_path))
        found = fitted(run)
        truth = float(np.exp(2 * (0.9 / 0.7 - 1)))
        assert truth in found.peak
        assert found.verdict == "peak"
        first, second = hacking_lines(run)
        assert first.startswith("Held out: gold went from")
        assert second.startswith("Reward hacking: from step 60 to 91")
        assert "gold peaks at KL" in second
        assert "the policy is at 5.00 nats, past it" in second
        figure = overoptimisation_figure(run)
        marks = [shape for shape in figure.layout.shapes if shape.type == "line"]
        assert [mark.x0 for mark in marks] == [pytest.approx(found.peak.value**0.5)]
        (fit,) = [trace for trace in figure.data if trace.name == "fit d (a − b log d)"]
        assert fit.y[60] == pytest.approx(found.at(fit.x[60] ** 2))
        html = write_report(tmp_path).read_text()
        assert "gold peaks at" in html
        assert "past it" in html

    def test_no_peak_is_drawn_where_there_is_none(self, tmp_path):
        run = read_run(hacked_run(tmp_path, a=0.5, b=0.0, alarm=False))
        assert not overoptimisation_figure(run).layout.shapes
        assert "No alarm; no peak within the range seen" in hacking_lines(run)[1]

    def test_length_bias_is_within_prompts(self):
        index = torch.tensor([0] * 50 + [1] * 50)
        rng = torch.Generator().manual_seed(0)
        lengths = torch.randint(5, 20, (100,), generator=rng) + 40 * index
        reward = torch.randn(100, dtype=torch.float64, generator=rng) + 3.0 * index
        assert 0.0 in length_correlation(lengths, reward, index)  # long prompts with high rewards are no bias
        assert length_correlation(lengths, reward, torch.zeros_like(index)).low > 0.5
        paid = length_correlation(lengths, reward + 0.3 * lengths, index)
        assert 0.5 < paid.low < paid.value < paid.high < 1
        assert np.isnan(length_correlation(lengths, torch.zeros(100), index).value)


def test_the_example_recipe_reaches_the_features():
    from tiltlm.workflow.moments import load_moments

    recipe = read_recipe(Path(__file__).parent.parent / "recipes/balanced.yaml", {})
    (women, kind), _ = load_moments(recipe.moments)
    assert women.fn(completions=["She left.", "He left.", "the heron"]) == [1.0, 0.0, 0.0]
    assert (women.mean, kind.mean) == (0.5, 1)
    assert kind.fn(completions=["a good film", "an awful, horrible film"]) == [1.0, 0.0]
    assert isinstance(women, tl.Moment)
