"""`certify` against exact KLs: the interval covers, each side on its own too."""

import itertools
import json
import math

import pytest
import torch

import tiltlm as tl
from tiltlm.diagnostics.certificate import acceptance, prompt_bounds, upper_terms
from tiltlm.estimates import Estimate
from tiltlm.inference.decoding.rejection import Rejection
from tiltlm.inference.decoding.smc import SMC
from tiltlm.posterior import exact as ex
from tiltlm.testing import fixture_a, language
from tiltlm.testing.fixtures import sine_logit
from tiltlm.weights import group_count

REPETITIONS = 200
GATE = 0.95 - 3 * math.sqrt(0.95 * 0.05 / REPETITIONS)  # what 200 repetitions can tell from 95%


@pytest.fixture(scope="module")
def world():
    return language(
        lambda p, h: [sine_logit(h, a, shift=p[0] + 3 * p[1]) for a in range(3)],
        lambda x: math.cos(sum(i * t for i, t in enumerate(x, 1))) + 0.5 * (x[-1] == 2),
        beta=0.5,
        bounds=(-1.0, 1.5),
        prompts=["0 0", "0 1", "1 0", "1 1"],
        prompt_length=2,
    )


@pytest.fixture(scope="module")
def exacts(world):
    return [ex.posterior(world.target, world.prompts, p) for p in range(4)]


def towards_posterior(world, exacts, share):
    """A policy whose logits have gone `share` of the way from the prior's to the posterior's."""
    policy = world.prior.policy(lora=None)
    table = policy.named_parameters()["table"]
    for number, exact in enumerate(exacts):
        a, b = divmod(number, 2)
        values = exact.soft_values()
        prefixes = itertools.chain.from_iterable(itertools.product(range(3), repeat=n) for n in range(4))
        with torch.no_grad():
            for row, prefix in enumerate(prefixes):
                for token in range(3):
                    table[3 * a + b, row, token] += share * values[(*prefix, token)] / exact.beta
    return policy


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_the_interval_covers_the_truth(world, exacts, share, record_property):
    policy = towards_posterior(world, exacts, share)
    truth = sum(ex.kl(e.log_prob(policy), e.log_posterior) for e in exacts) / 4
    kl_prior = sum(ex.kl(e.log_prob(policy), e.log_prior) for e in exacts) / 4
    log_z = sum(e.log_z for e in exacts) / 4
    counts = {"both": 0, "low": 0, "high": 0, "kl_prior": 0, "log_z": 0}
    widths = []
    for seed in range(REPETITIONS):
        rng = torch.Generator().manual_seed(10**6 + seed)
        prior_draws = world.target.score(world.prior.draw(world.prompts, 48, rng))
        found = tl.certify(policy, world.target, world.prompts, samples=64, prior_draws=prior_draws, seed=seed)
        assert found.log_z_upper is not None
        counts["both"] += truth in found.kl_posterior
        counts["low"] += found.kl_posterior.low <= truth
        counts["high"] += truth <= found.kl_posterior.high
        counts["kl_prior"] += abs(found.kl_prior.value - kl_prior) <= 1.96 * found.kl_prior.stderr + 1e-12
        low, high = found.log_z_lower, found.log_z_upper
        counts["log_z"] += low.value - 1.96 * low.stderr <= log_z <= high.value + 1.96 * high.stderr
        widths.append(found.kl_posterior.width)
    rates = {name: count / REPETITIONS for name, count in counts.items()}
    width = sum(widths) / REPETITIONS
    print(
        f"KL(q||p*) = {truth:.3f}: coverage "
        + ", ".join(f"{k} {v:.1%}" for k, v in rates.items())
        + f"; width {width:.3f}"
    )
    record_property(f"coverage_certificate, KL(q||p*) = {truth:.3f} (width {width:.3f})", rates["both"])
    assert min(rates.values()) >= GATE, rates
    assert width < 0.35, "an interval that covers because it is wide says nothing"


def test_the_posterior_itself_gets_a_certificate_of_zero_width(world, exacts):
    found = tl.certify(towards_posterior(world, exacts, 1.0), world.target, world.prompts, samples=32)
    assert found.kl_posterior.high < 1e-9
    assert found.ess == pytest.approx(32)


def test_upper_and_lower_bounds_in_expectation_by_enumeration():
    """E log(mean w) <= log Z <= E log(mean w with one exact sample), for two draws, over all pairs; gap chi^2 / (2 K)."""
    world = fixture_a()
    exact = ex.posterior(world.target, world.prompts)
    log_w, prior, post = exact.scored.log_evidence, exact.log_prior.exp(), exact.log_posterior.exp()
    pairs = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
    lower = float((prior[:, None] * prior[None, :] * pairs).sum())
    upper = float((post[:, None] * prior[None, :] * pairs).sum())
    assert exact.log_z - float((prior * log_w).sum()) == pytest.approx(1.374937 - 0.231030, abs=1e-5)
    assert lower == pytest.approx(0.749584, abs=1e-6)
    assert upper == pytest.approx(1.787207, abs=1e-6)
    assert lower < exact.log_z < upper
    # upper_terms, given q's draws (y, x), replaces one of them by an exact sample in the mean
    terms = upper_terms(log_w[:4], log_w[10:12])
    others = log_w[:4].exp().sum() * 3 / 4
    torch.testing.assert_close(terms, ((log_w[10:12].exp() + others) / 4).log())


def test_without_bounds_there_is_no_upper_side_and_it_says_so(world):
    from dataclasses import replace

    unbounded = replace(world.target, evidence=replace(world.target.evidence, bounds=None))
    found = tl.certify(world.prior, unbounded, world.prompts, samples=32)
    assert found.log_z_upper is None
    assert found.kl_posterior.high == math.inf
    assert found.kl_posterior.low > 0
    assert any(note.startswith("no upper bound: the reward has no declared bounds") for note in found.notes)
    assert json.loads(json.dumps(found.as_dict()))["kl_posterior"]["high"] is None


def test_without_exact_samples_there_is_no_upper_side(world):
    cold = world.target.at(0.02)
    found = tl.certify(world.prior, cold, world.prompts, samples=16, exact_budget=2)
    assert found.log_z_upper is None
    assert any("got no exact posterior sample" in note and "raise exact_budget" in note for note in found.notes)


def test_no_draws_are_spent_on_exact_samples_that_will_not_come(world, monkeypatch):
    """Bounds far above the reward: acceptance is known from the prior's draws, and the budget would be wasted."""
    from dataclasses import replace

    wide = replace(world.target, evidence=replace(world.target.evidence, bounds=(-1.0, 40.0)))
    prior_draws = wide.score(world.prior.draw(world.prompts, 64, torch.Generator().manual_seed(0)))
    spent = []
    monkeypatch.setattr(Rejection, "sample", lambda self, *args, **rest: spent.append(self.n))
    found = tl.certify(world.prior, wide, world.prompts, samples=16, prior_draws=prior_draws)
    assert not spent
    assert found.log_z_upper is None
    assert any("would be accepted as an exact posterior sample, so none was drawn" in note for note in found.notes)


def test_what_cannot_be_certified(world):
    with pytest.raises(tl.InputError, match="samples is 1; errors are told by how draws of a prompt differ"):
        tl.certify(world.prior, world.target, world.prompts, samples=1)
    with pytest.raises(tl.InputError, match=r"sampler is a str, which draws nothing; give a policy, or lm.prior\(\)"):
        tl.certify("policy", world.target, world.prompts)


def test_acceptance_is_that_of_rejection(world):
    prior_draws = world.target.score(world.prior.draw(world.prompts, 400, torch.Generator().manual_seed(1)))
    expected = acceptance(world.target, prior_draws) * 400
    weighted = [
        Rejection().weigh(world.target, prior_draws, torch.Generator().manual_seed(i)).kept() for i in range(50)
    ]
    counts = torch.stack([group_count(w.scored.draws.prompt_index, len(world.prompts)) for w in weighted]).double()
    assert ((counts.mean(0) - expected).abs() < 5 * (expected / 50).sqrt()).all()


def test_a_single_exact_sample_is_enough_for_an_upper_bound():
    log_w = torch.tensor([0.1, 0.4, -0.2, 0.0], dtype=torch.float64)
    one = torch.tensor([0.3], dtype=torch.float64)
    bounds = prompt_bounds(log_w, one, pooled=Estimate(0.0, 0.1, 1, df=3))
    assert bounds.high is not None
    assert 0 <= bounds.low.value < bounds.high.value
    assert math.isfinite(bounds.interval.high)
    unknown = prompt_bounds(log_w, one, pooled=None)
    assert unknown.high is None, "its error is not known"
    assert unknown.interval.high == math.inf


def test_prior_draws_of_another_temperature_are_taken_at_the_targets(world, rng):
    """The plan's draws are scored at the plan's beta; the certificate wants them at its own."""
    draws = world.prior.draw(world.prompts, 400, rng)
    hot, right = world.target.at(5.0).score(draws), world.target.score(draws)
    found = tl.certify(world.prior, world.target, world.prompts, samples=64, prior_draws=hot)
    again = tl.certify(world.prior, world.target, world.prompts, samples=64, prior_draws=right)
    assert found.exact_samples == again.exact_samples
    assert found.kl_posterior == again.kl_posterior
    with pytest.raises(tl.InputError, match="other prompts"):
        tl.certify(world.prior, world.target, world.prompts.select([0, 1]), samples=8, prior_draws=hot)


def test_the_prior_is_certified_too(world, exacts):
    found = tl.certify(world.prior, world.target, world.prompts, samples=256, seed=1)
    assert found.kl_prior.value == 0
    truth = sum(ex.kl(e.log_prior, e.log_posterior) for e in exacts) / 4
    assert truth in found.kl_posterior
    assert "KL(q||p*)" in str(found)


def test_the_error_of_log_z_is_that_of_the_mean_weight():
    """A rare success, drawn from the prior: ELBO and gap move together, so that their errors do not add up like independent ones."""
    world = language(
        lambda p, h: [math.log(9), 0.0], lambda x: float(x[0]), beta=0.5, bounds=(0.0, 1.0), vocab_size=2, depth=1
    )
    log_z = math.log(0.9 + 0.1 * math.exp(2))
    found = [
        tl.certify(world.prior, world.target, world.prompts, samples=256, seed=seed).log_z_lower
        for seed in range(REPETITIONS)
    ]
    assert sum(abs(z.value - log_z) <= z.margin for z in found) >= GATE * REPETITIONS
    values = torch.tensor([z.value for z in found])
    assert found[0].stderr == pytest.approx(float(values.std()), rel=0.2)


@pytest.mark.parametrize("engine", [None, SMC(particles=64, repeats=4)], ids=["own draws", "SMC"])
def test_completions_without_a_reward_are_none_of_the_samplers(engine):
    """The sampler that is certified is the one given a reward, and Z adds up completions with one, whoever bounds it."""
    world = fixture_a()

    def judge(completion_ids):
        return [None if x[0] == 0 else math.cos(sum(i * t for i, t in enumerate(x, 1))) for x in completion_ids]

    target = world.prior * tl.Reward(judge, beta=0.5, bounds=(-1.0, 1.0), on_error="drop")
    exact = ex.posterior(target, world.prompts)
    kept = exact.log_prior.logsumexp(0)
    truth, repetitions, covered = ex.kl(exact.log_prior - kept, exact.log_posterior), 30, torch.zeros(2)
    for seed in range(repetitions):
        found = tl.certify(world.prior, target, world.prompts, samples=300, engine=engine, seed=seed)
        low, high = found.log_z_lower, found.log_z_upper
        assert high is not None
        covered[0] += truth in found.kl_posterior
        covered[1] += low.value - low.margin <= exact.log_z <= high.value + high.margin
        assert found.elbo.value == pytest.approx(found.reward.value / 0.5 - found.kl_prior.value)
        assert found.kl_prior.value == pytest.approx(-float(kept), abs=0.3)
    assert (covered >= 0.95 * repetitions - 3 * math.sqrt(repetitions * 0.05 * 0.95)).all()


def test_collapse_shows(world):
    policy = world.prior.policy(lora=None)
    with torch.no_grad():
        policy.named_parameters()["table"][..., 1] += 30.0
    found = tl.certify(policy, world.target, world.prompts, samples=32)
    assert found.diversity.unique == pytest.approx(1 / 32)
    assert found.diversity.entropy == pytest.approx(0, abs=1e-3)
    # what q never draws cannot raise the lower side (mathematics C): only exact posterior samples see the lost modes
    assert found.kl_posterior.high > 5
