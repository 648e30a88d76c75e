"""Log-weight arithmetic against the plain formulas."""

import math
from dataclasses import replace

import pytest
import torch

from tiltlm import weights
from tiltlm.estimates import Estimate, Interval
from tiltlm.records import Weighted
from tiltlm.testing import small_language

INDEX = torch.tensor([0, 1, 0, 1, 1, 3])
LOG_W = torch.tensor([0.3, -1.0, 2.0, 0.5, 900.0, -4.0], dtype=torch.float64)


def rows(prompt):
    return LOG_W[prompt == INDEX]


def test_an_estimate_is_a_mean_with_what_its_values_tell_of_it():
    found = Estimate.of(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), "lower", each=5)
    assert (found.value, found.n, found.kind, found.df) == (pytest.approx(7 / 3), 15, "lower", 2)
    assert found.stderr == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert found.margin == pytest.approx(4.302653 * found.stderr)
    ruled_out = Estimate.of(torch.tensor([1.0, -math.inf], dtype=torch.float64))
    assert (ruled_out.value, ruled_out.stderr) == (-math.inf, 0.0)


def test_an_error_that_one_of_the_terms_does_not_know_is_not_known():
    alone, known = Estimate.of(torch.tensor([1.0], dtype=torch.float64)), Estimate(2.0, 0.1, 4, df=3)
    for found in (Estimate.mean([alone, known]), known.plus(alone)):
        assert math.isnan(found.stderr)
        assert math.isnan(found.margin)
    assert Estimate.mean([alone, known]).value == 1.5


def test_group_sums_do_not_overflow():
    got = weights.group_logsumexp(LOG_W, INDEX, 4)
    for prompt in (0, 1, 3):
        assert float(got[prompt]) == pytest.approx(float(rows(prompt).logsumexp(0)))
    assert got[2] == -torch.inf


def test_weights_sum_to_one_within_a_prompt():
    w = weights.normalise(LOG_W, INDEX, 4)
    assert weights.group_sum(w, INDEX, 4).tolist() == pytest.approx([1, 1, 0, 1])
    dead = weights.normalise(torch.tensor([-torch.inf, -torch.inf]), torch.tensor([0, 0]), 1)
    assert dead.tolist() == [0, 0]


def test_effective_sample_size():
    got = weights.ess(LOG_W, INDEX, 4)
    w = rows(0).exp()
    assert float(got[0]) == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))
    assert float(got[1]) == pytest.approx(1)
    equal = weights.ess(torch.full((7,), 3.0), torch.zeros(7, dtype=torch.long), 1)
    assert float(equal) == pytest.approx(7)


def test_leave_one_out_uses_the_others_only():
    values = torch.tensor([1.0, 5.0, 3.0, 7.0, 9.0, 2.0])
    got = weights.leave_one_out(values, INDEX)
    assert got.tolist() == [1 - 3, 5 - 8, 3 - 1, 7 - 7, 9 - 6, 2]


def test_mean_weight_is_a_lower_bound_with_its_error():
    generator = torch.Generator().manual_seed(0)
    log_w = torch.randn(2000, 50, generator=generator, dtype=torch.float64)
    index = torch.arange(2000).repeat_interleave(50)
    found = weights.log_mean_weight(log_w.flatten(), index, 2000)
    values = torch.tensor([e.value for e in found])
    assert {e.kind for e in found} == {"lower"}
    assert values.mean() < 0.5, "E log mean w < log E w = 1/2"
    assert torch.tensor([e.stderr for e in found]).mean() == pytest.approx(float(values.std()), rel=0.1)


def test_resampling_follows_the_weights():
    chosen = weights.resample(LOG_W, INDEX, 4, 4000, torch.Generator().manual_seed(1))
    share = (chosen[0] == 2).double().mean()
    assert float(share) == pytest.approx(float(rows(0).softmax(0)[1]), abs=0.03)
    assert (chosen[1] == 4).all()
    assert (chosen[2] == -1).all()


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_finds_the_tail(shape):
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(20, 5000, generator=generator, dtype=torch.float64)
    log_w = (((1 - u) ** -shape - 1) / shape).log()
    found = sum(weights.pareto_k(row) for row in log_w) / 20
    assert found == pytest.approx(shape, abs=0.08)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_finds_the_tail_of_weights_in_steps(shape):
    """Rewards of a tenth of a nat each: many weights tie with the threshold, and are not above it."""
    u = torch.rand(20, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_w = (10 * (((1 - u) ** -shape - 1) / shape).log()).round() / 10
    assert all(len(row.unique()) < 200 for row in log_w)
    found = sum(weights.pareto_k(row) for row in log_w) / 20
    assert found == pytest.approx(shape, abs=0.08)


def test_pareto_k_of_few_or_constant_weights():
    assert math.isnan(weights.pareto_k(torch.zeros(10)))
    assert weights.pareto_k(torch.zeros(100)) == -math.inf


@pytest.mark.parametrize("n", [64, 256, 1024])
@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_pareto_k_of_a_verifiable_reward_says_nothing(n, noise):
    """Two different weights have no shape, even where rounding makes more; as many equal ones as the tail has bound it."""
    tail = int(min(n / 5, 3 * math.sqrt(n)))
    rounding = noise * torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for successes in (1, 2, 3, 5, tail - 1, tail, 2 * tail):
        for log_w in (0.01, 1.0, 30.0):
            row = rounding + log_w * (torch.arange(n) < successes)
            found = weights.pareto_k(row)
            assert found == -math.inf if successes >= tail else math.isnan(found), (successes, log_w)


def test_pareto_k_still_warns_of_a_heavy_tail():
    """Where one draw has nearly all the weight, the others are e^-100 of it and yet no ties."""
    log_w = 100 * torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert weights.pareto_k(log_w) > 5


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_the_best_of_subsets_by_counting_them(count):
    for n in range(1, count + 3):
        possible = math.comb(count, n)
        expected = [math.comb(k, n - 1) / possible if possible else 0.0 for k in range(count)]
        assert weights.best_of_subsets(count, n).tolist() == pytest.approx(expected, rel=1e-14, abs=0)


def test_the_best_of_subsets_of_many_draws_sums_to_one():
    assert float(weights.best_of_subsets(4000, 2000).sum()) == pytest.approx(1, abs=1e-12)


def test_an_interval_without_upper_end_is_null_in_json():
    interval = Interval(0.5, 0.1, math.inf)
    assert 3.0 in interval
    assert interval.as_dict()["high"] is None


def test_weighted_means_by_hand(rng):
    """Over rows, and over the runs that they come from; one run, or one row with all the weight, tells no error."""
    world = small_language()
    scored = world.target.score(world.prior.draw(world.prompts, 4, rng))
    log_w, values = torch.tensor([1.0, 1.0, 2.0, 0.0]).log(), torch.tensor([0.0, 1.0, 2.0, 5.0])
    rows = Weighted(scored, log_w)
    (mean,) = weights.weighted_means(rows, values, 1)
    assert mean is not None
    assert mean.value == pytest.approx(1.25)
    parts = [0.25 * -1.25, 0.25 * -0.25, 0.5 * 0.75]
    assert mean.stderr == pytest.approx(math.sqrt(sum(p * p for p in parts) * 3 / 2))
    (of_runs,) = weights.weighted_means(replace(rows, run=torch.tensor([7, 3, 7, 3])), values, 1)
    assert of_runs is not None
    assert of_runs.stderr == pytest.approx(math.sqrt(2 * ((parts[0] + parts[2]) ** 2 + parts[1] ** 2)))
    (of_one,) = weights.weighted_means(replace(rows, run=torch.zeros(4, dtype=torch.long)), values, 1)
    assert of_one is not None
    assert math.isnan(of_one.stderr)
    assert weights.weighted_means(replace(rows, log_w=log_w - math.inf), values, 1) == (None,)


def test_estimates_add_up_with_their_degrees_of_freedom():
    """Welch's own case: two variances of which one is known well."""
    few, many = Estimate(1.0, 0.3, 4, df=3), Estimate(2.0, 0.1, 100, df=99)
    total = few.plus(many)
    assert (total.value, total.stderr) == pytest.approx((3.0, math.sqrt(0.1)))
    assert total.df == pytest.approx(0.1**2 / (0.09**2 / 3 + 0.01**2 / 99))
    assert few.less(many).value == -1.0
    assert few.margin == pytest.approx(0.3 * 3.18245, rel=1e-5)
    assert Estimate(0.0, 1.0, 9).margin == pytest.approx(1.959964)
    mean = Estimate.mean([few, few])
    assert (mean.stderr, mean.df, mean.n) == pytest.approx((0.3 / math.sqrt(2), 6, 8))
