"""Answers that may be withheld: the reward's odds by enumeration, the vote, and the risk-coverage curve."""

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml

import tiltlm as tl
from conftest import settings, write
from tiltlm import rewards
from tiltlm.evaluation import evaluate_systems, risk_coverage, vote, voted
from tiltlm.evaluation.systems import System
from tiltlm.posterior import exact as ex
from tiltlm.report.selective import risk_coverage_figure
from tiltlm.rewards.abstention import abstains
from tiltlm.testing.fixtures import language

IDK = "I don't know"
WORDS = ("Lima", "Quito", IDK)


def three_answers(truth, confidence, beta, logits=(0.3, 0.9, -0.5)):
    """A tabular model of one word, under the calibrated reward; `truth` has the probabilities that Lima and that Quito are right."""
    part = rewards.CalibratedAnswer(confidence=confidence)

    def reward(ids):
        worth = [part([WORDS[ids[0]]], answer=[answer])[0] for answer in ("Lima", "Quito", "none of them")]
        return sum(share * value for share, value in zip((*truth, 1 - sum(truth)), worth, strict=True))

    return language(lambda prompt, prefix: list(logits), reward, beta=beta, depth=1)


class TestReward:
    @pytest.mark.parametrize(
        ("text", "silent"),
        [
            ("I don't know", True),
            ("i DON'T know.", True),
            ("I do not know the answer", True),
            ("Unknown", True),
            ("", True),
            (" . ", True),
            ("I don't knowingly lie", False),
            ("Lima, I don't know", False),
            ("unknowns", False),
        ],
    )
    def test_silence(self, text, silent):
        assert abstains(text) is silent
        assert rewards.Answered()([text]) == [float(not silent)]

    def test_points(self):
        part = rewards.CalibratedAnswer(confidence=0.8)
        assert part.bounds == pytest.approx((-4, 1))
        given = part(["the lima", "Quito", IDK, ""], answer=[["Lima", "Ciudad de los Reyes"]] * 4)
        assert given == pytest.approx([1, -4, 0, 0])
        assert rewards.CalibratedAnswer()(["x"], answer=["y"]) == pytest.approx([-1])
        assert rewards.CalibratedAnswer()(["unknown"], answer=["Unknown"]) == [1]  # the right answer, if that is one

    @pytest.mark.parametrize("confidence", [0, 1, -0.1, math.nan])
    def test_a_confidence_is_a_probability(self, confidence):
        with pytest.raises(tl.InputError, match="confidence is"):
            rewards.CalibratedAnswer(confidence=confidence)

    @pytest.mark.parametrize("confidence", [0.2, 0.5, 0.9])
    @pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
    def test_the_odds_at_the_optimum(self, confidence, beta):
        """Right against silent: the prior's odds times exp(1 / beta); wrong against silent: times exp(-t / ((1 - t) beta))."""
        world = three_answers((1, 0), confidence, beta)
        exact = ex.posterior(world.target, world.prompts)
        moved = exact.log_posterior - exact.log_prior
        right, wrong, silent = (moved[exact.completions.index((k,))] for k in range(3))
        assert float(right - silent) == pytest.approx(1 / beta, rel=1e-10)
        assert float(wrong - silent) == pytest.approx(-confidence / (1 - confidence) / beta, rel=1e-10)

    @pytest.mark.parametrize("confidence", [0.3, 0.5, 0.75])
    @pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.75, 0.9])
    def test_silence_is_right_below_the_confidence(self, p, confidence):
        """Where Lima is right with probability p and the policy cannot know: silence gains on it exactly where p < t."""
        beta = 0.05
        world = three_answers((p, 1 - p), confidence, beta)
        exact = ex.posterior(world.target, world.prompts)
        moved = exact.log_posterior - exact.log_prior
        gain = float(moved[exact.completions.index((0,))] - moved[exact.completions.index((2,))])
        assert gain == pytest.approx((p - confidence) / (1 - confidence) / beta, rel=1e-10, abs=1e-9)

    def test_training_learns_to_be_silent(self):
        """One prompt whose answer is right in three of ten cases: the trained policy is silent at t = 0.5 and answers at t = 0.1."""
        said = {}
        for confidence in (0.5, 0.1):
            world = three_answers((0.3, 0.0), confidence, 0.05, logits=(2.0, 0.0, 0.0))
            policy = tl.fit(
                world.target,
                world.prompts,
                engine=tl.RLOO(group=8),
                lora=None,
                batch=1,
                lr=0.3,
                steps=60,
                micro_tokens=10**6,
            )
            exact = ex.posterior(world.target, world.prompts)
            law = exact.log_prob(policy).exp()
            said[confidence] = WORDS[exact.completions[int(law.argmax())][0]]
        assert said == {0.5: IDK, 0.1: "Lima"}


class TestVote:
    def test_most_draws_win_and_silence_counts_against_them(self):
        assert vote(["Lima", "the Lima.", IDK, "Quito"]) == vote(["Lima", "x", "lima", ""])
        assert vote(["Lima", "the Lima.", IDK, "Quito"]).share == 0.5
        assert vote(["b", "a", "a", "b"]).answer == "b"
        assert vote([IDK, ""]).answer == IDK
        assert vote([IDK]).share == 0

    def test_the_rule(self):
        system = voted("vote-0.5", (("a", "a", "b"), ("a", "b", "c"), (IDK, IDK, "a")), 0.5)
        assert system.runs == ((("a",), (IDK,), (IDK,)),)
        with pytest.raises(tl.InputError, match="least is 0"):
            voted("x", (("a",),), 0)


class TestRiskCoverage:
    def test_by_hand(self):
        curve = risk_coverage("prior", [0.9, 0.5, 0.5, 0.1], [True, True, False, False])
        assert curve.points == ((0.9, 0.25, 0.0), (0.5, 0.75, pytest.approx(1 / 3)), (0.1, 1.0, 0.5))
        assert curve.area == pytest.approx((0 + 1 / 3 + 1 / 3 + 0.5) / 4)
        assert risk_coverage("same", [0.5] * 4, [True, True, False, False]).area == 0.5
        with pytest.raises(tl.InputError, match="0 confidences"):
            risk_coverage("none", [], [])

    def test_a_confidence_that_knows_beats_one_that_does_not(self):
        rng = torch.Generator().manual_seed(0)
        sure = torch.rand(500, generator=rng)
        right = (torch.rand(500, generator=rng) < sure).tolist()
        knowing = risk_coverage("a", sure.tolist(), right).area
        blind = risk_coverage("b", torch.rand(500, generator=rng).tolist(), right).area
        assert knowing < blind - 0.1

    def test_the_picture(self):
        curves = [risk_coverage(name, [0.5, 1.0], [False, True]).as_dict() for name in ("prior", "policy", "sft")]
        figure = risk_coverage_figure(curves)
        assert [trace.name for trace in figure.data] == [f"{name}, area 0.250" for name in ("prior", "policy", "sft")]
        assert list(figure.data[0].x) == [0.5, 1.0]


def test_accuracy_of_the_answers_given():
    columns = {"answer": ["a", "b", "c", "d"]}
    systems = [
        System.of("bold", ["a", "b", "x", "y"]),
        System.of("shy", ["a", IDK, IDK, "y"]),
        System.of("mute", [IDK] * 4),
    ]
    table = evaluate_systems("t", columns, systems, [rewards.Answered(), rewards.SelectiveAccuracy()])
    found = {name: {k: cell.estimate.value for k, cell in cells.items()} for name, cells in table.rows.items()}
    assert found["bold"] == {"answered": 1.0, "selective-accuracy": 0.5}
    assert found["shy"] == {"answered": 0.5, "selective-accuracy": 0.5}
    assert math.isnan(found["mute"]["selective-accuracy"])


def test_the_task_has_the_rule_the_curve_and_minimum_risk(cli, refused, here, models):
    lines = [json.dumps({"prompt": p, "reference": r}) for p, r in (("the film", "good"), ("a story", "dull"))]
    (here / "rows.jsonl").write_text("\n".join(lines))
    metrics = [{"part": "answered"}, {"part": "selective-accuracy", "column": "reference"}]
    changes = {"prompts": "rows.jsonl", "test": "rows.jsonl", "steps": 1, "metrics": metrics, "bounds": None}
    reward = {"part": "calibrated-answer", "column": "reference"}
    write(here / "own.yaml", settings(models, **changes) | {"reward": reward})
    ended = cli("task", "own.yaml", "--methods", "prior,vote-0.5,smc,mrt", "--draws", 4, "--json", "t.json")
    assert ended.code == 0, ended.err
    found = json.loads((here / "t.json").read_text())
    assert [system["name"] for system in found["systems"]] == ["prior", "vote-0.5", "smc", "mrt"]
    assert [curve["name"] for curve in found["risk_coverage"]] == ["prior", "mrt"]  # smc's draws know the answers
    assert (here / "run" / "risk-coverage.html").stat().st_size > 1000
    texts = json.loads((here / "run" / "task" / "vote-0.5-0.json").read_text())["texts"]
    drawn = json.loads((here / "run" / "task" / "prior-0.json").read_text())["texts"]
    assert texts == [[one.answer if one.share >= 0.5 else IDK] for one in map(vote, drawn)]
    write(
        here / "own.yaml",
        yaml.safe_load((here / "own.yaml").read_text()) | {"methods": {"mrt": {"options": {"alpha": -1}}}},
    )
    assert "alpha is -1" in refused("task", "own.yaml", "--methods", "prior,mrt")
    assert "vote-T" in refused("task", "own.yaml", "--methods", "vote-2")


def test_a_pattern_of_each_prompt():
    part = rewards.Pattern(column="form")
    assert part(["a 12", "a b", "A B"], form=[r"\d+", r"\d+", "(?i)a b"]) == [1, 0, 1]
    assert part.reads == ("form",)
    assert replace(part, whole=True)(["12", "a 12"], form=[r"\d+"] * 2) == [1, 0]
    with pytest.raises(tl.InputError, match="give one of them"):
        rewards.Pattern()
    with pytest.raises(tl.InputError, match=r"pattern is '\(', which is no regular expression"):
        part(["a"], form=["("])
