"""Enumeration against the closed forms of the fixtures, and against itself."""

import math

import pytest
import torch

import tiltlm as tl
from tiltlm.posterior import exact as ex
from tiltlm.testing import fixture_a, fixture_b, language, posterior_policy, small_language

CLOSE = {"rel": 1e-8, "abs": 1e-8}


@pytest.fixture(scope="module")
def a():
    world = fixture_a()
    return world, ex.posterior(world.target, world.prompts)


@pytest.fixture(scope="module")
def b():
    world = fixture_b()
    return world, ex.posterior(world.target, world.prompts)


def test_fixture_a(a):
    _, exact = a
    prior, post = exact.log_prior, exact.log_posterior
    assert len(exact.completions) == 81
    assert exact.log_z == pytest.approx(1.374937057482, **CLOSE)
    assert exact.beta * exact.log_z == pytest.approx(0.687468528741, **CLOSE)
    assert exact.mean_reward(prior) == pytest.approx(0.115515234, **CLOSE)
    assert exact.mean_reward(post) == pytest.approx(1.053283896, **CLOSE)
    assert ex.kl(post, prior) == pytest.approx(0.731630735, **CLOSE)
    assert ex.kl(prior, post) == pytest.approx(1.143906589, **CLOSE)
    assert ex.chi2(post, prior) == pytest.approx(1.665680173, **CLOSE)
    assert 1 / (1 + ex.chi2(post, prior)) == pytest.approx(0.375138777, **CLOSE)
    assert (exact.scored.log_evidence.exp() / math.exp(exact.log_z)).max() == pytest.approx(4.965292, rel=1e-6)
    assert ex.entropy(post) == pytest.approx(2.905765154, **CLOSE)
    values = exact.soft_values()
    assert [values[(t,)] for t in range(3)] == pytest.approx([0.676332, 0.734342, 0.599125], abs=1e-6)
    assert values[()] == pytest.approx(exact.beta * exact.log_z, **CLOSE)
    assert len({round(r, 9) for r in exact.reward.tolist()}) == 30
    root = [0.0] * 3
    for completion, p in zip(exact.completions, post.exp().tolist(), strict=True):
        root[completion[0]] += p
    assert root == pytest.approx([0.588557, 0.328108, 0.083335], abs=1e-6)


def test_fixture_b(b):
    _, exact = b
    assert len(exact.completions) == 31
    assert exact.log_z == pytest.approx(2.704975916, **CLOSE)
    assert ex.kl(exact.log_posterior, exact.log_prior) == pytest.approx(0.424666060, **CLOSE)
    lengths = exact.scored.draws.lengths.double()
    assert float(exact.log_prior.exp() @ lengths) == pytest.approx(2.959872, abs=1e-6)
    assert float(exact.log_posterior.exp() @ lengths) == pytest.approx(3.297160, abs=1e-6)


def test_the_certificate_identity_holds_for_every_completion(b):
    """r - beta log(p* / pi0) = beta log Z, whatever the completion (mathematics A1)."""
    _, exact = b
    residual = exact.reward - exact.beta * (exact.log_posterior - exact.log_prior) - exact.beta * exact.log_z
    assert residual.abs().max() < 1e-12


def test_identities_between_divergences(a):
    world, exact = a
    prior, post = exact.log_prior, exact.log_posterior
    assert ex.kl(post, prior) == pytest.approx(exact.mean_reward(post) / exact.beta - exact.log_z)
    assert ex.kl(prior, post) == pytest.approx(exact.log_z - exact.mean_reward(prior) / exact.beta)
    half = ex.posterior(world.target.at(exact.beta / 2), world.prompts)
    assert 1 + ex.chi2(post, prior) == pytest.approx(math.exp(half.log_z - 2 * exact.log_z))
    assert 0 < ex.total_variation(post, prior) < 1
    assert ex.jensen_shannon(post, prior) == pytest.approx(ex.jensen_shannon(prior, post))
    assert exact.elbo(post) == pytest.approx(exact.log_z)
    assert exact.elbo(prior) == pytest.approx(exact.log_z - ex.kl(prior, post))


def test_soft_values_satisfy_the_bellman_equation(a):
    """V*(s) = beta log sum_a pi0(a|s) exp(V*(s + a) / beta) (mathematics A7)."""
    world, exact = a
    values, beta = exact.soft_values(), exact.beta
    table = world.prior.body.model.table[0].log_softmax(-1)
    for prefix in [(), (1,), (2, 0), (0, 1, 2)]:
        row = (3 ** len(prefix) - 1) // 2 + sum(t * 3**i for i, t in enumerate(reversed(prefix)))
        backup = beta * torch.logsumexp(torch.stack([table[row, t] + values[(*prefix, t)] / beta for t in range(3)]), 0)
        assert values[prefix] == pytest.approx(float(backup))


def test_the_optimal_policy_is_the_posterior():
    for world in (fixture_a(), fixture_b(), small_language()):
        exact = ex.posterior(world.target, world.prompts)
        log_q = exact.log_prob(posterior_policy(world))
        assert ex.kl(log_q, exact.log_posterior) == pytest.approx(0, abs=1e-12)


def test_exact_gradient_against_finite_differences(b):
    world, exact = b
    policy = world.prior.policy(lora=None)
    gradient = ex.reverse_kl_gradient(policy, exact)["table"]
    table = policy.named_parameters()["table"]
    for entry in [(0, 0, 0), (0, 1, 2), (0, 5, 1)]:
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                table[entry] += step
            values.append(ex.kl(exact.log_prob(policy), exact.log_posterior))
        with torch.no_grad():
            table[entry] += 1e-5
        assert float(gradient[entry]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_best_of_n_law_with_ties(a):
    """Against the list of all pairs and triples of draws, the first among equals taken."""
    _, exact = a
    prior, reward = exact.log_prior.exp(), exact.reward.round(decimals=9)
    for n in (1, 2, 3):
        law = torch.zeros_like(prior)
        index = torch.cartesian_prod(*[torch.arange(len(prior))] * n).reshape(-1, n)
        best = reward[index].argmax(-1)
        chosen = index.gather(-1, best[:, None])[:, 0]
        law.index_add_(0, chosen, prior[index].prod(-1))
        torch.testing.assert_close(ex.best_of_n_law(exact, n), law, atol=1e-12, rtol=0)
    bound = math.log(4) - 3 / 4
    assert 0 < ex.kl(ex.best_of_n_law(exact, 4).log(), exact.log_prior) < bound
    twice = ex.best_of_n_law(exact, 6)
    assert twice.sum() == pytest.approx(1)


def test_sir_law_at_two_draws_and_its_limit(b):
    """The integral against the list of all pairs; then n^2 KL -> Var_{p*}(p* / pi0) / 2 (mathematics A4)."""
    _, exact = b
    prior, weight = exact.log_prior.exp(), exact.scored.log_evidence.exp()
    pairs = prior[:, None] * prior[None, :] * (weight[:, None] / (weight[:, None] + weight[None, :]))
    torch.testing.assert_close(ex.sir_law(exact, 2), 2 * pairs.sum(1), atol=1e-10, rtol=0)
    post = exact.log_posterior.exp()
    ratio = post / prior
    limit = float((post * ratio**2).sum() - (post * ratio).sum() ** 2) / 2
    scaled = [n * n * ex.kl(ex.sir_law(exact, n).log(), exact.log_posterior) for n in (64, 256, 1024)]
    assert abs(scaled[-1] / limit - 1) < 0.005
    assert abs(scaled[0] - limit) > abs(scaled[1] - limit) > abs(scaled[2] - limit)
    first_order = 1 + ex.chi2(exact.log_posterior, exact.log_prior) - ratio
    n = 1024
    torch.testing.assert_close(n * (ex.sir_law(exact, n) / post - 1), first_order, atol=0.02, rtol=0.02)


def test_too_many_completions_are_refused():
    world = fixture_a()
    with pytest.raises(tl.InputError, match="more than 50 completions"):
        ex.posterior(world.target, world.prompts, limit=50)


def test_prompts_have_their_own_posterior():
    world = language(
        lambda prompt, prefix: [0.3 * prompt[0] * t - 0.1 * len(prefix) for t in range(3)],
        lambda x: float(x[0]),
        beta=1.0,
        prompts=("0", "2"),
        depth=2,
    )
    first, second = (ex.posterior(world.target, world.prompts, i) for i in range(2))
    assert first.log_z != pytest.approx(second.log_z)
    assert first.log_z == pytest.approx(math.log(sum(math.exp(t) for t in range(3)) / 3))


def test_a_tabular_model_is_an_ordinary_model_for_others(tmp_path):
    """transformers' own `generate`, `save_pretrained` and `Auto` classes work on it."""
    from transformers import AutoModelForCausalLM

    world = fixture_b()
    model = world.prior.body.model
    ids = world.prior.body.tokenizer("0 0", return_tensors="pt")["input_ids"][:, :1]
    torch.manual_seed(0)
    out = model.generate(ids, do_sample=True, max_new_tokens=5, num_return_sequences=500, pad_token_id=2)
    first = torch.bincount(out[:, 1], minlength=3) / 500
    assert first.tolist() == pytest.approx(model.table[0, 0].softmax(-1).tolist(), abs=0.07)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again.table, model.table)
