"""Bidirectional SMC: bounds of log Z from both sides, and certificates that use them."""

import math
from dataclasses import replace

import pytest
import torch

import tiltlm as tl
from tiltlm.diagnostics.evidence_bounds import log_z_bounds
from tiltlm.inference.decoding.smc import SMC
from tiltlm.posterior import exact as ex
from tiltlm.records import Scored
from tiltlm.testing import fixture_a, fixture_b, language, posterior_policy
from tiltlm.testing.fixtures import sine_logit
from tiltlm.testing.particles import TableTwist, rough_twist, table_twist

RUNS = 600


@pytest.fixture(scope="module")
def world():
    return fixture_b()


@pytest.fixture(scope="module")
def exact(world):
    return ex.posterior(world.target, world.prompts)


def samples_of(exact, count, rng):
    """Exact posterior samples, by enumeration."""
    rows = torch.multinomial(exact.log_posterior.exp(), count, replacement=True, generator=rng)
    scored = exact.scored.select(rows)
    return replace(scored, draws=replace(scored.draws, sampler=""))


def soft_values(exact):
    return {prefix: value / exact.beta for prefix, value in exact.soft_values().items()}


@pytest.mark.parametrize("twisted", [True, False], ids=["twisted", "IWAE"])
def test_the_bounds_bracket_log_z_and_no_wider_than_they_say(world, exact, rng, twisted):
    engine = SMC(particles=4, twist=rough_twist(exact) if twisted else None, repeats=RUNS, rows=10_000)
    found = log_z_bounds(world.target, world.prompts, engine, samples_of(exact, RUNS, rng), rng)
    (lower,), (upper,) = found.lower, found.upper
    assert (lower.kind, upper.kind) == ("lower", "upper")
    assert lower.n == upper.n == 4 * RUNS
    assert lower.value + 3 * lower.stderr < exact.log_z < upper.value - 3 * upper.stderr
    assert upper.value - lower.value < 1.0


def test_without_resampling_they_are_the_two_sides_of_iwae(rng):
    """Two draws of the prior on fixture A: .749584 and 1.787207, as `test_certificate` enumerates."""
    world = fixture_a()
    exact = ex.posterior(world.target, world.prompts)
    engine = SMC(particles=2, repeats=3000, rows=10_000)
    found = log_z_bounds(world.target, world.prompts, engine, samples_of(exact, 3000, rng), rng)
    (lower,), (upper,) = found.lower, found.upper
    assert abs(lower.value - 0.749584) < 4 * lower.stderr < 0.1
    assert abs(upper.value - 1.787207) < 4 * upper.stderr < 0.1


def test_samples_that_are_not_of_the_posterior_give_no_upper_bound(world, exact, rng):
    """The prior's in their place: what calls itself an upper bound lies below log Z."""
    engine = SMC(particles=2, repeats=RUNS, rows=10_000)
    prior = world.target.score(world.prior.draw(world.prompts, RUNS, rng))
    (upper,) = log_z_bounds(world.target, world.prompts, engine, prior, rng).upper
    assert upper.value + 3 * upper.stderr < exact.log_z


def test_with_the_optimum_both_sides_meet(world, exact, rng):
    engine = SMC(particles=4, twist=TableTwist(soft_values(exact)), repeats=3)
    proposal = posterior_policy(world)
    found = log_z_bounds(world.target, world.prompts, engine, samples_of(exact, 3, rng), rng, proposal=proposal)
    for estimate in (*found.lower, *found.upper):
        assert estimate.value == pytest.approx(exact.log_z, abs=1e-9)
        assert estimate.stderr < 1e-9


def test_prompts_without_exact_samples_have_no_upper_bound(rng):
    world = language(
        lambda p, h: [sine_logit(h, a, shift=p[0]) for a in range(3)],
        lambda x: math.cos(sum(i * t for i, t in enumerate(x, 1))),
        beta=0.5,
        prompts=["0", "1", "2"],
        bounds=(-1.0, 1.0),
    )
    exacts = [ex.posterior(world.target, world.prompts, p) for p in range(3)]
    some = [samples_of(e, count, rng) for e, count in zip(exacts, (4, 1), strict=False)]
    engine = SMC(particles=8, repeats=4)
    found = log_z_bounds(world.target, world.prompts, engine, Scored.concatenate(some), rng)
    assert found.upper[2] is None
    single = found.upper[1]
    assert single is not None
    assert single.stderr > found.upper[0].stderr, "of one sample, by the spread of the others'"
    alone = log_z_bounds(world.target, world.prompts, engine, some[1], rng)
    assert alone.upper == (None, None, None), "one sample in all has no error to go by"
    nothing = log_z_bounds(world.target, world.prompts, engine, None, rng)
    assert nothing.upper == (None, None, None)


def test_certify_takes_the_engines_bounds(world, exact, rng):
    """The interval of KL(q || p*) holds the truth; log Z is bounded more closely than by the sampler's own draws."""
    truth = ex.kl(exact.log_prior, exact.log_posterior)
    engine = SMC(particles=16, twist=table_twist(soft_values(exact)), repeats=6)
    repetitions, inside, widths, of_log_z = 10, 0, [0.0, 0.0], [0.0, 0.0]
    for seed in range(repetitions):
        prior_draws = world.target.score(world.prior.draw(world.prompts, 48, torch.Generator().manual_seed(seed)))
        for number, given in enumerate((None, engine)):
            found = tl.certify(
                world.prior, world.target, world.prompts, samples=64, prior_draws=prior_draws, engine=given, seed=seed
            )
            assert found.log_z_upper is not None
            widths[number] += found.kl_posterior.width / repetitions
            low, high = found.log_z_lower, found.log_z_upper
            of_log_z[number] += (high.value + 1.96 * high.stderr - low.value + 1.96 * low.stderr) / repetitions
            inside += number == 1 and truth in found.kl_posterior
    print(
        f"KL(q||p*) width {widths[0]:.3f} by its draws, {widths[1]:.3f} by SMC; log Z {of_log_z[0]:.3f}, {of_log_z[1]:.3f}"
    )
    assert inside >= 0.95 * repetitions - 3 * math.sqrt(repetitions * 0.05 * 0.95)
    assert of_log_z[1] < of_log_z[0]


def test_few_runs_of_an_engine_widen_the_interval(world, exact):
    """One prompt, as few runs as there may be: Student's quantile, not the normal one, for which 75% would cover."""
    truth, repetitions = ex.kl(exact.log_prior, exact.log_posterior), 40
    engine = SMC(particles=16, twist=table_twist(soft_values(exact)), rows=4096)
    covered = torch.zeros(2)
    for seed in range(repetitions):
        found = tl.certify(
            world.prior, world.target, world.prompts, samples=256, exact_budget=64, engine=engine, seed=seed
        )
        low, high = found.log_z_lower, found.log_z_upper
        assert high is not None
        covered[0] += truth in found.kl_posterior
        covered[1] += low.value - low.margin <= exact.log_z <= high.value + high.margin
    assert (covered >= 0.95 * repetitions - 3 * math.sqrt(repetitions * 0.05 * 0.95)).all()


def test_certify_without_bounds_on_the_reward_still_has_the_engines_lower_side(world, rng):
    unbounded = replace(world.target, evidence=replace(world.target.evidence, bounds=None))
    found = tl.certify(world.prior, unbounded, world.prompts, samples=32, engine=SMC(particles=8))
    assert found.log_z_upper is None
    assert found.kl_posterior.high == math.inf
    assert found.log_z_lower.n == 4 * 8
