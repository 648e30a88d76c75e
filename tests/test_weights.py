"""Log-weight arithmetic against the plain formulas."""

import math

import pytest
import torch

from tiltlm import weights
from tiltlm.records import Interval

INDEX = torch.tensor([0, 1, 0, 1, 1, 3])
LOG_W = torch.tensor([0.3, -1.0, 2.0, 0.5, 900.0, -4.0], dtype=torch.float64)


def rows(prompt):
    return LOG_W[prompt == INDEX]


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


def test_pareto_k_of_few_or_constant_weights():
    assert math.isnan(weights.pareto_k(torch.zeros(10)))
    assert weights.pareto_k(torch.zeros(100)) == -math.inf


def test_an_interval_without_upper_end_is_null_in_json():
    interval = Interval(0.5, 0.1, math.inf)
    assert 3.0 in interval
    assert interval.as_dict()["high"] is None
