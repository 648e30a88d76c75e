"""Targets other than a plain reward tilt: moments, powers, hard constraints, best-of-n's own law, products of rewards."""

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

import tiltlm as tl
from tiltlm.diagnostics.certificate import prompt_bounds
from tiltlm.diagnostics.frontier import PriorSample, best_of_n
from tiltlm.diagnostics.tilt import tilt, tilt_jackknife
from tiltlm.evidence import (
    BestOfNReward,
    Constraint,
    Moment,
    Power,
    Reward,
    RewardLaw,
    WinRate,
    match_moments,
    reward_law,
)
from tiltlm.evidence.win_rate import best_of_n_reward
from tiltlm.inference.decoding.rejection import log_accept_bound
from tiltlm.posterior import exact as ex
from tiltlm.records import Scored
from tiltlm.testing import Language, fixture_a, fixture_b, language, posterior_policy, small_language
from tiltlm.testing.fixtures import sine_logit
from tiltlm.weights import ess, log_mean_weight, normalise, pareto_k, resample

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def twos(completion_ids):
    return [float(sum(t == 2 for t in ids)) for ids in completion_ids]


def wave(completion_ids):
    return [math.sin(sum(i * t for i, t in enumerate(ids, 1))) for ids in completion_ids]


def starts_with_one(completion_ids):
    return [ids[0] == 1 for ids in completion_ids]


def no_zero(completion_ids):
    return [0 not in ids for ids in completion_ids]


def has_two(completion_ids):
    return [2 in ids for ids in completion_ids]


@pytest.fixture(scope="module")
def a():
    return fixture_a()


@pytest.fixture(scope="module")
def prior_a(a):
    """Fixture A's prior, listed: log pi0 of its 81 strings, and the strings."""
    return ex.posterior(a.target, a.prompts)


@pytest.fixture(scope="module")
def two_prompts():
    """A language whose two prompts have different priors."""
    return language(
        lambda p, h: [sine_logit(h, t, shift=p[0]) for t in range(3)],
        lambda x: float(sum(x)),
        beta=1.0,
        bounds=(0.0, 6.0),
        prompts=["0", "1"],
        depth=3,
    )


def listed(world):
    """All completions of all prompts, with log q = 0."""
    return Scored.concatenate([ex.posterior(world.target, world.prompts, p).listed for p in range(len(world.prompts))])


def of(fn, exact):
    return torch.tensor(fn([list(c) for c in exact.completions]), dtype=torch.float64)


class TestMoments:
    def test_lambda_and_moments_are_exact_on_the_list_of_all_strings(self, a, prior_a):
        moments = [Moment(twos, 1.9, bounds=(0, 4)), Moment(wave, -0.1, bounds=(-1, 1))]
        found = match_moments(a.prior, a.prompts, moments, scored=prior_a.listed, min_ess=5)
        exact = ex.posterior(a.prior * found.evidence, a.prompts)
        p = exact.log_posterior.exp()
        assert float(p @ of(twos, exact)) == pytest.approx(1.9, abs=1e-12)
        assert float(p @ of(wave, exact)) == pytest.approx(-0.1, abs=1e-12)
        assert found.kl.value == pytest.approx(ex.kl(exact.log_posterior, exact.log_prior), abs=1e-12)
        assert found.dual == pytest.approx(-found.kl.value, abs=1e-15)
        assert found.names == ("twos", "wave")
        assert "twos: lambda" in str(found)
        w1, w2 = (estimate.value for estimate in found.weights)
        low, high = found.evidence.log_bounds
        assert low == pytest.approx(min(0, 4 * w1) - abs(w2))
        assert high == pytest.approx(max(0, 4 * w1) + abs(w2))

    def test_newton_agrees_with_scipy_on_the_dual(self, a, prior_a):
        phi = torch.stack([of(twos, prior_a), of(wave, prior_a)], -1).numpy()
        log_prior, mu = prior_a.log_prior.numpy(), [0.6, 0.3]

        def dual(weights):
            log_w = log_prior + phi @ weights
            log_z = float(torch.tensor(log_w).logsumexp(0))
            p = torch.tensor(log_w - log_z).exp().numpy()
            return log_z - weights @ mu, p @ phi - mu

        other = minimize(dual, [0.0, 0.0], jac=True, method="BFGS", options={"gtol": 1e-11})
        found = match_moments(
            a.prior, a.prompts, [Moment(twos, 0.6), Moment(wave, 0.3)], scored=prior_a.listed, min_ess=2
        )
        assert [w.value for w in found.weights] == pytest.approx(other.x.tolist(), abs=1e-8)
        assert found.dual == pytest.approx(other.fun, abs=1e-13)

    def test_pythagoras(self, a, prior_a):
        """KL(q||a) = KL(q||p) + KL(p||a) for every q that has the moments: so p is the nearest of them."""
        phi = of(twos, prior_a)
        q = torch.softmax(torch.sin(torch.arange(81, dtype=torch.float64) * 5), 0)
        mean = float(q @ phi)
        found = match_moments(a.prior, a.prompts, [Moment(twos, mean)], scored=prior_a.listed, min_ess=2)
        p = ex.posterior(a.prior * found.evidence, a.prompts).log_posterior
        base = prior_a.log_prior
        left, right = ex.kl(q.log(), base), ex.kl(q.log(), p) + ex.kl(p, base)
        assert left == pytest.approx(right, abs=1e-12)
        other = torch.softmax(torch.cos(torch.arange(81, dtype=torch.float64) * 3), 0)  # without the moment: not so
        assert abs(ex.kl(other.log(), base) - ex.kl(other.log(), p) - ex.kl(p, base)) > 1e-3

    def test_one_lambda_gives_the_mean_over_prompts_each_normalised_by_itself(self, two_prompts):
        world = two_prompts
        found = match_moments(world.prior, world.prompts, [Moment(twos, 1.4)], scored=listed(world), min_ess=2)
        target = world.prior * found.evidence
        exacts = [ex.posterior(target, world.prompts, p) for p in range(2)]
        means = [float(e.log_posterior.exp() @ of(twos, e)) for e in exacts]
        assert sum(means) / 2 == pytest.approx(1.4, abs=1e-12)
        assert abs(means[0] - means[1]) > 0.01
        assert found.kl.value == pytest.approx(sum(ex.kl(e.log_posterior, e.log_prior) for e in exacts) / 2, abs=1e-12)
        z = torch.tensor([e.log_z for e in exacts]).softmax(0)
        joint = float(
            z @ torch.tensor(means, dtype=z.dtype)
        )  # the joint tilt, which weighs prompts by Z(c), is another
        assert abs(joint - 1.4) > 1e-3

    def test_pointwise_is_conditioning(self, a, prior_a):
        found = match_moments(a.prior, a.prompts, [Moment(no_zero, 1.0)], scored=prior_a.listed)
        exact = ex.posterior(a.prior * found.evidence, a.prompts)
        inside = of(no_zero, exact) == 1
        share = exact.log_prior[inside].logsumexp(0)
        expected = torch.where(inside, exact.log_prior - share, -torch.inf)
        assert_close(exact.log_posterior, expected, **TIGHT)
        assert found.names == ()
        assert found.kl.value == pytest.approx(-float(share), abs=1e-12)

    def test_hybrid_is_conditioning_and_tilting(self, a, prior_a):
        moments = [Moment(no_zero, 1.0, name="no zero"), Moment(wave, 0.2)]
        found = match_moments(a.prior, a.prompts, moments, scored=prior_a.listed, min_ess=2)
        exact = ex.posterior(a.prior * found.evidence, a.prompts)
        p = exact.log_posterior.exp()
        assert float(p @ of(no_zero, exact)) == pytest.approx(1, abs=1e-12)
        assert float(p @ of(wave, exact)) == pytest.approx(0.2, abs=1e-12)
        assert found.kl.value == pytest.approx(ex.kl(exact.log_posterior, exact.log_prior), abs=1e-12)
        assert set(exact.scored.rewards) == {"wave", "no zero"}

    def test_a_target_can_be_the_base(self, a, prior_a):
        found = match_moments(a.target, a.prompts, [Moment(twos, 1.5)], scored=prior_a.listed, min_ess=2)
        exact = ex.posterior(a.target * found.evidence, a.prompts)
        assert float(exact.log_posterior.exp() @ of(twos, exact)) == pytest.approx(1.5, abs=1e-12)
        assert found.kl.value == pytest.approx(ex.kl(exact.log_posterior, prior_a.log_posterior), abs=1e-12)

    def test_from_samples_the_standard_errors_are_right(self, two_prompts):
        """Over repeated draws: the error of lambda and of the true moment is what is reported of them."""
        world = two_prompts
        truth = match_moments(world.prior, world.prompts, [Moment(twos, 1.3)], scored=listed(world), min_ess=2)
        exacts = [ex.posterior(world.target, world.prompts, p) for p in range(2)]
        errors, moments, kls = [], [], []
        for seed in range(120):
            found = match_moments(world.prior, world.prompts, [Moment(twos, 1.3)], samples=200, seed=seed)
            (weight,), (mean,) = found.weights, found.achieved
            assert mean.value == pytest.approx(1.3, abs=1e-9)
            errors.append((weight.value - truth.weights[0].value) / weight.stderr)
            tilted = [torch.softmax(e.log_prior + weight.value * of(twos, e), 0) @ of(twos, e) for e in exacts]
            moments.append((float(sum(tilted)) / 2 - 1.3) / mean.stderr)
            kls.append((found.kl.value - truth.kl.value) / found.kl.stderr)
        for z in (torch.tensor(errors), torch.tensor(moments), torch.tensor(kls)):
            assert 0.75 < float(z.std()) < 1.3, "120 repetitions tell the spread to 7%"
            assert abs(float(z.mean())) < 0.5

    def test_two_features_that_say_the_same_share_their_lambda(self, a, prior_a):
        single = match_moments(a.prior, a.prompts, [Moment(twos, 1.5)], scored=prior_a.listed, min_ess=2)
        pair = [
            Moment(twos, 1.5),
            Moment(lambda completion_ids: [10 * v for v in twos(completion_ids)], 15.0, name="ten"),
        ]
        double = match_moments(a.prior, a.prompts, pair, scored=prior_a.listed, min_ess=2)
        first, second = (w.value for w in double.weights)
        assert first + 10 * second == pytest.approx(single.weights[0].value, abs=1e-9)


class TestImpossibleMoments:
    def test_a_mean_outside_the_range_is_named_with_the_range(self, a):
        with pytest.raises(
            tl.InputError, match=r"moment 'twos' asks for mean 7, but .* 2[05]\d draws .* between 0 and [34]"
        ):
            match_moments(a.prior, a.prompts, [Moment(wave, 0.1), Moment(twos, 7.0)])

    def test_a_mean_outside_its_bounds(self):
        with pytest.raises(tl.InputError, match=r"moment 'twos' asks for mean 5, outside its bounds \(0, 4\)"):
            Moment(twos, 5, bounds=(0, 4))

    def test_the_end_of_the_range_is_outside(self, a, prior_a):
        with pytest.raises(tl.InputError, match="moment 'twos' asks for mean 4, .* both excluded"):
            match_moments(a.prior, a.prompts, [Moment(twos, 4.0)], scored=prior_a.listed)

    def test_never_is_a_constraint_on_the_opposite(self, a):
        with pytest.raises(tl.InputError, match="never hold is a Constraint on its opposite"):
            match_moments(a.prior, a.prompts, [Moment(no_zero, 0.0)])

    def test_moments_that_contradict_each_other(self, a, prior_a):
        def threes(completion_ids):  # moves against twos
            return [4 - v for v in twos(completion_ids)]

        with pytest.raises(tl.InputError, match="moments 'twos', 'threes' contradict each other"):
            match_moments(
                a.prior, a.prompts, [Moment(twos, 2.0), Moment(threes, 3.0)], scored=prior_a.listed, min_ess=2
            )

    def test_no_draw_satisfies(self, a):
        def never(completion_ids):
            return [ids == [2, 2, 2, 2] for ids in completion_ids]

        moments = [Moment(never, 1.0), Moment(no_zero, 1.0)]
        with pytest.raises(tl.InputError, match=r"'never' asks for mean 1, .* between 0 and 0"):
            match_moments(a.prior, a.prompts, moments, samples=4)

    def test_a_prompt_without_a_satisfying_draw_is_counted(self, two_prompts):
        def first_prompt(prompts):
            return [p == "0" for p in prompts]

        with pytest.raises(tl.InputError, match="1 of 2 prompts have no draw that satisfies 'first_prompt'"):
            match_moments(two_prompts.prior, two_prompts.prompts, [Moment(first_prompt, 1.0)], samples=64)

    def test_lambda_stops_where_the_draws_do(self, a):
        with pytest.raises(
            tl.InputError, match=r"'twos' asks for mean 2.7, but it is 2\.\d+ .*ESS 32.* min_ess 32\); draw more"
        ):
            match_moments(a.prior, a.prompts, [Moment(twos, 2.7)], samples=128)

    def test_too_few_draws_to_begin_with(self, a):
        with pytest.raises(tl.InputError, match="samples gives 16.0 effective draws .* min_ess is 32; draw more"):
            match_moments(a.prior, a.prompts, [Moment(twos, 1.2)], samples=16)

    def test_a_better_proposal_goes_on_where_the_prior_stopped(self, a):
        asked = []

        def improve(target):
            asked.append(target)
            return posterior_policy(Language(target, a.prompts))

        found = match_moments(a.prior, a.prompts, [Moment(twos, 3.3)], samples=256, improve=improve)
        assert asked
        assert found.ess >= 32
        exact = ex.posterior(a.prior * found.evidence, a.prompts)
        truth = float(exact.log_posterior.exp() @ of(twos, exact))
        assert abs(truth - 3.3) < 5 * found.achieved[0].stderr < 0.5

    def test_a_proposal_is_corrected_for(self, a, prior_a):
        proposal = a.prior.policy(lora=None)
        with torch.no_grad():
            proposal.named_parameters()["table"][..., 2] += 0.7
        found = match_moments(a.prior, a.prompts, [Moment(twos, 2.0)], samples=400, proposal=proposal)
        exact = ex.posterior(a.prior * found.evidence, a.prompts)
        truth = float(exact.log_posterior.exp() @ of(twos, exact))
        assert abs(truth - 2.0) < 4 * found.achieved[0].stderr < 0.4

    def test_a_feature_is_called_and_checked_as_a_reward_is(self, a):
        with pytest.raises(tl.InputError, match="moment 'bad' is nan for completion"):
            match_moments(
                a.prior, a.prompts, [Moment(lambda completions: [math.nan] * len(completions), 1, name="bad")]
            )
        with pytest.raises(tl.InputError, match="moments is empty"):
            match_moments(a.prior, a.prompts, [])


class TestPower:
    @pytest.mark.parametrize("alpha", [0.4, 1.0, 3.0])
    @pytest.mark.parametrize("world", [fixture_a(), fixture_b()], ids="AB")
    def test_the_posterior_is_the_power_of_the_prior(self, world, alpha):
        exact = ex.posterior(world.prior * Power(world.prior, alpha), world.prompts)
        assert_close(exact.log_posterior, torch.log_softmax(alpha * exact.log_prior, 0), **TIGHT)

    def test_it_is_not_low_temperature_sampling_of_tokens(self):
        world, alpha = fixture_b(), 3.0
        power = ex.posterior(world.prior * Power(world.prior, alpha), world.prompts)
        cold = replace(world.prior, law=replace(world.prior.law, temperature=1 / alpha))
        assert ex.kl(power.log_prob(cold), power.log_posterior) > 0.05
        with torch.no_grad():
            policy = posterior_policy(Language(world.prior * Power(world.prior, alpha), world.prompts))
        assert ex.kl(power.log_prob(policy), power.log_posterior) < 1e-12

    def test_at_another_temperature(self, a):
        evidence = Power(a.prior, 3.0)
        exact = ex.posterior(a.prior * evidence.at(2.0), a.prompts)
        assert_close(exact.log_posterior, torch.log_softmax(2.0 * exact.log_prior, 0), **TIGHT)
        drawn = a.prior.draw(a.prompts, 5, torch.Generator().manual_seed(0))
        target = a.prior * evidence
        assert_close(target.score(drawn).at(2.0).log_evidence, target.at(2.0).score(drawn).log_evidence)

    def test_the_priors_own_draws_are_not_scored_again(self, a, monkeypatch):
        drawn = a.prior.draw(a.prompts, 6, torch.Generator().manual_seed(0))
        policy_drawn = replace(drawn, sampler="")
        called = []
        monkeypatch.setattr(type(a.prior), "_log_prob", lambda self, draws: called.append(1) or draws.log_q)
        scored = (a.prior * Power(a.prior, 2.0)).score(drawn)
        assert not called
        assert_close(scored.log_evidence, drawn.log_prob)
        (a.prior * Power(a.prior, 2.0)).score(policy_drawn)
        assert called

    def test_what_the_prior_rules_out_has_no_power(self):
        world = fixture_b()  # after 4 tokens only EOS has probability
        draws = world.prior.complete(world.prompts, torch.zeros(2).long(), [[0, 0, 0, 0, 2], [0, 0, 0, 0, 1]])
        for alpha in (0.5, 1.0, 2.0):
            scored = (world.prior * Power(world.prior, alpha)).score(draws)
            assert scored.log_evidence.isinf().tolist() == [False, True]
            assert not scored.log_target.isnan().any()

    def test_bounds(self, a, rng):
        assert Power(a.prior, 2.0).log_bounds == (-math.inf, 0)
        assert Power(a.prior, 1.0).log_bounds == (0, 0)
        assert Power(a.prior, 0.5).log_bounds == (0, math.inf)
        with pytest.raises(tl.InputError, match="rejection needs a reward with bounds"):
            tl.Rejection().sample(a.prior * Power(a.prior, 0.5), a.prompts, rng=rng)
        found = tl.certify(a.prior, a.prior * Power(a.prior, 0.5), a.prompts, samples=16)
        assert found.log_z_upper is None
        assert "no upper bound" in found.notes[0]

    def test_rejection_is_exact_for_it(self, rng):
        world = small_language()
        target = world.prior * Power(world.prior, 2.0)
        exact = ex.posterior(target, world.prompts)
        weighted = tl.Rejection(n=20_000, round=20_000).sample(target, world.prompts, rng=rng).kept()
        rows = [exact.completions.index(tuple(t[m].tolist())) for t, m in _ids(weighted.scored)]
        law = torch.bincount(torch.tensor(rows), minlength=len(exact.completions)) / len(rows)
        assert len(rows) > 2000
        assert float((law - exact.log_posterior.exp()).abs().max()) < 4 * 0.5 / math.sqrt(len(rows))

    def test_alpha_is_positive(self, a):
        with pytest.raises(tl.InputError, match="alpha is -1"):
            Power(a.prior, -1)


def _ids(scored):
    return zip(scored.draws.tokens, scored.draws.mask, strict=True)


class TestConstraint:
    def test_the_posterior_is_the_conditioned_prior(self, a):
        exact = ex.posterior(a.prior * Constraint(no_zero), a.prompts)
        inside = of(no_zero, exact) == 1
        expected = torch.where(inside, exact.log_prior, -torch.inf)
        assert_close(exact.log_posterior, expected - expected.logsumexp(0), **TIGHT)
        assert exact.log_z == pytest.approx(float(exact.log_prior[inside].exp().sum().log()), abs=1e-12)
        for beta in (0.1, 7.0):
            assert_close(
                (a.prior * Constraint(no_zero)).at(beta).score(exact.scored.draws).log_evidence,
                exact.scored.log_evidence,
            )

    def test_a_penalty_is_a_reward(self, a):
        exact = ex.posterior(a.prior * Constraint(no_zero, penalty=2.0), a.prompts)
        outside = 1 - of(no_zero, exact)
        assert_close(exact.scored.log_evidence, -2.0 * outside, **TIGHT)
        half = (a.prior * Constraint(no_zero, penalty=2.0)).at(2.0)
        assert_close(half.score(exact.scored.draws).log_evidence, -outside, **TIGHT)
        assert Constraint(no_zero, penalty=2.0).at(0.5).log_bounds == (-4, 0)
        assert Constraint(no_zero).at(0.5).log_bounds == (-math.inf, 0)

    def test_beside_a_reward_the_temperature_is_the_rewards(self, a):
        target = a.target * Constraint(no_zero)
        assert target.beta == 0.5
        assert target.evidence.log_bounds == (-math.inf, 3.0)
        plain = ex.posterior(a.target.at(0.2), a.prompts)
        both = ex.posterior(target.at(0.2), a.prompts)
        inside = of(no_zero, both) == 1
        expected = torch.where(inside, plain.log_joint, -torch.inf)
        assert_close(both.log_posterior, expected - expected.logsumexp(0), **TIGHT)
        assert_close(target.score(both.scored.draws).at(0.2).log_evidence, both.scored.log_evidence)
        assert (Constraint(no_zero) + Constraint(has_two)).at(0.3).log_bounds == (-math.inf, 0)
        assert (a.target * Constraint(no_zero, penalty=1.0)).beta == 1.0, "a penalty in nats has its own temperature"

    def test_it_is_called_as_a_reward_is(self, a):
        def says(completions, answer, **kwargs):
            assert set(kwargs) == {"prompts", "completion_ids"}
            return [c != a for c, a in zip(completions, answer, strict=True)]

        drawn = a.prior.draw(a.prompts, 4, torch.Generator().manual_seed(0))
        with_column = replace(drawn, prompts=replace(drawn.prompts, columns={"answer": (drawn.texts[0],)}))
        found = Constraint(says).log_likelihood(with_column)
        assert found.log.tolist() == [-math.inf if t == drawn.texts[0] else 0.0 for t in drawn.texts]
        assert found.rewards["says"].tolist() == [float(t != drawn.texts[0]) for t in drawn.texts]
        with pytest.raises(
            tl.InputError, match="constraint 'judge' asks for 'answer', which is not among its arguments"
        ):
            Constraint(lambda completions, answer: answer, name="judge").log_likelihood(drawn)

    @pytest.mark.parametrize(("value", "said"), [(0.5, "0.5"), (None, "None"), ("yes", "'yes'"), (math.nan, "nan")])
    def test_it_says_yes_or_no(self, a, value, said):
        drawn = a.prior.draw(a.prompts, 2, torch.Generator().manual_seed(0))
        fn = lambda completions: [True, value]  # noqa: E731
        with pytest.raises(
            tl.InputError, match=f"constraint 'odd' is {said}, which is neither true nor false, .* mend the con"
        ):
            Constraint(fn, name="odd").log_likelihood(drawn)
        found = Constraint(fn, on_error="drop").log_likelihood(drawn)
        assert found.kept.tolist() == [True, False]
        assert found.log[0] == 0
        assert found.log.isnan()[1]

    def test_it_cannot_be_subtracted(self, a):
        drawn = a.prior.draw(a.prompts, 16, torch.Generator().manual_seed(0))
        for evidence in (-Constraint(no_zero), a.target.evidence - Constraint(no_zero), 0 * Constraint(no_zero)):
            with pytest.raises(tl.InputError, match="cannot be multiplied by .* give the opposite one"):
                evidence.log_likelihood(drawn)
        tripled = (3 * Constraint(no_zero)).log_likelihood(drawn).log
        assert_close(tripled, Constraint(no_zero).log_likelihood(drawn).log)
        with pytest.raises(tl.InputError, match="penalty is -1"):
            Constraint(no_zero, penalty=-1)


@pytest.fixture(scope="module")
def target(a):
    return a.target * Constraint(no_zero)


@pytest.fixture(scope="module")
def exact(a, target):
    return ex.posterior(target, a.prompts)


class TestConstraintWithEngines:
    def test_weights(self):
        log_w = torch.tensor([-math.inf, -math.inf, 0.0, -math.inf, 1.0, 1.0], dtype=torch.float64)
        index = torch.tensor([0, 0, 1, 1, 2, 2])
        assert ess(log_w, index, 3).tolist() == pytest.approx([0, 1, 2])
        assert normalise(log_w, index, 3).tolist() == pytest.approx([0, 0, 1, 0, 0.5, 0.5])
        assert (resample(log_w, index, 3, 2, torch.Generator().manual_seed(0))[0] == -1).all()
        assert [e.value for e in log_mean_weight(log_w, index, 3)] == pytest.approx([-math.inf, -math.log(2), 1.0])
        assert math.isfinite(pareto_k(torch.cat([log_w.repeat(5), torch.linspace(-1, 2, 60)])))

    def test_importance_and_rejection(self, a, target, exact, rng):
        weighted = tl.Importance(n=4000).sample(target, a.prompts, rng=rng)
        assert not weighted.log_w.isnan().any()
        inside = torch.tensor(no_zero([t[m].tolist() for t, m in _ids(weighted.scored)]))
        assert ((weighted.log_w > -torch.inf) == inside).all()
        assert 0 < int(inside.sum()) < len(inside)
        assert weighted.log_z is not None
        assert abs(weighted.log_z[0].value - exact.log_z) < 4 * weighted.log_z[0].stderr
        assert log_accept_bound(target) == 3.0
        accepted = tl.Rejection(n=512).sample(target, a.prompts, rng=rng).kept()
        assert len(accepted.scored) > 5
        assert all(no_zero([t[m].tolist() for t, m in _ids(accepted.scored)]))

    def test_best_of_n_returns_nothing_where_every_draw_is_ruled_out(self, a, target, exact):
        engine = tl.BestOfN(n=3)
        ruled_out = (exact.scored.log_evidence == -torch.inf).nonzero().flatten()
        assert engine.selection(target, exact.scored.select(ruled_out[:3])).sum() == 0
        one_legal = torch.cat([ruled_out[:2], (exact.scored.log_evidence > -torch.inf).nonzero().flatten()[:1]])
        assert engine.selection(target, exact.scored.select(one_legal)).tolist() == [0, 0, 1]

    def test_the_chance_of_each_draw_is_that_of_the_conditioned_posterior(self, a, target, exact):
        listing = exact.scored.select(torch.arange(12))
        for engine in (tl.Importance(n=12), tl.Rejection(n=12)):
            chosen = engine.selection(target, listing)
            assert not chosen.isnan().any()
            assert (chosen[listing.log_evidence == -torch.inf] == 0).all()

    def test_tilt_is_exact_with_impossible_draws(self, a, target, exact):
        betas = torch.tensor([0.5], dtype=torch.float64)
        found = tilt(exact.reward, betas, exact.log_prior.exp())
        p = exact.log_posterior
        assert float(found.log_z) == pytest.approx(exact.log_z, abs=1e-12)
        assert float(found.kl) == pytest.approx(ex.kl(p, exact.log_prior), abs=1e-12)
        assert float(found.reward) == pytest.approx(exact.mean_reward(p), abs=1e-12)
        assert tilt_jackknife(exact.reward, betas).kl_stderr.isfinite().all()

    def test_plan(self, a, target, exact):
        found = tl.plan(target, a.prompts, samples=4000)
        truth = ex.kl(exact.log_posterior, exact.log_prior)
        assert found.chosen is not None
        assert truth in found.chosen.kl
        assert exact.mean_reward(exact.log_posterior) in found.chosen.reward
        assert found.prior_reward.value == -math.inf
        assert "violate a hard constraint" in found.notes[0]
        assert "nan" not in str(found)
        for point in found.frontier:
            assert math.isfinite(point.kl.high)
            assert math.isfinite(point.reward.high)
        assert not any(math.isnan(p.reward) or math.isnan(p.kl) for p in found.best_of_n)
        budgeted = tl.plan(target, a.prompts, scored=found.scored, kl_budget=truth)
        assert budgeted.chosen is not None
        assert budgeted.chosen.beta == pytest.approx(0.5, rel=0.25)
        alone = tl.plan(a.prior * Constraint(no_zero), a.prompts, samples=400)
        share = float(exact.log_prior[of(no_zero, exact) == 1].exp().sum())
        assert alone.chosen is not None
        assert -math.log(share) in alone.chosen.kl

    def test_plan_leaves_out_prompts_without_possible_draws(self, two_prompts):
        def second(prompts):
            return [p == "1" for p in prompts]

        found = tl.plan(two_prompts.target * Constraint(second), two_prompts.prompts, samples=32)
        assert len(found.per_prompt) == 1
        assert any("1 prompts had fewer than two draws inside" in note for note in found.notes)
        with pytest.raises(tl.InputError, match="of 64 prior draws 0 satisfy .* draw more samples, or soften"):
            tl.plan(
                two_prompts.prior * Constraint(lambda prompts: [False] * len(prompts)), two_prompts.prompts, samples=32
            )
        of_four = torch.tensor([-math.inf, 1.0, 1.0, 2.0]).double()
        assert best_of_n(of_four, 2)[0] == pytest.approx(3 / 6 * 2 + 3 / 6 * 1)  # no two of them are impossible
        assert best_of_n(of_four, 1)[0] == -math.inf
        with pytest.raises(tl.InputError, match="n is 5, but the best of n is taken of 4 draws"):
            best_of_n(of_four, 5)
        sample = PriorSample.of(found.scored, found.beta)
        assert sample.left_out == 1

    def test_certificate_of_a_sampler_that_violates(self, a, target, exact):
        found = tl.certify(a.prior, target, a.prompts, samples=400)
        outside = float((found.scored.log_evidence == -torch.inf).double().mean())
        assert 0.2 < outside < 1
        assert found.elbo.value == -math.inf
        assert found.kl_posterior.low == found.kl_posterior.value == found.kl_posterior.high == math.inf
        note = f"The sampler puts {outside:.1%} of its draws where the posterior has none: KL(q||p*) is infinite."
        assert any(line.startswith(note) for line in found.notes)
        assert "nan" not in str(found)
        assert found.log_z_upper is not None
        low, high = found.log_z_lower, found.log_z_upper
        assert low.value - 4 * low.stderr < exact.log_z < high.value + 4 * high.stderr
        assert 0 < low.stderr < 0.5
        plain = json.dumps(found.as_dict()["kl_posterior"])
        assert json.loads(plain)["low"] is None

    def test_certificate_of_a_sampler_that_only_violates(self, a, target):
        policy = a.prior.policy(lora=None)
        with torch.no_grad():
            policy.named_parameters()["table"][..., 0] += 50.0
        found = tl.certify(policy, target, a.prompts, samples=16, exact_budget=0)
        assert found.kl_posterior.low == math.inf
        assert found.per_prompt[0].bounds.interval.low == math.inf
        assert found.log_z_lower.value == -math.inf
        assert found.ess == 0
        assert "puts 100.0% of its draws" in str(found)

    def test_certificate_of_the_posterior(self, a, target):
        found = tl.certify(posterior_policy(Language(target, a.prompts)), target, a.prompts, samples=32)
        assert found.kl_posterior.high < 1e-9
        assert not any("posterior has none" in note for note in found.notes)

    def test_one_violating_prompt_is_enough(self):
        log_w = torch.tensor([0.2, -math.inf, 0.1], dtype=torch.float64)
        bounds = prompt_bounds(log_w, torch.tensor([0.3, 0.1], dtype=torch.float64), None)
        assert bounds.high is not None
        assert bounds.low.value == bounds.high.value == math.inf
        assert bounds.log_z_low.value == pytest.approx(math.log((math.exp(0.2) + math.exp(0.1)) / 3))
        assert bounds.log_z_high is not None
        assert math.isfinite(bounds.log_z_high.value)
        assert bounds.interval.low == bounds.interval.high == math.inf

    def test_training_asks_for_a_penalty(self, a, target):
        with pytest.raises(tl.InputError, match=r"needs finite evidence, and \d+% .* Constraint\(fn, penalty=5.0\)"):
            tl.fit(target, a.prompts, engine=tl.RLOO(group=16), lora=None, steps=2)
        soft = a.target * Constraint(no_zero, penalty=5.0)
        policy = tl.fit(soft, a.prompts, engine=tl.RLOO(group=64), lora=None, steps=20, lr=0.3, warmup=0)
        exact = ex.posterior(soft, a.prompts)
        before, after = (ex.kl(exact.log_prob(q), exact.log_posterior) for q in (a.prior, policy))
        assert after < before / 2

    def test_training_on_samples_that_satisfy_it_needs_no_penalty(self, a, target):
        """A loss that leaves impossible completions out has a gradient, and fit does not stand in its way."""

        class Filtered(tl.RLOO):
            def loss(self, forward, scored, state=None):
                possible = scored.log_evidence > -torch.inf
                return -torch.where(possible, forward.log_q.sum(-1), 0.0).sum(), {}

        tl.fit(target, a.prompts, engine=Filtered(group=16), lora=None, steps=1)


class TestBestOfNReward:
    @pytest.mark.parametrize("n", [2, 3, 8])
    def test_with_the_exact_law_the_posterior_is_best_of_n(self, a, prior_a, n):
        law = RewardLaw.of(a.target.evidence, prior_a.listed, own=0)
        exact = ex.posterior(a.prior * BestOfNReward(law, n), a.prompts)
        assert len(set(prior_a.reward.round(decimals=9).tolist())) == 30, "ties on purpose"
        assert_close(exact.log_posterior, ex.best_of_n_law(prior_a, n).log(), **TIGHT)
        assert exact.log_z == pytest.approx(0, abs=1e-12)
        low, high = BestOfNReward(law, n).log_bounds
        assert low == -math.inf
        assert float(exact.scored.log_evidence.max()) <= high == pytest.approx(math.log(n))
        without_sum = torch.log_softmax(exact.log_prior + (n - 1) * law.judge(exact.scored.draws)[0].log(), 0)
        assert ex.kl(without_sum, exact.log_posterior) > 1e-4, "log F alone is not best-of-n"

    def test_best_of_n_of_one_prompt_is_not_anothers(self, two_prompts):
        world = two_prompts
        law = RewardLaw.of(world.target.evidence, listed(world), own=0)
        for p in range(2):
            plain = ex.posterior(world.target, world.prompts, p)
            exact = ex.posterior(world.prior * BestOfNReward(law, 4), world.prompts, p)
            assert_close(exact.log_posterior, ex.best_of_n_law(plain, 4).log(), **TIGHT)

    def test_a_hard_constraint_is_the_lowest_rank(self, a, target, exact):
        law = RewardLaw.of(target.evidence, exact.listed, own=0)
        found = ex.posterior(a.prior * BestOfNReward(law, 3), a.prompts)
        expected = ex.best_of_n_law(exact, 3)
        assert float(expected.sum()) == pytest.approx(1, abs=1e-12)
        assert_close(found.log_posterior, expected.log(), **TIGHT)

    def test_only_the_order_of_rewards_counts(self, a, prior_a):
        fn = a.target.evidence.fn
        bent = Reward(lambda completion_ids: [math.exp(3 * r) for r in fn(completion_ids)], beta=2.0)
        laws = [reward_law(a.prior, r, a.prompts, samples=50) for r in (a.target.evidence, bent)]
        draws = prior_a.scored.draws
        for make in (lambda law: BestOfNReward(law, 4), lambda law: WinRate(law, beta=0.2)):
            one, other = (make(law).log_likelihood(draws).log for law in laws)
            assert_close(one, other, **TIGHT)

    def test_from_m_draws_the_bias_is_as_stated(self, a, prior_a):
        """F is biased by (1 - F) / (M + 1) and F_- by -F_- / (M + 1); the posterior comes nearer as M grows."""
        reward, draws = a.target.evidence, prior_a.scored.draws
        exact_law = RewardLaw.of(reward, prior_a.listed, own=0)
        upto, less, _ = exact_law.judge(draws)
        truth = ex.best_of_n_law(prior_a, 4).log()
        drawn = a.prior.draw(a.prompts, 400 * 20, torch.Generator().manual_seed(3))
        scored = a.target.score(drawn)
        found = [
            RewardLaw.of(reward, scored.select(torch.arange(20 * i, 20 * (i + 1)))).judge(draws) for i in range(400)
        ]
        for part, bias, exact in ((0, (1 - upto) / 21, upto), (1, -less / 21, less)):
            values = torch.stack([f[part] for f in found])
            z = (values.mean(0) - exact - bias) / (values.std(0) / 20).clamp(min=1e-9)
            assert float(z.abs().max()) < 4.5
            wrong = (values.mean(0) - exact) / (values.std(0) / 20).clamp(min=1e-9)
            assert float(wrong.abs().max()) > 6, "without the stated bias the figures do not fit"
        gaps = []
        for m in (30, 300, 3000):
            law = RewardLaw.of(reward, scored.select(torch.arange(m)))
            exact = ex.posterior(a.prior * BestOfNReward(law, 4), a.prompts)
            assert exact.scored.log_evidence.isfinite().all(), "no completion is impossible, however bad"
            low, high = BestOfNReward(law, 4).log_bounds
            assert low <= float(exact.scored.log_evidence.min())
            assert float(exact.scored.log_evidence.max()) <= high
            gaps.append(ex.kl(exact.log_posterior, truth))
        assert gaps[0] > gaps[1] > gaps[2]
        assert gaps[2] < 1e-3

    def test_draws_of_another_law_are_weighted(self, a, prior_a):
        proposal = a.prior.policy(lora=None)
        with torch.no_grad():
            proposal.named_parameters()["table"][..., 2] += 0.7
        scored = a.target.score(proposal.draw(a.prompts, 6000, torch.Generator().manual_seed(0)))
        draws = prior_a.scored.draws
        upto, _, _ = RewardLaw.of(a.target.evidence, scored).judge(draws)
        truth, _, _ = RewardLaw.of(a.target.evidence, prior_a.listed, own=0).judge(draws)
        assert float((upto - truth).abs().max()) < 0.04
        unweighted = replace(scored, log_prior=scored.draws.log_q)
        biased, _, _ = RewardLaw.of(a.target.evidence, unweighted).judge(draws)
        assert float((biased - truth).abs().max()) > 0.04

    def test_it_trains_and_composes(self, a, prior_a):
        law = RewardLaw.of(a.target.evidence, prior_a.listed, own=0)
        target = a.prior * BestOfNReward(law, 4)
        policy = tl.fit(target, a.prompts, engine=tl.RLOO(group=64), lora=None, steps=20, lr=0.3, warmup=0)
        exact = ex.posterior(target, a.prompts)
        assert ex.kl(exact.log_prob(policy), exact.log_posterior) < ex.kl(exact.log_prior, exact.log_posterior) / 2
        assert target.beta == 1 / 3
        hot = ex.posterior(target.at(1.0), a.prompts)
        assert_close(hot.scored.log_evidence, exact.scored.log_evidence / 3, **TIGHT)
        assert set(exact.scored.rewards) == {"best_of_4", "tabular_reward"}
        assert log_accept_bound(target * Constraint(no_zero)) == pytest.approx(math.log(4))

    def test_bad_input(self, a, two_prompts):
        law = reward_law(two_prompts.prior, two_prompts.target.evidence, two_prompts.prompts.select([0]), samples=8)
        drawn = two_prompts.prior.draw(two_prompts.prompts, 2, torch.Generator().manual_seed(0))
        with pytest.raises(tl.InputError, match="the reward law has no draws of prompt '1'"):
            WinRate(law).log_likelihood(drawn)
        with pytest.raises(tl.InputError, match="n is 1; the best of fewer than 2 draws is the prior"):
            BestOfNReward(law, 1)
        with pytest.raises(tl.InputError, match="samples is 0"):
            reward_law(a.prior, a.target.evidence, a.prompts, samples=0)

    def test_worse_than_every_completion_is_impossible_and_not_nan(self):
        nothing, half = torch.zeros(1).double(), torch.full((1,), 0.5).double()
        assert best_of_n_reward(nothing, nothing, 3).item() == -math.inf
        assert best_of_n_reward(half, half, 3).item() == pytest.approx(math.log(0.5) + math.log(3) / 2)

    def test_prompts_with_other_columns_are_other_prompts(self, a):
        def right(completion_ids, answer):
            return [float(answer_ in ids) for ids, answer_ in zip(completion_ids, answer, strict=True)]

        prompts = replace(a.prompts.select([0, 0]), columns={"answer": (0, 2)})
        law = reward_law(a.prior, Reward(right), prompts, samples=40)
        assert len(law.steps) == 2


class TestWinRate:
    def test_the_posterior_tilts_by_the_mean_rank(self, a, prior_a):
        law = RewardLaw.of(a.target.evidence, prior_a.listed, own=0)
        exact = ex.posterior(a.prior * WinRate(law, beta=0.25), a.prompts)
        p, r = prior_a.log_prior.exp(), prior_a.reward
        beats = (r[:, None] > r[None, :] + 1e-9).double() + 0.5 * ((r[:, None] - r[None, :]).abs() <= 1e-9).double()
        assert_close(exact.reward, beats @ p, rtol=1e-10, atol=1e-10)
        assert float(p @ exact.reward) == pytest.approx(0.5, abs=1e-12), (
            "the prior wins half of the time against itself"
        )
        assert WinRate(law, beta=0.25).at(0.5).log_bounds == (0, 2)

    def test_the_closed_forms_of_the_docstring(self):
        """Many equally likely completions with distinct rewards are nearly the continuous case."""
        world = language(lambda p, h: [0.0] * 9, lambda x: x[0] * 81 + x[1] * 9 + x[2], beta=1, vocab_size=9, depth=3)
        plain = ex.posterior(world.target, world.prompts)
        law = RewardLaw.of(world.target.evidence, plain.listed, own=0)
        c = 4.0
        exact = ex.posterior(world.prior * WinRate(law, beta=1 / c), world.prompts)
        peak = ((c - 1) * math.exp(c) + 1) / math.expm1(c)
        assert ex.kl(exact.log_posterior, exact.log_prior) == pytest.approx(
            peak - math.log(math.expm1(c) / c), abs=1e-4
        )
        assert exact.mean_reward(exact.log_posterior) == pytest.approx(peak / c, abs=1e-4)


class TestProducts:
    def test_each_reward_keeps_its_own_temperature(self, a):
        target = a.prior * Reward(twos, beta=0.7, bounds=(0, 4)) * Reward(wave, beta=0.2, bounds=(-1, 1))
        exact = ex.posterior(target, a.prompts)
        joint = exact.log_prior + of(twos, exact) / 0.7 + of(wave, exact) / 0.2
        assert_close(exact.log_posterior, joint - joint.logsumexp(0), **TIGHT)
        assert target.evidence.log_bounds == pytest.approx((-5, 4 / 0.7 + 5))
        assert {name: v.tolist() for name, v in exact.scored.rewards.items()} == {
            "twos": of(twos, exact).tolist(),
            "wave": of(wave, exact).tolist(),
        }

    def test_at_divides_the_whole_where_temperatures_differ(self, a):
        target = a.prior * Reward(twos, beta=0.7, bounds=(0, 4)) * Reward(wave, beta=0.2, bounds=(-1, 1))
        assert target.beta == 1.0
        exact = ex.posterior(target.at(2.0), a.prompts)
        joint = exact.log_prior + (of(twos, exact) / 0.7 + of(wave, exact) / 0.2) / 2
        assert_close(exact.log_posterior, joint - joint.logsumexp(0), **TIGHT)
        assert target.at(2.0).evidence.log_bounds == pytest.approx((-2.5, 2 / 0.7 + 2.5))
        assert_close(target.score(exact.scored.draws).at(2.0).log_evidence, exact.scored.log_evidence)

    def test_a_third_reward_joins_whatever_its_temperature(self, a):
        """A sum whose terms differ is in nats at 1; a third term at 1 must not be taken for sharing its terms' temperature."""
        pair = a.prior * Reward(twos, beta=0.7) * Reward(wave, beta=0.2)
        for beta in (1.0, 0.7, 0.2):
            target = pair * Reward(no_zero, beta=beta)
            for moved in (1.0, 3.0):
                exact = ex.posterior(target if moved == 1 else target.at(moved), a.prompts)
                whole = of(twos, exact) / 0.7 + of(wave, exact) / 0.2 + of(no_zero, exact) / beta
                joint = exact.log_prior + whole / moved
                assert_close(exact.log_posterior, joint - joint.logsumexp(0), **TIGHT)

    def test_the_same_reward_twice_is_half_the_temperature(self, a):
        reward = a.target.evidence
        twice = ex.posterior(a.prior * reward * reward, a.prompts)
        half = ex.posterior(a.prior * replace(reward, beta=0.25), a.prompts)
        assert_close(twice.log_posterior, half.log_posterior, **TIGHT)
        assert set(twice.scored.rewards) == {"tabular_reward", "tabular_reward'"}
