"""Reward functions add, multiply and scale; every part is logged; bounds hold; p* moves only where it is said to."""

import inspect
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import tiltlm as tl
from conftest import settings, write
from test_reward import CHAT, draws
from tiltlm import rewards
from tiltlm.evidence.composition import bounds_of
from tiltlm.evidence.parts import Function
from tiltlm.posterior import exact as ex
from tiltlm.testing import small_language


def length(completions):
    return [float(len(c)) for c in completions]


def vowels(completions):
    return [float(sum(letter in "aeiou" for letter in c)) for c in completions]


LENGTH, VOWELS = Function(length, (0.0, 10.0)), Function(vowels, (0.0, 10.0))


def values(formula, given=None, **settings):
    return tl.Reward(formula, **settings).log_likelihood(draws() if given is None else given)


class TestValues:
    """TEXTS are good, bad, "" and fine: lengths 4 3 0 4, vowels 2 1 0 2."""

    @pytest.mark.parametrize(
        ("formula", "expected"),
        [
            (0.5 * LENGTH + VOWELS, [4.0, 2.5, 0.0, 4.0]),
            (LENGTH - 2 * VOWELS, [0.0, 1.0, 0.0, 0.0]),
            (LENGTH * VOWELS, [8.0, 3.0, 0.0, 8.0]),
            (2 * (LENGTH * VOWELS) + 1, [17.0, 7.0, 1.0, 17.0]),
            (1 - VOWELS, [-1.0, 0.0, 1.0, -1.0]),
            (-LENGTH, [-4.0, -3.0, 0.0, -4.0]),
            (3 * (LENGTH + 2 * VOWELS) - LENGTH, [20.0, 12.0, 0.0, 20.0]),
            (LENGTH + vowels, [6.0, 4.0, 0.0, 6.0]),
            (vowels + LENGTH, [6.0, 4.0, 0.0, 6.0]),
        ],
    )
    def test_they_are_the_arithmetic_of_the_parts_as_function_and_as_evidence(self, formula, expected):
        assert formula(completions=["good", "bad", "", "fine"]) == expected
        found = values(formula, beta=0.5)
        assert found.log.tolist() == [2 * value for value in expected]
        assert found.rewards["length" if "length" in found.rewards else "vowels"].tolist() in (
            [4, 3, 0, 4],
            [2, 1, 0, 2],
        )

    def test_every_part_is_logged_in_its_own_units_and_the_whole_as_well(self):
        found = values(0.5 * LENGTH + VOWELS)
        assert list(found.rewards) == ["0.5·length + vowels", "length", "vowels"]
        assert found.rewards["length"].tolist() == [4, 3, 0, 4]
        assert found.rewards["0.5·length + vowels"].tolist() == [4.0, 2.5, 0.0, 4.0]

    def test_parts_of_one_name_are_told_apart_and_one_part_twice_is_called_once(self):
        calls = []

        def counted(completions):
            calls.append(1)
            return length(completions)

        part = Function(counted, name="length")
        found = values(part * part + LENGTH)
        assert found.rewards["length'"].tolist() == [4, 3, 0, 4]
        assert found.log.tolist() == [20, 12, 0, 20]
        assert len(calls) == 1

    def test_a_part_alone_keeps_its_name_and_bounds(self):
        reward = tl.Reward(rewards.Sentiment(), beta=0.5)
        assert (reward.label, reward.bounds, reward.log_bounds) == ("sentiment", (-1.0, 1.0), (-2.0, 2.0))
        assert tl.Reward(rewards.Sentiment(), bounds=(-2, 2), name="mood").bounds == (-2, 2)
        assert tl.Reward(rewards.Sentiment(name="mood")).label == "mood"

    def test_columns_that_any_part_reads_are_asked_for(self):
        formula = rewards.ExactMatch() + 0.1 * rewards.Length()
        assert set(inspect.signature(formula).parameters) == {"completions", "answer"}
        found = values(formula, draws(columns={"answer": ("good", "fine")}))
        assert_close(found.log, torch.tensor([1.1, 0.1, 0.0, 1.1], dtype=torch.float64))
        with pytest.raises(tl.InputError, match="'exact-match' asks for 'answer', which is not among"):
            values(formula)
        with pytest.raises(tl.InputError, match="'exact-match' reads 'answer'"):
            formula(completions=["a"])

    def test_a_part_that_fails_is_named_and_on_error_holds_for_each(self):
        def broken(completions):
            return [math.nan if c == "bad" else 1.0 for c in completions]

        with pytest.raises(tl.InputError, match="reward 'broken' is nan for completion 'bad'"):
            values(LENGTH + broken)
        found = values(LENGTH + broken, on_error="drop")
        assert found.kept.tolist() == [True, False, True, True]
        assert found.log[found.kept].tolist() == [5, 1, 5]

    def test_conversations(self):
        formula = rewards.Length(unit="characters") + rewards.Pattern("oo")
        assert values(formula, draws(("good", "bad"), (CHAT,))).log.tolist() == [5, 3]

    def test_evidence_and_functions_do_not_mix_unseen(self):
        with pytest.raises(tl.InputError, match=r"give the function its temperature first"):
            LENGTH + tl.Reward(length)
        with pytest.raises(tl.InputError, match="a reward function without a temperature"):
            small_language().prior * (0.5 * LENGTH)
        with pytest.raises(tl.InputError, match="is no reward"):
            LENGTH + "vowels"
        with pytest.raises(tl.InputError, match="a weight is nan"):
            math.nan * LENGTH


class TestBounds:
    def test_they_follow(self):
        part = {
            "unit": Function(length, (0.0, 1.0)),
            "signed": Function(length, (-1.0, 2.0)),
            "log": Function(length, (-math.inf, 0.0)),
            "unknown": Function(length),
        }
        assert (0.5 * part["unit"] - part["signed"] + 1).bounds == (-1.0, 2.5)
        assert (part["signed"] * part["signed"]).bounds == (-2.0, 4.0)
        assert (0.3 * part["log"] + part["signed"]).bounds == (-math.inf, 2.0)
        assert (-2 * part["log"]).bounds == (0.0, math.inf)
        assert (part["log"] - part["log"]).bounds is None
        assert (part["unit"] + part["unknown"]).bounds is None
        assert (0 * part["unknown"] + part["unit"]).bounds == (0.0, 1.0)
        assert (part["unit"] * part["log"]).bounds == (-math.inf, 0.0)

    @pytest.mark.parametrize("seed", range(20))
    def test_no_value_is_outside_of_them(self, seed):
        """Random formulas over parts at random places within their bounds, the ends included."""
        rng = torch.Generator().manual_seed(seed)

        def part():
            low, high = sorted(torch.randn(2, generator=rng).tolist())
            at = torch.rand(200, generator=rng).mul(1.5).sub(0.25).clamp(0, 1).double()
            numbers = (low + (high - low) * at).tolist()
            return Function(lambda completions: numbers, (low, high))

        a, b, c, d = (part() for _ in range(4))
        w = torch.randn(4, generator=rng).tolist()
        for formula in (w[0] * a + w[1] * b, a * b, w[2] * (a * b) - c, (a + w[3]) * (b - c) * d):
            found = formula(completions=[""] * 200)
            low, high = formula.bounds
            assert low - 1e-9 <= min(found)
            assert max(found) <= high + 1e-9

    def test_one_known_end_makes_rejection_possible(self):
        reward = tl.Reward(0.3 * rewards.Length(most=3) + rewards.Sentiment(), beta=0.5)
        assert reward.log_bounds == (-math.inf, 2.0)

    def test_a_function_may_declare_its_own(self):
        def f(completions):
            return [0.5] * len(completions)

        f.bounds = (0, 1)
        assert tl.Reward(f).bounds == (0, 1)
        f.bounds = "high"
        assert bounds_of(f) is None


def weight(completions):
    """Different for most texts of the tabular language."""
    return [math.sin(3 * len(c) + 2 * sum(map(ord, c))) for c in completions]


def law(evidence, columns=None):
    """The exact posterior of a tabular language, and its log Z."""
    world = small_language()
    prompts = replace(world.prompts, columns=columns or {})
    exact = ex.posterior(world.prior * evidence, prompts)
    return exact.log_posterior, exact.log_z


class TestPosterior:
    """What changes p*, and what does not, by enumeration."""

    WEIGHT = Function(weight, (-1.0, 1.0))

    def test_weights_are_temperatures_of_their_own(self):
        together, _ = law(tl.Reward(0.3 * self.WEIGHT + LENGTH, beta=0.5))
        apart, _ = law(tl.Reward(self.WEIGHT, beta=0.5 / 0.3) + tl.Reward(LENGTH, beta=0.5))
        assert ex.total_variation(together, apart) < 1e-12

    def test_a_product_is_the_product_in_the_exponent(self):
        by_hand, _ = law(
            tl.Reward(
                lambda completions: [a * b for a, b in zip(weight(completions), length(completions), strict=True)]
            )
        )
        assert ex.total_variation(law(tl.Reward(self.WEIGHT * LENGTH))[0], by_hand) < 1e-12

    @pytest.mark.parametrize("by", ["level", lambda level: [3.0 for _ in level]], ids=["column", "function"])
    def test_an_offset_moves_log_z_and_no_probability(self, by):
        plain, log_z = law(tl.Reward(self.WEIGHT, beta=0.5), {"level": (3.0,)})
        moved, moved_log_z = law(tl.Reward(self.WEIGHT.offset(by), beta=0.5), {"level": (3.0,)})
        assert ex.total_variation(plain, moved) < 1e-12
        assert float(moved_log_z - log_z) == pytest.approx(3.0 / 0.5)

    def test_an_offset_that_looks_at_completions_is_refused(self):
        with pytest.raises(tl.InputError, match="asks for completions; an offset depends on the prompt alone"):
            self.WEIGHT.offset(length)

    def test_clipping_warns_and_does_change_p_star(self):
        with pytest.warns(tl.TiltWarning, match="changes p\\*") as caught:
            clipped = self.WEIGHT.clip(-0.2, 0.2)
        assert caught[0].filename == __file__
        assert clipped.bounds == (-0.2, 0.2)
        assert clipped(completions=["a", "ab", "abc"]) == [min(0.2, max(-0.2, w)) for w in weight(["a", "ab", "abc"])]
        plain, _ = law(tl.Reward(self.WEIGHT, beta=0.5))
        assert ex.total_variation(law(tl.Reward(clipped, beta=0.5))[0], plain) > 0.05

    def test_clipping_beyond_the_bounds_changes_nothing_and_is_silent(self):
        plain, _ = law(tl.Reward(self.WEIGHT, beta=0.5))
        assert ex.total_variation(law(tl.Reward(self.WEIGHT.clip(-2, 2), beta=0.5))[0], plain) == 0


class TestRecipes:
    """`reward:` as a list, through the command line."""

    PARTS = """
def brief(completions):
    return [-float(len(c)) for c in completions]
"""

    def recipe(self, here, models, reward, **changes):
        (here / "parts.py").write_text(self.PARTS)
        return write(here / "listed.yaml", settings(models, reward=reward, bounds=None, **changes))

    def test_plan_train_and_certify_log_every_part(self, cli, here, models):
        reward = [
            {"part": "fluency", "weight": 0.5},
            {"part": "length", "unit": "characters", "most": 5, "weight": 2, "name": "long"},
            {"function": "parts.py:brief", "weight": 0.1, "bounds": [-100, 0]},
        ]
        file = self.recipe(here, models, reward, steps=2)
        planned = cli("plan", file, "--json", "plan.json")
        assert planned.code == 0, planned.err
        assert cli("train", file).code == 0
        (first, _) = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]
        parts = [first[f"reward/{name}"] for name in ("fluency", "long", "brief")]
        assert first["reward"] == pytest.approx(0.5 * parts[0] + 2 * parts[1] + 0.1 * parts[2])
        assert all(part < 0 for part in parts)
        certified = cli("certify", file, "--json", "certificate.json")
        assert certified.code == 0, certified.err
        assert "KL(q||p*)" in certified.out
        assert "part: fluency" not in (here / "run/policy/README.md").read_text()  # a formula there, no Python
        assert "0.5 fluency" in (here / "run/policy/README.md").read_text()

    def test_saved_draws_are_not_taken_for_another_weight(self, cli, here, models):
        for weight in (1.0, 3.0):
            file = self.recipe(here, models, [{"part": "length", "unit": "characters", "weight": weight}])
            assert cli("plan", file, "--json", f"{weight}.json").code == 0
        means = [json.loads((here / f"{w}.json").read_text())["prior_reward"]["value"] for w in (1.0, 3.0)]
        assert means[1] == pytest.approx(3 * means[0])

    @pytest.mark.parametrize(
        ("reward", "sentence"),
        [
            ([], "reward is an empty list"),
            ([{"part": "lenght"}], "part is 'lenght'; did you mean 'length'?"),
            ([{"part": "length", "units": "words"}], "setting 'units' is none of part length's; did you mean 'unit'?"),
            ([{"part": "json-schema"}], "part json-schema needs the setting 'schema'"),
            ([{"part": "pattern"}], "pattern is None and column is None; give one of them"),
            ([{"part": "length", "weight": "much"}], "weight of part 1 of reward is 'much'"),
            ([{"part": "length", "name": 3}], "setting name of part length is 3; it must be a text"),
            ([{"part": "repetition", "n": True}], "setting n of part repetition is True; it must be a number"),
            ([{"part": "length", "clip": [2, 1]}], "clip of part 1 of reward is [2, 1]"),
            ([{"weight": 1}], "part 1 of reward is {'weight': 1}; give 'part: NAME' or 'function: file.py:f'"),
            ([{"function": "parts.py:nothing"}], "has no function 'nothing'"),
            ([{"function": "parts.py:brief", "unit": "x"}], "is a function and has the key 'unit'"),
            (["sentiment"], "give file.py:function, or a list of parts"),
            (3, "reward is 3"),
        ],
    )
    def test_what_is_wrong_with_a_part_is_said_before_a_model_is_loaded(self, refused, here, models, reward, sentence):
        file = self.recipe(here, models, reward, model="no/such-model")
        assert sentence in refused("plan", file)

    def test_the_command_lists_parts_and_shows_one(self, cli, refused):
        listed = cli("reward", "list", "--json", "/dev/stdout")
        assert listed.code == 0
        assert "topic-similarity" in listed.out
        assert "bounds [-1, 1]" in cli("reward", "list", "sentiment").out
        assert "did you mean 'fluency'?" in refused("reward", "list", "fluent")

    def test_smc_by_prefixes_warns_of_parts_that_say_nothing_there(self, cli, here, models):
        file = self.recipe(here, models, [{"part": "sentiment"}, {"part": "pattern", "pattern": "a"}])
        ended = cli("sample", file, "--engine", "smc", "--twist", "prefix", "--draws", 4)
        assert ended.code == 0, ended.err
        assert "pattern says little of unfinished texts" in ended.err
        file = self.recipe(here, models, [{"part": "sentiment"}])
        assert "unfinished" not in cli("sample", file, "--engine", "smc", "--twist", "prefix", "--draws", 4).err
