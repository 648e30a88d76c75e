"""`plan` against exact frontiers: its intervals cover at their nominal rate."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import tiltlm as tl
from tiltlm.diagnostics.frontier import PriorSample, best_of_n
from tiltlm.diagnostics.predictions import clipped
from tiltlm.diagnostics.tilt import tilt, tilt_jackknife
from tiltlm.estimates import Interval
from tiltlm.posterior import exact as ex
from tiltlm.testing import fixture_a, language
from tiltlm.testing.fixtures import sine_logit

REPETITIONS = 300
PROMPTS = 12
SAMPLES = 64
BETAS = (0.35, 0.5, 1.0)


def population(beta=0.5):
    """27 prompts with their own languages; a job is 12 of them, drawn with replacement."""
    digits = range(3)
    return language(
        lambda p, h: [sine_logit(h, a, shift=p[0] + 3 * p[1] + 7 * p[2]) for a in range(3)],
        lambda x: math.cos(sum(i * t for i, t in enumerate(x, 1))) + 0.5 * (x[-1] == 2),
        beta=beta,
        bounds=(-1.0, 1.5),
        prompts=[f"{a} {b} {c}" for a in digits for b in digits for c in digits],
        prompt_length=3,
    )


def exact_point(exact, beta):
    log_p = (exact.log_prior + exact.reward / beta).log_softmax(-1)
    return exact.mean_reward(log_p), ex.kl(log_p, exact.log_prior)


@pytest.fixture(scope="module")
def world():
    return population()


@pytest.fixture(scope="module")
def exacts(world):
    return [ex.posterior(world.target, world.prompts, p) for p in range(len(world.prompts))]


def test_intervals_cover_the_exact_frontier(world, exacts, record_property):
    truth = {b: torch.tensor([exact_point(e, b) for e in exacts]).mean(0).tolist() for b in BETAS}
    rng = torch.Generator().manual_seed(1)
    hits = {(b, kind): 0 for b in BETAS for kind in ("reward", "kl")}
    for _ in range(REPETITIONS):
        prompts = world.prompts.select(torch.randint(len(exacts), (PROMPTS,), generator=rng).tolist())
        scored = world.target.score(world.prior.draw(prompts, SAMPLES, rng))
        sample = PriorSample.of(scored, world.target.beta)
        for point in sample.points(torch.tensor(BETAS, dtype=torch.float64)):
            beta = min(BETAS, key=lambda b: abs(b - point.beta))
            hits[beta, "reward"] += truth[beta][0] in point.reward
            hits[beta, "kl"] += truth[beta][1] in point.kl
    coverage = {key: count / REPETITIONS for key, count in hits.items()}
    for (beta, kind), share in coverage.items():
        print(f"coverage of the 95% interval of {kind} at beta {beta:g}: {share:.1%}")
        record_property(f"coverage_plan, {kind} at beta {beta:g}", share)
    assert all(0.915 <= share <= 0.985 for share in coverage.values()), coverage


def test_one_prompts_own_intervals_cover(exacts, world, record_property):
    """The intervals of one prompt hold the noise of its own 64 draws."""
    exact, rng = exacts[5], torch.Generator().manual_seed(2)
    reward, kl = exact_point(exact, 0.7)
    hits = [0, 0]
    for _ in range(REPETITIONS):
        scored = world.target.score(world.prior.draw(world.prompts.select([5]), SAMPLES, rng))
        row = tl.plan(world.target, scored.draws.prompts, scored=scored, beta=0.7).per_prompt[0]
        hits[0] += reward in row.reward
        hits[1] += kl in row.kl
    print(f"coverage for a single prompt: reward {hits[0] / REPETITIONS:.1%}, KL {hits[1] / REPETITIONS:.1%}")
    for name, hit in zip(("reward", "kl"), hits, strict=True):
        record_property(f"coverage_plan, {name} of a single prompt", hit / REPETITIONS)
    assert all(0.915 <= hit / REPETITIONS <= 0.985 for hit in hits)


def test_tilting_reproduces_the_exact_frontier_from_the_whole_language():
    """With every string as a draw in proportion to its probability, the tilt is the enumeration."""
    world = fixture_a()
    exact = ex.posterior(world.target, world.prompts)
    betas = torch.tensor([0.3, 0.5, 2.0], dtype=torch.float64)
    got = tilt(exact.reward, betas, exact.log_prior.exp())
    for g, beta in enumerate(betas.tolist()):
        reward, kl = exact_point(exact, beta)
        assert float(got.reward[g]) == pytest.approx(reward)
        assert float(got.kl[g]) == pytest.approx(kl)


def test_the_jackknife_takes_out_most_of_the_bias(exacts):
    exact, rng = exacts[0], torch.Generator().manual_seed(3)
    beta = torch.tensor([0.3], dtype=torch.float64)
    _, truth = exact_point(exact, 0.3)
    rows = torch.multinomial(exact.log_prior.exp(), 32 * 3000, True, generator=rng).view(3000, 32)
    plain = torch.stack([tilt(exact.reward[r], beta).kl for r in rows]).mean() - truth
    jackknifed = torch.stack([tilt_jackknife(exact.reward[r], beta).kl for r in rows]).mean() - truth
    assert abs(jackknifed) < 0.4 * abs(plain)


def test_each_draw_is_left_out_also_where_one_has_all_the_weight():
    """At the smallest beta the success has e^-1000 of a chance: relative to it the others' weights are 0, among themselves equal."""
    reward = torch.zeros(64, dtype=torch.float64)
    reward[7] = 1.0
    for beta in (1.0, 0.01, 0.001):
        at = torch.tensor([beta], dtype=torch.float64)
        found = tilt_jackknife(reward, at)
        without = [tilt(torch.cat([reward[:i], reward[i + 1 :]]), at) for i in range(64)]
        for field in ("reward", "kl"):
            rows = torch.cat([getattr(w, field) for w in without])
            full = getattr(tilt(reward, at), field)
            assert_close(getattr(found, field), 64 * full - 63 * rows.mean(), rtol=1e-9, atol=1e-12)
            assert_close(
                getattr(found, f"{field}_stderr"),
                (63 / 64 * (rows - rows.mean()).square().sum()).sqrt()[None],
                rtol=1e-9,
                atol=1e-12,
            )


def rare_success(successes, draws=1024):
    """A reward of 1 for one token in a thousand, and draws of which so many have it."""
    world = language(
        lambda p, h: [math.log(0.4985), math.log(0.4985), math.log(0.003)],
        lambda x: float(x[0] == 2),
        beta=0.1,
        bounds=(0.0, 1.0),
        depth=1,
    )
    scored = world.target.score(world.prior.draw(world.prompts, draws, torch.Generator().manual_seed(0)))
    hit = torch.arange(draws) < successes
    return world, replace(scored, log_evidence=torch.where(hit, 1 / world.target.beta, 0.0).double())


def test_a_budget_is_met_where_one_draw_of_a_thousand_succeeds():
    world, scored = rare_success(1)
    plan = tl.plan(world.target, world.prompts, scored=scored, kl_budget=1.0)
    assert plan.chosen.kl.value == pytest.approx(1.0, abs=0.2)
    assert 1.0 in plan.chosen.kl
    low = tl.plan(world.target, world.prompts, scored=scored, beta=0.001)
    assert "nan" not in str(low)
    assert low.chosen.kl.value > 5
    assert math.log(1 / 0.003) in low.chosen.kl
    assert not low.chosen.reliable


def test_a_budget_is_found_where_the_correction_falls_again(monkeypatch, world):
    """The largest beta that meets it, though the curve ends below."""
    scored = world.target.score(world.prior.draw(world.prompts, 16, torch.Generator().manual_seed(0)))
    bent = torch.cat([torch.linspace(0, 3, 300), torch.linspace(3, 0.5, 100)]).double()[None]
    monkeypatch.setattr(PriorSample, "unbiased", lambda self, betas, field: bent)
    found = tl.plan(world.target, world.prompts, scored=scored, kl_budget=2.0)
    spread = PriorSample.of(scored, world.target.beta).spread
    betas = torch.logspace(math.log10(spread * 1e3), math.log10(spread / 30), 400, dtype=torch.float64)
    assert found.chosen.beta == pytest.approx(float(betas[200]), rel=0.05)
    with pytest.raises(tl.InputError, match="goes from 0 to 3 nats"):
        tl.plan(world.target, world.prompts, scored=scored, kl_budget=3.5)


def test_a_kl_that_is_not_known_is_not_shown_as_none():
    unknown = clipped(Interval(math.nan, math.nan, math.nan), 0.0)
    assert all(math.isnan(end) for end in (unknown.value, unknown.low, unknown.high))
    assert clipped(Interval(-0.2, -0.3, -0.1), 0.0) == Interval(0.0, 0.0, 0.0)
    assert clipped(Interval(0.1, -0.3, math.inf), 0.0) == Interval(0.1, 0.0, math.inf)


def test_a_prediction_needs_two_draws_a_prompt(world):
    for samples in (1, 0):
        with pytest.raises(tl.InputError, match=f"samples is {samples}; .* so draw at least 2"):
            tl.plan(world.target, world.prompts, samples=samples)
    scored = world.target.score(world.prior.draw(world.prompts, 3, torch.Generator().manual_seed(0)))
    single = scored.select((scored.draws.prompt_index != 4) | (torch.arange(len(scored)) % 3 == 0))
    found = tl.plan(world.target, world.prompts, scored=single)
    assert len(found.per_prompt) == len(world.prompts) - 1
    assert "1 prompts had fewer than two draws" in found.notes[0]
    with pytest.raises(tl.InputError, match="for no prompt two of them; draw more samples"):
        tl.plan(world.target, world.prompts, scored=scored.select(torch.arange(0, len(scored), 3)))


def test_of_two_draws_the_error_of_the_kl_is_not_known(world):
    """Each one alone is its own posterior, with a KL of 0: they agree, and that says nothing."""
    plan = tl.plan(world.target, world.prompts.select([5]), samples=2)
    assert (plan.chosen.kl.low, plan.chosen.kl.high) == (0.0, math.inf)
    assert plan.chosen.kl.value > 0
    assert math.isfinite(plan.chosen.reward.high)


def test_a_verifiable_reward_has_no_tail_to_speak_of():
    """Neither a warning nor a claim: null in JSON, whether there are too few different weights or only one."""
    for successes in (2, 400):
        world, scored = rare_success(successes)
        plan = tl.plan(world.target, world.prompts, scored=scored)
        for point in (plan.chosen, plan.per_prompt[0]):
            assert not point.pareto_k > 0.7
            assert point.as_dict()["pareto_k"] is None


def test_best_of_n_is_unbiased_however_few_draws(exacts):
    """32 draws, the best of 16. By drawing with replacement it was 0.034 short, 16 standard errors."""
    exact, rng = exacts[3], torch.Generator().manual_seed(7)
    rows = torch.multinomial(exact.log_prior.exp(), 32 * 3000, True, generator=rng).view(3000, 32)
    found = torch.tensor([best_of_n(exact.reward[row], 16)[0] for row in rows], dtype=torch.float64)
    truth = float(ex.best_of_n_law(exact, 16) @ exact.reward)
    assert abs(float(found.mean()) - truth) < 4 * float(found.std()) / math.sqrt(3000)


def test_best_of_n_points_agree_with_the_exact_law():
    world = fixture_a()
    exact = ex.posterior(world.target, world.prompts)
    copies = (exact.log_prior.exp() * 2_000_000).round().long()
    rewards = exact.reward.round(decimals=9).repeat_interleave(copies)
    reward, kl = best_of_n(rewards, 4)
    law = ex.best_of_n_law(exact, 4)
    assert reward == pytest.approx(float(law @ exact.reward), abs=1e-4)
    assert kl == pytest.approx(ex.kl(law.log(), exact.log_prior), abs=1e-4)


def test_beta_for_a_budget_and_for_a_goal(world):
    by_kl = tl.plan(world.target, world.prompts, kl_budget=0.5, samples=200)
    assert by_kl.chosen.kl.value == pytest.approx(0.5, abs=0.02)
    by_reward = tl.plan(world.target, world.prompts, reward_goal=0.8, samples=200)
    assert by_reward.chosen.reward.value == pytest.approx(0.8, abs=0.02)
    plain = tl.plan(world.target, world.prompts, samples=32)
    assert plain.chosen.beta == world.target.beta
    at = plain.at(0.5)
    assert at.kl.value == pytest.approx(plain.chosen.kl.value)


def test_out_of_reach_says_what_is_in_reach(world):
    with pytest.raises(tl.InputError, match=r"reward_goal is 7, but with these draws the frontier goes from .* to"):
        tl.plan(world.target, world.prompts, reward_goal=7.0, samples=16)
    with pytest.raises(tl.InputError, match="give one of them"):
        tl.plan(world.target, world.prompts, reward_goal=1.0, kl_budget=1.0)


def test_it_says_what_the_draws_cannot_tell(world):
    plan = tl.plan(world.target, world.prompts, beta=0.1, samples=16)
    assert any("16 samples a prompt cannot say" in note and "draw ~" in note for note in plan.notes)
    assert any("is a guess" in note for note in plan.notes)
    assert not plan.chosen.reliable
    assert plan.frontier[0].reliable
    assert not plan.frontier[-1].reliable


def test_what_is_needed_is_the_same_in_the_table_and_in_words(world):
    """The draws there are say too little of what they cannot tell: their KL is at most log n."""
    plan = tl.plan(world.target, world.prompts, beta=0.1, samples=16)
    (note,) = [note for note in plan.notes if "draw ~" in note]
    assert f"for beta = 0.1 draw ~{plan.chosen.needed}" in note
    assert plan.chosen.needed > 20 * 16, "what 16 draws say of themselves is at most MARGIN * 16"
    (hopeless,) = [
        note for note in tl.plan(world.target, world.prompts, beta=1e-9, samples=16).notes if "would not do" in note
    ]
    assert "for beta = 1e-09 1000000 would not do" in hopeless
    beyond = [point.needed for point in plan.frontier if not point.reliable]
    assert beyond == sorted(beyond)


def test_nothing_is_predicted_beyond_the_bounds():
    """One draw of 64 has the best reward there is, and the jackknife would go on past it."""
    sample = PriorSample(
        (torch.tensor([0.0] * 63 + [1.0], dtype=torch.float64),) * 3, ("a", "b", "c"), bounds=(0.0, 1.0)
    )
    betas = torch.tensor([0.5, 0.3, 0.2, 0.1], dtype=torch.float64)
    free = [point.reward for point in replace(sample, bounds=(-math.inf, math.inf)).points(betas)]
    assert max(reward.value for reward in free) > 1.01
    for point in sample.points(betas):
        assert 0 <= point.reward.low <= point.reward.value <= point.reward.high <= 1


def test_a_plan_knows_its_targets_bounds(world):
    """A reward of 1 that hardly any draw has, at a beta that is not 1: table, goal and prompts keep to the same bounds."""
    rare = world.prior * tl.Reward(
        lambda completion_ids: [float(ids == [0, 1, 2, 0]) for ids in completion_ids], beta=0.5, bounds=(0, 1)
    )
    scored = rare.score(rare.prior.draw(world.prompts, 64, torch.Generator().manual_seed(0)))
    free = PriorSample.of(scored, rare.beta)
    assert float(free.unbiased(torch.logspace(-1, 0, 20, dtype=torch.float64), "reward").max()) > 1
    plan = tl.plan(rare, world.prompts, beta=0.2, scored=scored)
    assert all(point.reward.low >= 0 and point.reward.high <= 1 for point in plan.frontier)
    assert all(prompt.reward.low >= 0 and prompt.reward.high <= 1 for prompt in plan.per_prompt)
    top = max(point.reward.value for point in plan.frontier)
    chosen = tl.plan(rare, world.prompts, reward_goal=0.9 * top, scored=scored).chosen
    assert chosen.reward.value == pytest.approx(0.9 * top, rel=0.1)
    with pytest.raises(tl.InputError, match="reward_goal is 1.1, but with these draws"):
        tl.plan(rare, world.prompts, reward_goal=1.1, scored=scored)


def test_bounds_do_not_bias_the_mean(world):
    """A success that few prompts have in their draws: to clip each prompt's estimate would cost 0.17 of 0.78, and the coverage."""
    rare = world.prior * tl.Reward(
        lambda completion_ids: [float(i[:3] == [0, 1, 2]) for i in completion_ids], beta=0.5, bounds=(0, 1)
    )
    every = [ex.posterior(rare, world.prompts, p) for p in range(len(world.prompts))]
    truth = sum(exact_point(exact, 0.18)[0] for exact in every) / len(every)
    rng, beta, found = torch.Generator().manual_seed(3), torch.tensor([0.18], dtype=torch.float64), []
    for _ in range(60):
        prompts = world.prompts.select(torch.randint(len(every), (PROMPTS,), generator=rng).tolist())
        scored = rare.score(rare.prior.draw(prompts, SAMPLES, rng))
        found += PriorSample.of(scored, rare.beta, rare.evidence.log_bounds).points(beta)
    assert sum(point.reward.value for point in found) / len(found) == pytest.approx(truth, abs=0.11)
    assert sum(truth in point.reward for point in found) >= 0.88 * len(found)


def test_a_mean_at_its_bound_is_not_therefore_known():
    """The value is clipped, and the error is what it was."""
    rewards = tuple(torch.tensor([0.0] * zeros + [1.0], dtype=torch.float64) for zeros in (63, 40, 20))
    sample, beta = PriorSample(rewards, ("a", "b", "c"), bounds=(0.0, 1.0)), torch.tensor([0.18], dtype=torch.float64)
    (point,), (free,) = sample.points(beta), replace(sample, bounds=(-math.inf, math.inf)).points(beta)
    assert free.reward.value > 1
    assert point.reward.value - point.reward.low == pytest.approx(free.reward.value - free.reward.low)
    assert point.reward.value == 1.0


def test_the_kl_of_the_best_draw_is_that_of_one_of_n_however_small_beta():
    """r / beta of 1e30 nats takes all digits with it, if log Z is subtracted from it."""
    reward = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tiny = tilt(reward, torch.tensor([1e-30, 1e-3], dtype=torch.float64))
    assert tiny.kl.tolist() == pytest.approx([math.log(8)] * 2, rel=1e-9)
    left = tilt_jackknife(reward, torch.tensor([1e-30], dtype=torch.float64))
    assert float(left.kl) == pytest.approx(8 * math.log(8) - 7 * math.log(7), rel=1e-9)


def test_a_constant_reward_is_said_to_teach_nothing(world):
    flat = replace(world.target, evidence=tl.Reward(lambda completions: [0.5] * len(completions), beta=0.5))
    plan = tl.plan(flat, world.prompts, samples=8)
    assert any("nothing to learn" in note for note in plan.notes)
    assert plan.chosen.kl.value == pytest.approx(0, abs=1e-9)


def test_a_plan_is_readable_and_goes_to_json(world):
    import json

    plan = tl.plan(world.target, world.prompts, samples=16)
    assert "draws a prompt" in str(plan)
    again = json.loads(json.dumps(plan.as_dict()))
    assert set(again) >= {"prior_reward", "frontier", "best_of_n", "chosen", "per_prompt", "notes"}
    assert again["frontier"][0]["log_z"]["kind"] == "lower"
