"""Reward functions add, multiply and scale; every part is logged; bounds hold; p* moves only where it is said to."""

import inspect
import math

import pytest
import torch
from test_reward import CHAT, draws
from torch.testing import assert_close

import tiltlm as tl
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
        assert found.rewards["length" if "length" in found.rewards else "vowels"].tolist() in ([4, 3, 0, 4], [2, 1, 0, 2])

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
        prior, _ = small_language(0)
        with pytest.raises(tl.InputError, match=r"give the function its temperature first"):
            LENGTH + tl.Reward(length)
        with pytest.raises(tl.InputError, match="a reward function without a temperature"):
            tl.Target(prior, 0.5 * LENGTH)
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


class TestPosterior:
    """On a tabular language, where p* is known."""

    def law(self, reward_of_text, beta=0.5, columns=None):
        prior, _ = small_language(0)
        prompts = prior.encode([{"prompt": p, **(columns or {})} for p in [0]]) if columns else None
        return prior, prompts, reward_of_text, beta

    def posterior(self, formula, beta=0.5):
        target, prompts = self.target(formula, beta)
        exact = ex.posterior(target, prompts)
        return exact

    def target(self, formula, beta):
        prior, _ = small_language(0)
        return prior * tl.Reward(formula, beta=beta), prior.encode([0])
