"""SMC by enumeration: every token and every ancestor; what goes wrong when something is forgotten; and caches that follow."""

import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.inference.decoding.importance import Importance
from tiltlm.inference.decoding.particles import Particles, Random
from tiltlm.inference.decoding.quasi_rejection import QuasiRejection
from tiltlm.inference.decoding.smc import SMC, multinomial, prefix_evidence, residual, stratified, systematic
from tiltlm.inference.decoding.soft_best_of_n import SoftBestOfN
from tiltlm.inference.decoding.value_guided import ValueGuided
from tiltlm.lm.walk import ModelWalk
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.records import Weighted
from tiltlm.testing import check_engine, fixture_a, fixture_b, posterior_policy, small_language
from tiltlm.testing.decoding import _particle_sampling_check, enumerated_law
from tiltlm.testing.particles import (
    ALWAYS,
    SOMETIMES,
    Every,
    TableTwist,
    ancestor_law,
    another_law,
    particle_checks,
    rough_twist,
    table_twist,
    three_steps,
)

SCHEMES = [multinomial, stratified, systematic, residual]


@pytest.fixture(scope="module")
def world():
    return small_language()


@pytest.fixture(scope="module")
def exact(world):
    return ex.posterior(world.target, world.prompts)


# --- the claim ---


def test_the_claim_is_proved():
    for check in check_engine(SMC()):
        print(check)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [0.0, SOMETIMES, ALWAYS])
def test_z_is_unbiased_for_every_scheme_and_threshold(world, exact, scheme, threshold):
    """Over all runs of two particles: the expected weight of every completion is pi0 exp(r / beta)."""
    engine = SMC(particles=2, twist=rough_twist(exact), resample=scheme, threshold=threshold)
    found = Every(engine, world, exact, another_law(world, exact))
    assert float(found.probability.sum()) == pytest.approx(1, abs=1e-12)
    assert found.gap < 1e-12
    assert float(found.measure.sum()) == pytest.approx(math.exp(exact.log_z), abs=1e-11)
    times = found.run.resampled
    assert bool(times.any()) == (threshold > 0)
    if threshold == SOMETIMES:
        assert not times.all(), "the threshold should spare some populations"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resampling_schemes_are_unbiased(scheme):
    """Every slot's expected number of copies is N w, the uniform numbers integrated exactly."""
    for raw in ([0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.05, 0.05, 0.9], [0.0, 0.6, 0.4]):
        weights = torch.tensor(raw, dtype=torch.float64) / sum(raw)
        law = ancestor_law(scheme, weights)
        copies = torch.zeros(3, dtype=torch.float64)
        for ancestors, probability in law.items():
            copies += probability * torch.bincount(torch.tensor(ancestors), minlength=3).double()
        torch.testing.assert_close(copies, 3 * weights, rtol=0, atol=1e-12)
    rows = scheme(torch.tensor([[0.0, 0.0, 1.0]] * 50).double(), torch.rand(50, 3, dtype=torch.float64) * 0.999999)
    assert (rows == 2).all()


def test_with_the_best_twist_and_proposal_every_run_gives_z(world, exact, rng):
    values = {prefix: value / exact.beta for prefix, value in exact.soft_values().items()}
    engine = SMC(particles=3, twist=TableTwist(values), threshold=ALWAYS, repeats=4)
    weighted = engine.sample(world.target, world.prompts, proposal=posterior_policy(world), rng=rng)
    (log_z,) = weighted.log_z
    assert log_z.value == pytest.approx(exact.log_z, abs=1e-9)
    assert log_z.stderr < 1e-9
    torch.testing.assert_close(weighted.log_w, torch.full((12,), exact.log_z, dtype=torch.float64))


def test_a_twist_with_rows_of_its_own_is_the_same_as_a_function_of_prefixes(world, exact):
    values = {prefix: 0.3 * len(prefix) + value for prefix, value in exact.soft_values().items()}
    found = [
        SMC(particles=8, twist=twist, threshold=ALWAYS).sample(
            world.target, world.prompts, rng=torch.Generator().manual_seed(3)
        )
        for twist in (table_twist(values), TableTwist(values))
    ]
    torch.testing.assert_close(found[0].log_w, found[1].log_w)
    assert found[0].scored.draws.texts == found[1].scored.draws.texts


# --- negative controls ---


class Planted(SMC):
    """SMC whose particles are at fault."""

    particles_of = Particles

    def run(self, target, prompts, proposal, chance, reference=None):
        from tiltlm.inference.decoding import smc

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(smc, "Particles", self.particles_of)
            return super().run(target, prompts, proposal, chance, reference)


class WithoutTheEnd(Particles):
    """Forgets to replace the twist by the evidence at the end."""

    def _judge(self, rows):
        super()._judge(rows)
        self._log_evidence[rows] = self._log_psi[rows]


class StaleCache(Particles):
    """Resamples all but the caches and tokens."""

    def _select(self, rows):
        self._log_psi, self._log_evidence, self.root = self._log_psi[rows], self._log_evidence[rows], self.root[rows]


class StaleTwist(Particles):
    """Resamples all but the last twist."""

    def _select(self, rows):
        before = self._log_psi
        super()._select(rows)
        self._log_psi = before


class KeepsWeights(Particles):
    """Resamples without resetting the weights."""

    def resample(self, chance, threshold, pinned):
        before, times = self.log_w, self.resampled.clone()
        super().resample(chance, threshold, pinned)
        self.log_w = torch.where((self.resampled > times)[self._index], before, self.log_w)


class ForgetsTheMean(Particles):
    """Does not put the mean weight aside when it resamples."""

    def resample(self, chance, threshold, pinned):
        super().resample(chance, threshold, pinned)
        self.log_z = torch.zeros_like(self.log_z)


@pytest.mark.parametrize(
    "fault", [WithoutTheEnd, StaleCache, StaleTwist, KeepsWeights, ForgetsTheMean], ids=lambda f: f.__name__
)
def test_what_is_forgotten_is_found_out(fault, world, exact):
    @dataclass(frozen=True)
    class Faulty(Planted):
        particles_of = fault

    engine = Faulty(particles=2, twist=rough_twist(exact), threshold=ALWAYS)
    assert Every(engine, world, exact, world.prior).gap > 1e-3


def test_weights_that_forget_the_proposal_are_found_out(world, exact):
    """Without a twist, so that the weights are pi0 exp(r / beta) / q at the end; and with one."""
    proposal = another_law(world, exact)

    class Target(tl.Target):
        """Says that whoever draws is the prior."""

    lied = Target(proposal, world.target.evidence)
    for twist in (None, rough_twist(exact)):
        engine = SMC(particles=2, twist=twist, threshold=ALWAYS)
        assert Every(engine, world, exact, proposal).gap < 1e-12
        assert Every(engine, replace(world, target=lied), exact, proposal).gap > 0.01


def test_false_claims_are_refuted(world, exact):
    class Exact(SMC):
        claim = Claim(fixed_point="p*", objective="law", bias="none")

    first = next(check for check in particle_checks(Exact()) if not check.passed)
    assert first.name == "law of a completion resampled at the end is p*"

    class Unweighted(SMC):
        def sample(self, target, prompts, *, proposal=None, rng):
            weighted = super().sample(target, prompts, proposal=proposal, rng=rng)
            return Weighted(weighted.scored, torch.zeros_like(weighted.log_w))

    assert not _particle_sampling_check(Unweighted()).passed


# --- conditional runs ---


def test_conditional_multinomial_runs_are_the_tilt_of_free_ones():
    """The law of all that a conditional run draws is the free one's times Z-hat / Z, over three steps and two resamplings."""
    deep = three_steps()
    exact = ex.posterior(deep.target, deep.prompts)
    engine = SMC(particles=2, twist=rough_twist(exact), resample=multinomial, threshold=ALWAYS)
    free = Every(engine, deep, exact, another_law(deep, exact))
    assert int(free.run.resampled.max()) == 2
    given = Every(engine, deep, exact, another_law(deep, exact), conditional=True)
    for power in (-1.0, 1.0, 2.0):
        tilted = (free.probability * ((power + 1) * (free.run.log_z - exact.log_z)).exp()).sum()
        assert float((given.probability * (power * (given.run.log_z - exact.log_z)).exp()).sum()) == pytest.approx(
            float(tilted), abs=1e-10
        )
    assert free.mean_log_z < exact.log_z < given.mean_log_z


def test_a_reference_that_is_not_pinned_gives_no_upper_bound():
    deep = three_steps()
    exact = ex.posterior(deep.target, deep.prompts)

    class Unpinned(Particles):
        def resample(self, chance, threshold, pinned):
            super().resample(chance, threshold, pinned=False)

    @dataclass(frozen=True)
    class Faulty(Planted):
        particles_of = Unpinned

    engine = Faulty(particles=2, twist=rough_twist(exact), resample=multinomial, threshold=ALWAYS)
    given = Every(engine, deep, exact, deep.prior, conditional=True)
    inverse = float((given.probability * (exact.log_z - given.run.log_z).exp()).sum())
    assert abs(inverse - 1) > 1e-3


# --- real models ---


@pytest.fixture(scope="module")
def real():
    lm = tl.load(make_model("llama"), make_tokenizer())
    prior = lm.prior(max_new_tokens=10, temperature=0.8)
    target = prior * tl.Reward(lambda completions: [float(len(set(c))) for c in completions], beta=2.0)
    return prior, target, prior.encode(["the film", "a quiet story of two", "friends"])


def rescored(prior, draws):
    return prior.log_prob(replace(draws, sampler=""))


@pytest.mark.parametrize("rows", [256, 20])
def test_caches_follow_the_particles(real, rng, rows):
    """After resampling, the log-probabilities that the walk gave are those of the completions that it returns."""
    prior, target, prompts = real
    policy = prior.policy(lora=tl.LoRA(r=2), seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in policy.named_parameters().values():
            weight.add_(0.2 * torch.randn_like(weight))
    engine = SMC(particles=8, twist=prefix_evidence, threshold=ALWAYS, rows=rows, repeats=2)
    weighted = engine.sample(target, prompts, proposal=policy, rng=rng)
    draws = weighted.scored.draws
    assert (weighted.diagnostics["resampled"] > 2).all()
    assert draws.prompt_index.tolist() == [p for p in range(3) for _ in range(16)]
    assert draws.prompts.texts == prompts.texts
    torch.testing.assert_close(rescored(policy, draws), draws.log_q, atol=1e-4, rtol=0)
    torch.testing.assert_close(rescored(prior, draws), weighted.scored.log_prior, atol=1e-4, rtol=0)
    again = target.score(draws)
    torch.testing.assert_close(again.log_evidence, weighted.scored.log_evidence)
    assert weighted.scored.rewards.keys() == again.rewards.keys()


def test_a_cache_that_does_not_follow_is_seen(real, rng, monkeypatch):
    prior, target, prompts = real

    def select(self, rows):
        self._index, self._lengths, self._ended = self._index[rows], self._lengths[rows], self._ended[rows]
        self._tokens, self._log_q, self._seen = self._tokens[rows], self._log_q[rows], self._seen[rows]
        self._pending = None if self._pending is None else self._pending[rows]
        self._known = None if self._known is None else self._known[rows]

    monkeypatch.setattr(ModelWalk, "select", select)
    engine = SMC(particles=8, twist=prefix_evidence, threshold=ALWAYS)
    draws = engine.sample(target, prompts, rng=rng).scored.draws
    assert float((rescored(prior, draws) - draws.log_q).abs().max()) > 0.1


def test_many_prompts_are_resampled_each_for_itself(real, rng):
    """A prompt's particles come from its own; one whose weights are equal is left alone."""
    prior, _, prompts = real

    def reward(prompts, completions):
        return [float(len(set(c)) * ("film" in p)) for p, c in zip(prompts, completions, strict=True)]

    target = prior * tl.Reward(reward, beta=1.0)
    weighted = SMC(particles=16, twist=prefix_evidence).sample(target, prompts, rng=rng)
    assert weighted.diagnostics["resampled"][0] > 0
    assert weighted.diagnostics["resampled"][1:].tolist() == [0, 0]
    torch.testing.assert_close(weighted.diagnostics["ess"][1:], torch.tensor([16.0, 16.0], dtype=torch.float64))
    assert weighted.diagnostics["roots"].tolist()[1:] == [16, 16]
    assert [z.value for z in weighted.log_z[1:]] == pytest.approx([0, 0], abs=1e-9)


def test_prefix_evidence_is_estimated_without_bias(rng):
    world = fixture_b()
    exact = ex.posterior(world.target, world.prompts)
    engine = SMC(particles=16, twist=prefix_evidence, repeats=400, rows=10_000)
    weighted = engine.sample(world.target, world.prompts, rng=rng)
    (log_z,) = weighted.log_z
    assert abs(log_z.value - exact.log_z) < 4 * log_z.stderr < 0.2
    assert log_z.n == 6400
    share = weighted.log_w.softmax(0)
    reward = float(share @ (exact.beta * weighted.scored.log_evidence))
    assert reward == pytest.approx(exact.mean_reward(exact.log_posterior), abs=0.05)


# --- bad input, and what is reported ---


def test_without_a_twist_it_is_importance_sampling_and_says_so(world, rng):
    with pytest.warns(tl.TiltWarning, match="importance sampling; give twist="):
        weighted = SMC(particles=16).sample(world.target, world.prompts, rng=rng)
    torch.testing.assert_close(weighted.log_w, weighted.scored.log_weight)
    assert weighted.diagnostics["resampled"].tolist() == [0]
    assert math.isnan(weighted.log_z[0].stderr)


def test_degenerate_weights_are_in_the_result(rng):
    world = fixture_b()
    cold = world.target.at(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tl.TiltWarning)
        weighted = SMC(particles=16).sample(cold, world.prompts, rng=rng)
    assert weighted.diagnostics["ess"].item() < 3


def test_a_prompt_whose_particles_all_die_is_reported(world, rng):
    nothing = world.prior * tl.Reward(lambda completion_ids: [None] * len(completion_ids), on_error="drop")
    weighted = SMC(particles=4, twist=prefix_evidence).sample(nothing, world.prompts, rng=rng)
    assert (weighted.log_w == -torch.inf).all()
    assert weighted.log_z[0].value == -math.inf
    assert weighted.diagnostics["ess"].tolist() == [0]
    assert len(weighted.kept().scored) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"particles": 0}, "particles is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"twist": "prefix_evidence"}, "twist is 'prefix_evidence'"),
    ],
)
def test_senseless_settings(settings, message):
    with pytest.raises(tl.InputError, match=message):
        SMC(**settings)


def test_proposals_that_cannot_serve(world, rng):
    class Whole:
        """A sampler that only draws whole completions."""

        law = world.prior.law

    engine = SMC(twist=prefix_evidence)
    with pytest.raises(tl.InputError, match="a Whole, which has no walk.*use Importance"):
        engine.sample(world.target, world.prompts, proposal=Whole(), rng=rng)
    for law, message in (({"max_new_tokens": 1}, "max_new_tokens 1"), ({"top_k": 2}, "top_k 2")):
        other = replace(world.prior, law=replace(world.prior.law, **law))
        with pytest.raises(tl.InputError, match=message):
            engine.sample(world.target, world.prompts, proposal=other, rng=rng)


# --- the other engines that choose among draws ---


@pytest.mark.parametrize(
    "engine",
    [QuasiRejection(), QuasiRejection(log_bound=0.5), SoftBestOfN(), ValueGuided(), ValueGuided(correct=False)],
    ids=["quasi-rejection", "quasi-rejection at 0.5", "soft best-of-n", "value-guided", "value-guided, uncorrected"],
)
def test_claims_of_the_choosing_engines(engine):
    for check in check_engine(engine):
        print(check)


def test_soft_best_of_n_has_the_law_of_importance_resampling(world, exact):
    law = enumerated_law(SoftBestOfN(3), world, exact)
    torch.testing.assert_close(law, enumerated_law(Importance(3), world, exact))


def test_quasi_rejection_says_what_it_costs(world, exact, rng):
    """Acceptance and total variation, estimated from its own draws, are those of the enumerated law."""
    weight = exact.scored.log_evidence.exp()
    for log_bound in (-0.5, 0.5, 3.0):
        engine = QuasiRejection(n=6000, log_bound=log_bound)
        weighted = engine.sample(world.target, world.prompts, rng=rng)
        rate = float((exact.log_prior.exp() * (weight / math.exp(log_bound)).clamp(max=1)).sum())
        distance = ex.total_variation(engine.settles_at(exact), exact.log_posterior)
        assert weighted.diagnostics["acceptance"].item() == pytest.approx(rate, abs=0.02)
        assert weighted.diagnostics["total_variation"].item() == pytest.approx(distance, abs=0.02)
        assert float((weighted.log_w > -torch.inf).double().mean()) == pytest.approx(rate, abs=0.02)
    assert distance == pytest.approx(0, abs=1e-12)


def test_quasi_rejection_corrects_any_proposal(world, exact, rng):
    proposal = another_law(world, exact)
    weighted = QuasiRejection(n=10_000, log_bound=5.0).sample(world.target, world.prompts, proposal=proposal, rng=rng)
    kept = weighted.kept().scored.draws
    number = {x: k for k, x in enumerate(exact.completions)}
    which = torch.tensor([number[tuple(t[m].tolist())] for t, m in zip(kept.tokens, kept.mask, strict=True)])
    law = torch.bincount(which, minlength=7) / len(which)
    assert float((law - exact.log_posterior.exp()).abs().sum() / 2) < 0.03
    with pytest.raises(tl.InputError, match="give log_bound for another proposal"):
        QuasiRejection().sample(world.target, world.prompts, proposal=proposal, rng=rng)
    unbounded = replace(world.target, evidence=replace(world.target.evidence, bounds=None))
    with pytest.raises(tl.InputError, match="needs a bound"):
        QuasiRejection().sample(unbounded, world.prompts, rng=rng)


def test_all_rejected_is_in_the_result(world, rng):
    weighted = QuasiRejection(n=8, log_bound=200.0).sample(world.target, world.prompts, rng=rng)
    assert len(weighted.kept().scored) == 0
    assert weighted.diagnostics["acceptance"].item() < 1e-80


def test_value_guided_decoding_is_exact_with_the_exact_values_only():
    """Values learned without the soft maximum are CD's: on fixture A 0.10727 nats from p* (mathematics, A7)."""
    world = fixture_a()
    exact = ex.posterior(world.target, world.prompts)
    best = ValueGuided(posterior_policy(world), correct=False)
    assert ex.kl(best.settles_at(exact), exact.log_posterior) == pytest.approx(0, abs=1e-9)
    guided = ValueGuided(_controlled_decoding(world, exact), correct=False)
    assert guided.claim.fixed_point != "p*"
    assert ex.kl(guided.settles_at(exact), exact.log_posterior) == pytest.approx(0.10727, abs=5e-6)


def _controlled_decoding(world, exact):
    """The prior tilted at every token by E_pi0[r | s, a] / beta, instead of its soft form."""
    policy = world.prior.policy(lora=None)
    prior, reward = exact.log_prior.exp(), exact.reward
    table = policy.named_parameters()["table"]
    prefixes = sorted({x[:n] for x in exact.completions for n in range(4)}, key=lambda h: (len(h), h))
    with torch.no_grad():
        for row, prefix in enumerate(prefixes):
            for token in range(3):
                below = torch.tensor([x[: len(prefix) + 1] == (*prefix, token) for x in exact.completions])
                table[0, row, token] += float((prior * reward)[below].sum() / prior[below].sum()) / exact.beta
    return policy


def test_value_guided_needs_exactly_one_critic(world, exact, rng):
    with pytest.raises(tl.InputError, match="give value="):
        ValueGuided().sample(world.target, world.prompts, rng=rng)
    with pytest.raises(tl.InputError, match="not both"):
        ValueGuided(world.prior).sample(world.target, world.prompts, proposal=world.prior, rng=rng)
    weighted = ValueGuided(n=4).sample(world.target, world.prompts, proposal=another_law(world, exact), rng=rng)
    torch.testing.assert_close(weighted.log_w, weighted.scored.log_weight)


def test_random_chance_follows_its_generator(world, exact):
    chance = [Random(torch.Generator().manual_seed(5), systematic) for _ in range(2)]
    log_probs = torch.rand(6, 4).log_softmax(-1)
    free = torch.ones(6, dtype=torch.bool)
    assert torch.equal(chance[0].tokens(log_probs, free), chance[1].tokens(log_probs, free))
    assert Importance(4).claim.fixed_point == SMC().claim.fixed_point


def test_a_critic_serves_as_proposal_and_as_twist(world, exact):
    """A critic with arbitrary weights, on its own and together with the prior: unbiased by enumeration."""
    critic = world.prior.critic(lora=None)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in critic.named_parameters().values():
            weight.add_(0.5 * torch.randn_like(weight))
    for proposal in (world.prior, critic):
        found = Every(SMC(particles=2, twist=critic, threshold=ALWAYS), world, exact, proposal)
        assert found.run.resampled.any()
        assert found.gap < 1e-6, "the critic's head is in single precision"
