"""Evidence from several rewards, by enumeration: what each target is, what it minimises, and what it does not depend on."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tiltlm as tl
from tiltlm.errors import InputError, TiltWarning
from tiltlm.evidence import (
    EvidenceAverage,
    LogPool,
    LowerConfidenceBound,
    Members,
    MixtureOfPosteriors,
    PriorRewards,
    VariancePenalised,
    WorstOfEnsemble,
)
from tiltlm.inference.catalogue import decoding_engines, training_engines
from tiltlm.posterior import exact as ex
from tiltlm.target import Target
from tiltlm.testing import fixture_a, fixture_b, small_language

BETA = 0.5
AVERSE = [LowerConfidenceBound, WorstOfEnsemble, VariancePenalised]


def member(m, offset=0.0):
    """Members agree on part of the reward, and each has its own rest."""

    def fn(completion_ids):
        return [
            math.cos(sum(i * t for i, t in enumerate(ids, 1))) + 0.6 * math.sin(3 * m + sum(ids) + len(ids)) + offset
            for ids in completion_ids
        ]

    return fn


def members(count=3, offsets=None, **settings):
    offsets = offsets or [0.0] * count
    return Members(tuple(member(m, o) for m, o in enumerate(offsets)), **settings)


@pytest.fixture(scope="module")
def b():
    world = fixture_b()
    return world, ex.posterior(world.target, world.prompts)


def known(some, exact):
    """The members' rewards on all completions: no error at all."""
    return PriorRewards.of(some, exact.listed.draws, exact.listed.log_prior, exact=True)


def law(world, evidence):
    return ex.posterior(Target(world.prior, evidence), world.prompts).log_posterior


def average(some, *rest, **settings):
    """The evidence average of members as they are, without its warning."""
    with pytest.warns(TiltWarning, match="offset"):
        return EvidenceAverage(some, *rest, **settings)


def posteriors(world, some, beta=BETA):
    return torch.stack([law(world, tl.Reward(fn, beta=beta)) for fn in some.functions])


# --- what each of them is ---


def test_the_evidence_average_averages_likelihoods(b):
    world, exact = b
    some = members()
    rewards, _ = some.rewards(exact.scored.draws)
    by_hand = (exact.log_prior + (rewards / BETA).exp().mean(0).log()).log_softmax(0)
    assert_close(law(world, average(some, BETA)), by_hand, rtol=0, atol=1e-13)


def test_the_mixture_averages_posteriors_and_its_log_z_is_zero(b):
    world, exact = b
    some = members()
    mixture = MixtureOfPosteriors(known(some, exact), BETA)
    by_hand = posteriors(world, some).exp().mean(0).log()
    assert_close(law(world, mixture), by_hand, rtol=0, atol=1e-13)
    assert abs(ex.posterior(Target(world.prior, mixture), world.prompts).log_z) < 1e-13


def test_the_log_pool_averages_rewards(b):
    world, _ = b
    some = members()
    by_hand = posteriors(world, some).mean(0).log_softmax(0)
    assert_close(law(world, LogPool(some, BETA)), by_hand, rtol=0, atol=1e-13)


def test_the_three_are_three(b):
    world, exact = b
    some = members()
    laws = [
        law(world, e) for e in (average(some, BETA), MixtureOfPosteriors(known(some, exact), BETA), LogPool(some, BETA))
    ]
    for i in range(3):
        for j in range(i):
            assert ex.total_variation(laws[i], laws[j]) > 0.005


def test_gaussian_members_give_the_average_mu_over_beta_and_half_the_variance_over_beta_squared(b):
    """Gauss-Hermite members: r = mu(x) + s(x) z with z ~ N(0, 1), so that the average is exact."""
    _, exact = b
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)

    def mu(ids):
        return math.cos(sum(ids))

    def spread(ids):
        return 0.2 + 0.1 * len(ids)

    def at(z):
        return lambda completion_ids: [mu(ids) + spread(ids) * z for ids in completion_ids]

    shares = weights / weights.sum()
    some = Members(tuple(at(z) for z in nodes), tuple((shares / math.fsum(shares)).tolist()))
    ids = [list(c) for c in exact.completions]
    expected = torch.tensor([mu(i) / BETA + spread(i) ** 2 / (2 * BETA**2) for i in ids], dtype=torch.float64)
    got = average(some, BETA).log_likelihood(exact.scored.draws)
    assert_close(got.log, expected, rtol=0, atol=1e-9)
    assert_close(
        got.rewards["reward_sd"], torch.tensor([spread(i) for i in ids], dtype=torch.float64), rtol=1e-9, atol=0
    )


# --- offsets, which comparisons cannot tell ---


def evidences(some, exact):
    prior = known(some, exact)
    return {
        "mixture": MixtureOfPosteriors(prior, BETA),
        "log-pool": LogPool(some, BETA),
        "average, centred": EvidenceAverage(prior, BETA),
        "lcb": LowerConfidenceBound(prior, BETA, k=1.0),
        "worst": WorstOfEnsemble(prior, BETA),
        "variance": VariancePenalised(prior, BETA, penalty=0.5),
    }


@pytest.mark.parametrize("name", ["mixture", "log-pool", "average, centred", "lcb", "worst", "variance"])
def test_a_members_offset_changes_nothing(b, name):
    world, exact = b
    as_it_is = law(world, evidences(members(3), exact)[name])
    shifted = law(world, evidences(members(3, [2.0, 0.0, -1.0]), exact)[name])
    assert_close(shifted, as_it_is, rtol=0, atol=1e-12)


def test_but_it_changes_the_plain_evidence_average(b):
    """The negative control: two members, one of them shifted by 2, are a law far away."""
    world, _ = b
    far = ex.total_variation(law(world, average(members(2, [2.0, 0.0]), BETA)), law(world, average(members(2), BETA)))
    print("total variation", far)
    assert far > 0.05
    alone = law(world, tl.Reward(member(0), beta=BETA))
    assert ex.total_variation(law(world, average(members(2, [20.0, 0.0]), BETA)), alone) < 1e-9  # it took over


def test_uncentred_minima_and_deviations_would_depend_on_offsets(b):
    """What centring is for: without it the worst of two members is whoever has the smaller offset."""
    _, exact = b
    rewards = members(2, [5.0, 0.0]).rewards(exact.scored.draws)[0]
    assert (rewards.argmin(0) == 1).all()
    assert len((rewards - (exact.log_prior.exp() * rewards).sum(-1, keepdim=True)).argmin(0).unique()) == 2


# --- what they minimise ---


def directions(log_q, count=5):
    """Small moves on the simplex."""
    for seed in range(count):
        noise = torch.randn(len(log_q), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for size in (1e-3, -1e-3, 0.3):
            yield (log_q + size * noise).log_softmax(0)


def test_the_mixture_has_the_least_mean_forward_kl_and_the_log_pool_the_least_mean_reverse_kl(b):
    world, exact = b
    some = members()
    each = posteriors(world, some)

    def forward(log_q):
        return sum(ex.kl(p, log_q) for p in each) / len(each)

    def reverse(log_q):
        return sum(ex.kl(log_q, p) for p in each) / len(each)

    mixture, pool = law(world, MixtureOfPosteriors(known(some, exact), BETA)), law(world, LogPool(some, BETA))
    seeking = law(world, average(members(3, [2.0, 0, 0]), BETA))
    for objective, best in ((forward, mixture), (reverse, pool)):
        value = objective(best)
        assert all(objective(other) > value for other in directions(best))
        assert objective(seeking) > value + 1e-4
    assert forward(pool) > forward(mixture)
    assert reverse(mixture) > reverse(pool)
    slope = -each.exp().mean(0) + mixture.exp()  # the gradient of the mean forward KL over logits of q
    assert slope.abs().max() < 1e-13


def test_risk_averse_evidence_by_hand(b):
    world, exact = b
    some = members(4)
    prior = known(some, exact)
    rewards = some.rewards(exact.scored.draws)[0]
    centred = rewards - (exact.log_prior.exp() * rewards).sum(-1, keepdim=True)
    sd = centred.std(0, correction=0)
    expected = [
        (LowerConfidenceBound(prior, BETA, k=2.0), centred.mean(0) - 2 * sd),
        (WorstOfEnsemble(prior, BETA), centred.amin(0)),
        (VariancePenalised(prior, BETA, penalty=0.7), centred.mean(0) - 0.7 * sd**2),
    ]
    for evidence, reward in expected:
        assert_close(evidence.log_likelihood(exact.scored.draws).log, reward / BETA, rtol=0, atol=1e-12)
    none = LowerConfidenceBound(prior, BETA, k=0.0)
    assert_close(law(world, none), law(world, LogPool(some, BETA)), rtol=0, atol=1e-13)


# --- as evidence: temperatures, bounds, engines, plans and certificates ---


def all_of(some, exact):
    return {**evidences(some, exact), "average": average(some, BETA)}


def test_another_temperature_is_what_scored_draws_say(b):
    """`plan` rescales what it has scored; the evidence at that temperature has to agree."""
    world, exact = b
    for name, evidence in all_of(members(bounds=(-2, 2)), exact).items():
        target = Target(world.prior, evidence)
        scored = target.score(exact.scored.draws)
        assert_close(target.at(0.2).score(exact.scored.draws).log_evidence, scored.at(0.2).log_evidence, msg=name)
        assert target.at(0.2).beta == 0.2
        assert target.at(0.2).evidence.identity == evidence.identity


def test_bounds_hold_and_need_the_members(b):
    _, exact = b
    for name, evidence in all_of(members(bounds=(-1.6, 1.6)), exact).items():
        low, high = evidence.log_bounds
        log = evidence.log_likelihood(exact.scored.draws).log
        assert low <= float(log.min()) <= float(log.max()) <= high, name
    assert all(e.log_bounds is None for e in all_of(members(), exact).values())


@pytest.mark.parametrize("kind", [EvidenceAverage, MixtureOfPosteriors, LogPool, *AVERSE])
def test_training_and_the_certificate_go_to_its_own_posterior(kind):
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    target = Target(world.prior, kind(known(members(bounds=(-1.6, 1.6)), exact), 0.7))
    truth = ex.posterior(target, world.prompts)
    assert tl.plan(target, world.prompts, samples=32) is not None
    policy = tl.fit(target, world.prompts, tl.RLOO(group=16), steps=40, lora=None, batch=1, lr=0.1, micro_tokens=10**6)
    found = ex.kl(truth.log_prob(policy), truth.log_posterior)
    assert found < 0.2 * ex.kl(truth.log_prior, truth.log_posterior) + 0.01
    certificate = tl.certify(policy, target, world.prompts, samples=128)
    assert certificate.kl_posterior.low - 0.05 <= found <= certificate.kl_posterior.high + 0.05
    drawn = tl.Rejection(n=64).sample(target, world.prompts, rng=torch.Generator().manual_seed(0))
    assert len(drawn.kept().scored)


@pytest.fixture(scope="module")
def twins():
    """A cautious target, and the same law by a plain reward: no engine can tell them apart, if it looks at the evidence alone."""
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    cautious = LowerConfidenceBound(known(members(bounds=(-1.6, 1.6)), exact), 0.7, k=1.0)
    values = (0.7 * cautious.log_likelihood(exact.scored.draws).log).tolist()
    table = {tuple(ids): value for ids, value in zip(exact.completions, values, strict=True)}

    def plain(completion_ids):
        return [table[tuple(ids)] for ids in completion_ids]

    low, high = cautious.log_bounds
    return world, Target(world.prior, cautious), world.prior * tl.Reward(plain, 0.7, bounds=(0.7 * low, 0.7 * high))


@pytest.mark.parametrize("name", [name for name, e in training_engines().items() if e.claim.data != "given"])
@pytest.mark.filterwarnings("ignore::tiltlm.errors.TiltWarning")
def test_every_training_engine_takes_the_steps_that_the_same_reward_asks_for(twins, name):
    world, *targets = twins
    settings = {"steps": 2, "lora": None, "batch": 1, "lr": 0.1, "micro_tokens": 10**6}
    cautious, plain = (tl.fit(target, world.prompts, training_engines()[name], **settings) for target in targets)
    draws = ex.posterior(targets[0], world.prompts).scored.draws
    got, want, before = (law.log_prob(draws) for law in (cautious, plain, world.prior))
    assert_close(got, want, rtol=0, atol=1e-9)
    assert not torch.allclose(got, before, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(decoding_engines()) - {"value-guided"}))
@pytest.mark.filterwarnings("ignore::tiltlm.errors.TiltWarning")
def test_every_decoding_engine_draws_what_the_same_reward_asks_for(twins, name):
    world, *targets = twins
    cautious, plain = (
        decoding_engines()[name].sample(target, world.prompts, rng=torch.Generator().manual_seed(0))
        for target in targets
    )
    assert torch.equal(cautious.scored.draws.tokens, plain.scored.draws.tokens)
    assert_close(cautious.log_w, plain.log_w, rtol=0, atol=1e-9)


def test_prior_rewards_from_draws_approach_the_exact_ones():
    world = fixture_a()
    exact = ex.posterior(world.target, world.prompts)
    some = members()
    truth, drawn = known(some, exact), tl.prior_rewards(world.prior, some, world.prompts, samples=2000)
    (key,) = truth.rewards
    errors = [
        (have.value - want.value) / have.stderr
        for have, want in zip(drawn.log_z_estimates(BETA)[key], truth.log_z_estimates(BETA)[key], strict=True)
    ]
    assert max(map(abs, errors)) < 4
    assert max(e.stderr for e in drawn.log_z_estimates(BETA)[key]) < 0.05
    assert_close(drawn.mean_of(key), truth.mean_of(key), rtol=0, atol=0.1)


def test_the_spread_that_is_logged_is_the_members_about_their_common_zero(b):
    """Offsets of members are no uncertainty about completions: shifted members have the same spread."""
    _, exact = b
    found = [
        evidence.log_likelihood(exact.scored.draws).rewards["reward_sd"]
        for offsets in (None, [5.0, 0.0, -3.0])
        for name, evidence in evidences(members(3, offsets), exact).items()
        if name != "log-pool"  # of members without prior draws
    ]
    for sd in found:
        assert_close(sd, found[0], rtol=0, atol=1e-12)
    assert found[0].max() < 1


def test_what_cannot_be_used_is_said():
    world, other = fixture_b(), fixture_a()
    exact = ex.posterior(world.target, world.prompts)
    prior = known(members(), exact)
    with pytest.raises(InputError, match="no prior draws of prompt"):
        WorstOfEnsemble(PriorRewards(members(), {}, {})).log_likelihood(exact.scored.draws)
    with pytest.raises(InputError, match="common zero"):
        WorstOfEnsemble(members())
    with pytest.raises(InputError, match="log Z"):
        MixtureOfPosteriors(members())
    with pytest.raises(InputError, match="sum to 1"):
        Members((member(0), member(1)), weights=(0.5, 0.6))
    with pytest.raises(InputError, match="k is -1"):
        LowerConfidenceBound(prior, k=-1)
    with pytest.raises(InputError, match="beta is 0"):
        LogPool(members(), beta=0)
    with pytest.raises(InputError, match="functions is empty"):
        Members(())
    with pytest.raises(InputError, match="at least 2"):
        tl.prior_rewards(other.prior, members(), other.prompts, samples=1)
    with pytest.warns(TiltWarning, match="known only to"):
        MixtureOfPosteriors(tl.prior_rewards(other.prior, members(), other.prompts, samples=4), 0.01)


def test_a_completion_that_one_member_cannot_judge_is_dropped(b):
    _, exact = b

    def shy(completion_ids):
        return [math.nan if len(ids) == 2 else 0.5 for ids in completion_ids]

    some = Members((member(0), shy), on_error="drop")
    got = LogPool(some).log_likelihood(exact.scored.draws)
    assert (~got.kept).tolist() == [len(c) == 2 for c in exact.completions]
    assert torch.isfinite(got.log[got.kept]).all()
    with pytest.raises(InputError, match="reward 2"):
        LogPool(Members((member(0), shy))).log_likelihood(exact.scored.draws)


def test_it_adds_up_with_other_evidence(b):
    world, exact = b
    pool, extra = LogPool(members(), BETA), tl.Reward(member(7), beta=BETA)
    both = law(world, pool + 2 * extra)
    by_hand = (
        exact.log_prior + pool.log_likelihood(exact.scored.draws).log + 2 * extra.log_likelihood(exact.scored.draws).log
    )
    assert_close(both, by_hand.log_softmax(0), rtol=0, atol=1e-13)
