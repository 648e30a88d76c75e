"""The reward contract: TRL's signature, what goes in, what may come out, and the algebra of evidence."""

import math
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tiltlm as tl
from tiltlm.posterior import exact as ex
from tiltlm.records import Draws, Prompts
from tiltlm.testing import fixture_b, small_language

CHAT = ({"role": "user", "content": "how was it?"},)
TEXTS = ("good", "bad", "", "fine")


def draws(texts=TEXTS, prompts=("the film", "a story"), columns=None, per_prompt=2):
    """Completions without a model: two prompts, two completions each, of 1 to 3 tokens."""
    count = len(texts)
    lengths = torch.arange(count) % 3 + 1
    mask = torch.arange(3)[None] < lengths[:, None]
    tokens = torch.where(mask, torch.arange(count)[:, None] + 10, 0)
    width = len(prompts)
    encoded = Prompts(torch.ones(width, 1).long(), torch.ones(width, 1).bool(), tuple(prompts), columns or {})
    index = torch.arange(count) // per_prompt
    return Draws(encoded, tokens, mask, torch.ones(count).bool(), index, torch.zeros(count, 3), tuple(texts))


def log(reward, given=None):
    return reward.log_likelihood(draws() if given is None else given)


class TestArguments:
    def test_they_come_by_name_and_in_any_order(self):
        def reward(completions, prompts):
            assert prompts == ["the film", "the film", "a story", "a story"]
            return [float(len(c)) for c in completions]

        assert log(tl.Reward(reward)).log.tolist() == [4, 3, 0, 4]

    def test_completion_ids_come_without_padding(self):
        def reward(completion_ids):
            assert completion_ids == [[10], [11, 11], [12, 12, 12], [13]]
            return [0.0] * 4

        log(tl.Reward(reward))

    def test_columns_are_repeated_for_each_completion(self):
        def reward(completions, answer, level):
            assert answer == ["yes", "yes", "no", "no"]
            assert level == [1, 1, 2, 2]
            return [1.0] * len(completions)

        log(tl.Reward(reward), draws(columns={"answer": ("yes", "no"), "level": (1, 2), "unused": (0, 0)}))

    def test_kwargs_gets_everything(self):
        def reward(**kwargs):
            assert set(kwargs) == {"prompts", "completions", "completion_ids", "answer"}
            return [0.0] * len(kwargs["completions"])

        log(tl.Reward(reward), draws(columns={"answer": ("yes", "no")}))

    def test_trl_signature_works_unchanged(self):
        def reward(prompts, completions, completion_ids, answer, **kwargs):
            assert kwargs == {"level": [1, 1, 2, 2]}
            return [float(a in c) for a, c in zip(answer, completions, strict=True)]

        found = log(tl.Reward(reward), draws(columns={"answer": ("good", "x"), "level": (1, 2)}))
        assert found.log.tolist() == [1, 0, 0, 0]

    def test_arguments_with_defaults_may_be_absent(self):
        def reward(completions, strict=True, *, scale=2.0):
            return [scale * strict] * len(completions)

        assert log(tl.Reward(reward)).log.tolist() == [2] * 4

    def test_methods_and_callable_objects_are_functions_too(self):
        class Judge:
            def __call__(self, completions):
                return [1.0] * len(completions)

            def judge(self, completions):
                return [2.0] * len(completions)

        assert log(tl.Reward(Judge())).rewards["Judge"].tolist() == [1] * 4
        assert log(tl.Reward(Judge().judge)).rewards["judge"].tolist() == [2] * 4

    def test_a_column_that_is_not_there_is_named_with_those_that_are(self):
        def reward(completions, answer):
            return [0.0] * len(completions)

        with pytest.raises(tl.InputError, match=r"asks for 'answer', which is not among .* columns \(level\)"):
            log(tl.Reward(reward), draws(columns={"level": (1, 2)}))

    def test_conversations_come_as_messages(self):
        def reward(prompts, completions):
            assert prompts == [[{"role": "user", "content": "how was it?"}]] * 2
            assert completions == [[{"role": "assistant", "content": t}] for t in ("good", "bad")]
            return [0.0, 1.0]

        log(tl.Reward(reward), draws(("good", "bad"), (CHAT,)))

    def test_changing_the_arguments_changes_no_record(self):
        def reward(prompts, completions, completion_ids, answer):
            prompts.clear()
            answer.clear()
            completion_ids[0].clear()
            return [0.0] * len(completions)

        given = draws(columns={"answer": ("yes", "no")})
        log(tl.Reward(reward), given)
        assert given.prompts.columns == {"answer": ("yes", "no")}
        assert given.prompts.texts == ("the film", "a story")


class TestReturned:
    @pytest.mark.parametrize(
        "values",
        [[1, 0, True, 0.5], (1, 0, 1, 0.5), np.array([1, 0, 1, 0.5]), [np.float32(1), 0, torch.tensor(1), 0.5]],
    )
    def test_numbers_of_any_kind_are_float64(self, values):
        found = log(tl.Reward(lambda completions: values, beta=0.5))
        assert found.log.dtype == torch.float64
        assert found.log.tolist() == [2, 0, 2, 1]
        assert found.kept.all()

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (None, "returned NoneType; return a list"),
            (0.5, "returned float; return a list"),
            (np.float64(0.5), "returned float; return a list"),
            ("good", "returned str; return a list"),
            ({0: 1.0}, "returned dict; return a list"),
            (iter([1.0] * 4), "returned list_iterator; return a list"),
            ([1.0], "returned 1 values for 4 completions"),
            ([], "returned 0 values for 4 completions"),
            (torch.zeros(4), r"returned a tensor of shape \(4,\); return a list .* rewards.tolist\(\)"),
            (torch.zeros(()), r"returned a tensor of shape \(\)"),
        ],
    )
    @pytest.mark.parametrize("on_error", ["fail", "drop"])
    def test_what_is_not_one_value_a_completion_fails_whatever_the_policy(self, returned, message, on_error):
        with pytest.raises(tl.InputError, match=message):
            log(tl.Reward(lambda completions: returned, on_error=on_error))

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (None, "is None"),
            (math.nan, "is nan"),
            (math.inf, "is inf"),
            (-math.inf, "is -inf"),
            (7.0, r"is 7.0, outside its declared bounds \[-1, 1\],"),
            (-1.1, r"is -1.1, outside its declared bounds \[-1, 1\],"),
            ("x", "is 'x', which is not a number,"),
            ([1.0], r"is \[1.0\], which is not a number,"),
        ],
    )
    def test_one_bad_value_is_named_or_dropped(self, bad, message):
        def reward(completions):
            return [bad if c == "bad" else 0.5 for c in completions]

        with pytest.raises(tl.InputError, match=f"reward 'reward' {message} for completion 'bad'; mend"):
            log(tl.Reward(reward, bounds=(-1, 1)))
        found = log(tl.Reward(reward, bounds=(-1, 1), on_error="drop"))
        assert found.kept.tolist() == [True, False, True, True]
        assert found.log.isnan().tolist() == [False, True, False, False]
        assert found.rewards["reward"].isnan().tolist() == [False, True, False, False]

    def test_raising_is_named_or_dropped_by_completion(self):
        def reward(completions):
            return [1 / len(c) for c in completions]  # the third is empty

        with pytest.raises(
            tl.InputError, match=r"raised ZeroDivisionError \(.*\) in test_reward.py, line \d+ for completion ''; mend"
        ):
            log(tl.Reward(reward))
        found = log(tl.Reward(reward, on_error="drop"))
        assert found.kept.tolist() == [True, True, False, True]
        assert found.log[found.kept].tolist() == [1 / 4, 1 / 3, 1 / 4]

    def test_a_column_that_is_not_there_is_asked_for_by_name(self):
        def named(completions, answer, **columns):
            return [1.0] * len(completions)

        def by_key(completions, **columns):
            return [float(a == c) for a, c in zip(columns["answer"], completions, strict=True)]

        with pytest.raises(tl.InputError, match="reward 'named' asks for 'answer', which is not among its arguments"):
            log(tl.Reward(named))
        said = r"'by_key' raised KeyError \('answer'\) in .* for completion .* \(the prompts' columns are none\); mend"
        with pytest.raises(tl.InputError, match=said):
            log(tl.Reward(by_key))

    def test_leaving_the_program_is_raising(self):
        """`sys.exit` in a reward must not end the run with the reward's exit code and no word."""

        def reward(completions):
            if "bad" in completions:
                sys.exit("goodbye")
            return [1.0] * len(completions)

        with pytest.raises(tl.InputError, match=r"raised SystemExit \(goodbye\) for completion 'bad'; mend"):
            log(tl.Reward(reward))
        assert log(tl.Reward(reward, on_error="drop")).kept.tolist() == [True, False, True, True]

    def test_values_that_raise_whatever_is_asked_of_them(self):
        class Awkward:
            def _refuse(self, *other):
                raise RuntimeError("no")

            __float__ = __eq__ = __repr__ = _refuse

        with pytest.raises(tl.InputError, match="is a Awkward, which is not a number, for completion 'good'"):
            log(tl.Reward(lambda completions: [Awkward()] * 4))
        with pytest.raises(tl.InputError, match="is a Awkward, which is neither true nor false, for completion 'good'"):
            log(tl.Constraint(lambda completions: [Awkward()] * 4))

    def test_raising_for_a_batch_only_says_so(self):
        def reward(completions):
            if len(completions) > 1:
                raise RuntimeError("too\nmany")
            return [1.0]

        with pytest.raises(tl.InputError, match=r"raised RuntimeError \(too many\) in .* for 4 completions together"):
            log(tl.Reward(reward))

    def test_bounds_are_closed(self):
        assert log(tl.Reward(lambda completions: [-1, 1, 0, 1], bounds=(-1, 1))).kept.all()

    def test_no_completions_need_no_call(self):
        def reward(completions):
            raise AssertionError

        assert log(tl.Reward(reward), draws().select(torch.zeros(4).bool())).log.shape == (0,)


class TestSettings:
    @pytest.mark.parametrize("beta", [0, -1.0, math.nan, math.inf, "0.5", None])
    def test_beta_is_a_positive_number(self, beta):
        with pytest.raises(tl.InputError, match="beta is .*; it is a temperature in reward units per nat and must be"):
            tl.Reward(len, beta=beta)

    @pytest.mark.parametrize("bounds", [(1, -1), (1, 1), (math.nan, 1)])
    def test_bounds_are_ordered(self, bounds):
        with pytest.raises(tl.InputError, match="bounds are .*; give them as"):
            tl.Reward(len, bounds=bounds)


def length(completions):
    return [float(len(c)) for c in completions]


def vowels(completions):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


class TestAlgebra:
    a, b = tl.Reward(length, beta=0.5, bounds=(0, 4)), tl.Reward(vowels, beta=0.5, bounds=(-1, 2))

    def test_log_likelihoods_add_subtract_and_scale(self):
        a, b = log(self.a).log, log(self.b).log
        assert_close(log(self.a + self.b).log, a + b)
        assert_close(log(self.a - self.b).log, a - b)
        assert_close(log(2 * self.a).log, 2 * a)
        assert_close(log(self.a * 0.5).log, a / 2)
        assert_close(log(-self.a + 3 * (self.b - self.a)).log, -a + 3 * (b - a))

    def test_bounds_follow(self):
        assert self.a.log_bounds == (0, 8)
        assert (self.a + self.b).log_bounds == (-2, 12)
        assert (self.a - self.b).log_bounds == (-4, 10)
        assert (-2 * self.b).log_bounds == (-8, 4)
        assert (self.a + tl.Reward(length)).log_bounds is None
        assert (-tl.Reward(length)).log_bounds is None

    def test_parts_keep_their_names_and_units(self):
        rewards = log(2 * self.a - self.b + tl.Reward(length, name="long")).rewards
        assert set(rewards) == {"length", "vowels", "long"}
        assert rewards["length"].tolist() == [4, 3, 0, 4]

    def test_equal_names_are_told_apart(self):
        assert set(log(self.a + self.a + self.a).rewards) == {"length", "length'", "length''"}

    def test_a_completion_dropped_by_one_part_is_dropped(self):
        picky = tl.Reward(lambda completions: [None, 1, 1, 1], on_error="drop", name="picky")
        assert log(self.a + picky).kept.tolist() == [False, True, True, True]

    def test_beta_is_common_or_the_sum_is_in_nats(self):
        assert (self.a + self.b).beta == 0.5
        assert (2 * self.a).beta == 0.5
        assert (self.a + tl.Reward(vowels, beta=0.25)).beta == 1.0

    @pytest.mark.parametrize("other", [0.5, 0.25], ids=["common", "different"])
    def test_at_changes_the_temperature_and_not_the_reward(self, other):
        evidence = self.a - 2 * tl.Reward(vowels, beta=other)
        reward = evidence.beta * log(evidence).log
        for beta in (0.1, 2.0):
            moved = evidence.at(beta)
            assert moved.beta == beta
            assert_close(beta * log(moved).log, reward)
            assert_close(log(moved.at(evidence.beta)).log, log(evidence).log)

    def test_at_moves_the_bounds(self):
        assert (self.a + self.b).at(1.0).log_bounds == (-1, 6)
        mixed = self.a + tl.Reward(vowels, beta=1.0, bounds=(0, 2))
        assert mixed.log_bounds == (0, 10)
        assert mixed.at(2.0).log_bounds == (0, 5)

    def test_only_numbers_scale(self):
        with pytest.raises(TypeError):
            self.a * self.b


def ids_sum(completion_ids):
    return [math.sin(sum(i * t for i, t in enumerate(ids, 1))) for ids in completion_ids]


class TestTarget:
    world = small_language()

    def test_the_posterior_of_a_sum_adds_both_log_likelihoods(self):
        a, b = self.world.target.evidence, tl.Reward(ids_sum, beta=0.3)
        prior = self.world.prior
        plain = ex.posterior(prior * a, self.world.prompts)
        both = ex.posterior(prior * (a + b), self.world.prompts)
        own = torch.tensor(ids_sum([list(c) for c in both.completions]), dtype=torch.float64) / 0.3
        expected = plain.log_joint + own
        assert_close(both.log_posterior, expected - expected.logsumexp(0), rtol=1e-12, atol=1e-12)
        assert_close(ex.posterior(prior * a * b, self.world.prompts).log_posterior, both.log_posterior)

    def test_the_same_target_at_another_beta_is_the_tilt(self):
        target = self.world.target.at(0.2)
        found = ex.posterior(target, self.world.prompts)
        again = ex.posterior(self.world.target, self.world.prompts)
        assert target.beta == 0.2
        assert_close(found.reward, again.reward)
        assert_close(found.log_joint, again.log_prior + again.reward / 0.2)

    def test_dropped_completions_are_left_out_and_counted(self):
        world = fixture_b()
        some = tl.Reward(lambda completion_ids: [None if len(x) < 3 else 1.0 for x in completion_ids], on_error="drop")
        drawn = world.prior.draw(world.prompts, 40, torch.Generator().manual_seed(0))
        scored = (world.prior * some).score(drawn)
        assert scored.dropped == int((drawn.lengths < 3).sum()) > 0
        assert len(scored) == 40 - scored.dropped
        assert not scored.log_weight.isnan().any()
