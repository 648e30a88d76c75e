"""Minimum-risk training: its gradient by hand, where it settles, and that it is not p*."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch.testing import assert_close

import tiltlm as tl
from tiltlm.inference.training.policy_gradients.minimum_risk import MinimumRisk, distinct
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.records import Forward
from tiltlm.testing import ClaimRefuted, check_engine, small_language


@pytest.fixture(scope="module")
def world():
    """So warm that p* is far from a point mass."""
    return small_language(beta=4.0)


@pytest.fixture(scope="module")
def exact(world):
    return ex.posterior(world.target, world.prompts)


def force(engine, exact, rows):
    """What the loss of these draws asks of each one's log q: minus its derivative."""
    scored = exact.scored.select(torch.tensor(rows))
    log_q = scored.log_prior.clone().requires_grad_()
    loss, _ = engine.loss(Forward(log_q), scored)
    (gradient,) = torch.autograd.grad(loss, log_q)
    assert_close(gradient, gradient[:, :1] * torch.ones_like(gradient))  # every token of a draw alike
    return -gradient[:, 0]


@pytest.mark.parametrize("alpha", [0.005, 1.0, 3.0])
def test_the_gradient_of_a_sample_is_the_papers(exact, alpha):
    rows = [0, 3, 5, 3]  # a text that was drawn twice counts once
    q = exact.log_prior[[0, 3, 5]].exp()
    reward = exact.scored.log_evidence[[0, 3, 5]]
    share = q**alpha / (q**alpha).sum()
    by_hand = alpha * share * (reward - (share * reward).sum())
    assert_close(force(MinimumRisk(alpha=alpha), exact, rows), torch.cat([by_hand, torch.zeros(1)]).double())


def test_beta_scales_the_gradient_and_no_offset_changes_it(exact):
    colder = ex.Exact(exact.scored.at(exact.beta / 2), exact.beta / 2)
    shifted = replace(exact, scored=replace(exact.scored, log_evidence=exact.scored.log_evidence + 3))
    one = force(MinimumRisk(), exact, [1, 2, 4])
    assert_close(force(MinimumRisk(), colder, [1, 2, 4]), 2 * one)
    assert_close(force(MinimumRisk(), shifted, [1, 2, 4]), one)


def test_the_same_text_of_two_prompts_counts_twice(exact):
    draws = exact.scored.draws.select(torch.tensor([2, 2, 1, 2]))
    assert distinct(draws).tolist() == [True, False, True, False]
    assert distinct(replace(draws, prompt_index=torch.tensor([0, 1, 1, 1]))).tolist() == [True, True, True, False]


@pytest.mark.parametrize("alpha", [0.005, 1.0])
def test_the_claim_is_proved(alpha):
    assert len(check_engine(MinimumRisk(alpha=alpha))) >= 4


@dataclass(frozen=True)
class Boastful(MinimumRisk):
    claim = Claim(fixed_point="p*", objective="KL(q||p*)", bias="none")


def test_a_claim_of_the_posterior_is_refuted():
    with pytest.raises(ClaimRefuted, match="expected gradient vanishes at p"):
        check_engine(Boastful())


@pytest.mark.parametrize("alpha", [0.005, 1.0])
def test_the_expected_updates_end_at_the_largest_reward(exact, alpha):
    """For pairs of draws the force on x is a sum over the other's law; followed in the logits of a law without structure."""
    reward, logits = exact.reward, exact.log_prior.clone()
    risen = []
    for _ in range(4000):
        q = logits.softmax(0)
        share = q[:, None] ** alpha / (q[:, None] ** alpha + q[None, :] ** alpha)
        pair = 2 * q[:, None] * q[None, :] * share * share.T * (reward[:, None] - reward[None, :])
        wanted = pair.sum(1)
        logits = logits + 4 * (wanted - q * wanted.sum())
        risen.append(float(q @ reward))
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(risen))
    assert risen[-1] == pytest.approx(float(reward.max()), abs=0.02)
    law = MinimumRisk().settles_at(exact)
    assert float((law.exp() * reward).sum()) == pytest.approx(float(reward.max()))
    assert ex.kl(law, exact.log_posterior) > 0.5


def test_training_goes_past_the_posterior(world, exact):
    settings = {"lora": None, "batch": 1, "lr": 0.1, "steps": 60, "micro_tokens": 10**6}
    ours = tl.fit(world.target, world.prompts, engine=tl.RLOO(group=8), **settings)
    risky = tl.fit(world.target, world.prompts, engine=MinimumRisk(group=8), **settings)
    near, far = (ex.kl(exact.log_prob(policy), exact.log_posterior) for policy in (ours, risky))
    assert near < 0.1
    assert far > 0.5
    assert exact.mean_reward(exact.log_prob(risky)) > 0.95 * float(exact.reward.max())


@pytest.mark.parametrize("settings", [{"group": 1}, {"alpha": 0.0}, {"alpha": float("inf")}])
def test_settings_that_cannot_be_used_are_named(settings):
    with pytest.raises(tl.InputError, match=f"{next(iter(settings))} is"):
        MinimumRisk(**settings)
