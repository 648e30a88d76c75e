"""MCMC by its whole kernel; redrawn suffixes; and what says that chains have not mixed."""

import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from scipy.stats import chi2

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.evidence.power import Power
from tiltlm.inference.decoding.kernels import SuffixResampling
from tiltlm.inference.decoding.mcmc import MCMC
from tiltlm.inference.decoding.mixing import chain_ess, split_r_hat
from tiltlm.posterior import exact as ex
from tiltlm.records import Weighted
from tiltlm.target import Target
from tiltlm.testing import ClaimRefuted, check_engine, fixture_b, posterior_policy, small_language
from tiltlm.testing.fixtures import Language
from tiltlm.testing.kernels import kernel_checks, kernel_matrix, stationary_law
from tiltlm.testing.particles import another_law


@pytest.fixture(scope="module")
def world():
    return fixture_b()


@pytest.fixture(scope="module")
def exact(world):
    return ex.posterior(world.target, world.prompts)


def token_log_prob(sampler, exact):
    return sampler.log_prob(replace(exact.scored.draws, sampler="")).double()


# --- the kernel ---


def test_the_claim_is_proved():
    for check in check_engine(MCMC()):
        print(check)


def test_the_kernel_is_one_and_reversible(world, exact):
    """All 31 strings: rows sum to one, p* is stationary and no other law is, and detailed balance holds."""
    for proposal in (world.prior, another_law(world, exact), posterior_policy(world)):
        kernel = kernel_matrix(MCMC(), exact, token_log_prob(proposal, exact))
        posterior = exact.log_posterior.exp()
        assert float(kernel.min()) >= -1e-15
        torch.testing.assert_close(kernel.sum(-1), torch.ones(31, dtype=torch.float64), rtol=0, atol=1e-14)
        flow = posterior[:, None] * kernel
        torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-15)
        torch.testing.assert_close(stationary_law(kernel), posterior, rtol=0, atol=1e-12)
        magnitudes = torch.linalg.eigvals(kernel).abs().sort().values
        assert magnitudes[-2] < 1 - 1e-3


class WithoutLengths(SuffixResampling):
    """Forgets that a longer completion can be cut at more places."""

    def log_ratio(self, current, proposed):
        return current.log_prob - proposed.log_prob


class WithoutTheProposal(MCMC):
    """Accepts by the evidence and the lengths, whoever drew."""

    def log_acceptance(self, current, proposed, log_ratio):
        lengths = current.draws.lengths.double().log() - proposed.draws.lengths.double().log()
        return proposed.log_evidence - current.log_evidence + lengths


class NeverFromTheStart(SuffixResampling):
    """Always keeps the first token, so that it cannot reach every completion."""

    def cut(self, lengths, uniform):
        return super().cut(lengths, uniform).clamp(min=1)


class AcceptsEverything(MCMC):
    def log_acceptance(self, current, proposed, log_ratio):
        return torch.zeros(len(current), dtype=torch.float64)


def test_without_the_lengths_the_stationary_law_is_another(world, exact):
    """Its distance from p* is the one that mathematics, B6, gives."""
    law = stationary_law(kernel_matrix(MCMC(kernel=WithoutLengths()), exact, exact.scored.log_prior.double()))
    assert float((law - exact.log_posterior.exp()).abs().sum() / 2) == pytest.approx(0.14455, abs=5e-6)


@pytest.mark.parametrize(
    "engine",
    [
        MCMC(kernel=WithoutLengths()),
        WithoutTheProposal(),
        MCMC(kernel=NeverFromTheStart()),
        AcceptsEverything(),
    ],
    ids=["without lengths", "without the proposal", "never from the start", "accepts everything"],
)
def test_false_kernels_are_refuted(engine):
    assert not all(check.passed for check in kernel_checks(engine))


def test_sampling_that_strays_from_its_kernel_is_refuted():
    @dataclass(frozen=True)
    class Stays(MCMC):
        """Returns where it began."""

        def sample(self, target, prompts, *, proposal=None, rng):
            scored = target.score(target.prior.draw(prompts, self.chains * self.steps, rng))
            return Weighted(scored, torch.zeros(len(scored), dtype=torch.float64))

    assert all(check.passed for check in kernel_checks(Stays()))
    with pytest.raises(ClaimRefuted, match="sample\\(\\) follows the law"):
        check_engine(Stays())


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_power_sampling_is_a_special_case(world, alpha):
    """With the prior's own opinion as evidence the stationary law is pi0^alpha, which no token temperature gives."""
    power = Language(Target(world.prior, Power(world.prior, alpha)), world.prompts)
    exact = ex.posterior(power.target, power.prompts)
    law = stationary_law(kernel_matrix(MCMC(), exact, exact.scored.log_prior.double()))
    torch.testing.assert_close(law, (alpha * exact.log_prior).softmax(0), rtol=0, atol=1e-12)


# --- redrawing ---


def test_a_suffix_is_redrawn_from_the_law_given_the_prefix(rng):
    """From every completion and every cut: the observed completions against the exact conditional law."""
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    number = {x: k for k, x in enumerate(exact.completions)}
    count = 400
    for completion in exact.completions:
        for cut in range(len(completion)):
            row = exact.scored.draws.select(torch.full((count,), number[completion]))
            found = world.prior.redraw(row, torch.full((count,), cut), rng)
            again = [number[tuple(x)] for x in ids(found)]
            alike = torch.tensor([x[:cut] == completion[:cut] for x in exact.completions])
            law = torch.where(alike, exact.log_prior.exp(), 0.0)
            expected = law / law.sum() * count
            observed = torch.bincount(torch.tensor(again), minlength=7)
            assert observed[~alike].sum() == 0
            statistic = ((observed - expected).square() / expected.clamp(min=1e-9))[alike].sum()
            assert float(statistic) < chi2.isf(1e-5, int(alike.sum()) - 1)
            torch.testing.assert_close(found.log_prob, exact.log_prior[again])
            longest = found.lengths == 2
            ends = found.tokens[torch.arange(count), found.lengths - 1] == 2
            assert torch.equal(found.ended, ends)
            assert (found.ended | longest).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_redraws_of_a_real_model_are_scored_exactly(kind, rng):
    """Prefixes of different lengths, own and foreign; log q of the whole completion is the model's, up to the context's end."""
    model = make_model(kind)
    lm = tl.load(model, make_tokenizer())
    prior = lm.prior(max_new_tokens=12, temperature=1.4)
    prompts = prior.encode(["the film", "a quiet story of two friends who meet again " * 5])
    assert int(prompts.mask.sum(-1).max()) + 12 == model.config.max_position_embeddings
    prior = replace(prior, rows=5)
    draws = prior.draw(prompts, 8, rng)
    keep = (torch.rand(16, generator=rng) * draws.lengths).long()
    warmer = replace(prior, law=replace(prior.law, temperature=2.0))
    for sampler in (prior, warmer):
        found = sampler.redraw(draws, keep, rng)
        torch.testing.assert_close(
            sampler.log_prob(replace(found, sampler="")), found.log_q, atol=2e-4, rtol=0
        )  # float32 on caches of different lengths
        for old, new, kept in zip(draws.tokens, found.tokens, keep.tolist(), strict=True):
            assert torch.equal(old[:kept], new[:kept])
        assert (found.lengths > keep).all()
        assert (found.lengths <= 12).all()
        assert torch.equal(found.prompt_index, draws.prompt_index)
        assert found.texts == sampler.complete(prompts, found.prompt_index, ids(found)).texts


def test_redraws_honour_stop_strings(rng):
    prior = tl.load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=12, stop=("e",), temperature=3.0)
    prompts = prior.encode(["the film"])
    draws = prior.draw(prompts, 64, rng)
    found = prior.redraw(draws, torch.zeros(64, dtype=torch.long), rng)
    stopped = torch.tensor(["e" in text for text in found.texts])
    assert stopped.any()
    assert torch.equal(stopped | (found.tokens * found.mask == 1).any(-1), found.ended)
    for text in found.texts:
        assert text.find("e") in (-1, *range(max(0, len(text) - 12), len(text)))
    whole = prior.redraw(draws, draws.lengths, rng)
    assert torch.equal(whole.tokens * whole.mask, draws.tokens * draws.mask)
    assert torch.equal(whole.ended, draws.ended)


def ids(draws):
    return [t[m].tolist() for t, m in zip(draws.tokens, draws.mask, strict=True)]


def test_mcmc_moves_towards_the_posterior_of_a_real_model(rng):
    prior = tl.load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=6)
    target = prior * tl.Reward(lambda completion_ids: [float(sum(i % 2 for i in x)) for x in completion_ids], beta=0.5)
    prompts = prior.encode(["the film", "a quiet story"])
    policy = prior.policy(lora=tl.LoRA(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tl.TiltWarning)
        weighted = MCMC(chains=4, steps=8, warmup=16).sample(target, prompts, proposal=policy, rng=rng)
    assert len(weighted.scored) == 2 * 4 * 8
    drawn = target.score(prior.draw(prompts, 32, rng))
    assert weighted.scored.log_evidence.mean() > drawn.log_evidence.mean() + 1
    rescored = prior.log_prob(replace(weighted.scored.draws, sampler=""))
    torch.testing.assert_close(rescored, weighted.scored.log_prior, atol=1e-4, rtol=0)


# --- mixing ---


def test_r_hat_and_ess_of_known_chains(rng):
    noise = torch.randn(2000, 4, 3, generator=rng, dtype=torch.float64)
    independent = noise[:, :, :1]
    assert float(split_r_hat(independent)) == pytest.approx(1, abs=0.01)
    assert float(chain_ess(independent)) == pytest.approx(8000, rel=0.1)
    slow = torch.zeros_like(independent)
    for step in range(1, 2000):
        slow[step] = 0.9 * slow[step - 1] + independent[step]
    assert float(chain_ess(slow)) == pytest.approx(8000 * 0.1 / 1.9, rel=0.25)
    apart = independent + torch.tensor([0.0, 0.0, 0.0, 2.0]).double()[None, :, None]
    # between-chain variance 1, within 1: R-hat^2 = 1 + 1 * 8 / 7 (the halves are eight chains)
    assert float(split_r_hat(apart)) == pytest.approx(math.sqrt(1 + 8 / 7 * 0.75), abs=0.02)
    assert float(chain_ess(apart)) < 20
    trend = independent + torch.linspace(-3, 3, 2000).double()[:, None, None]
    assert float(split_r_hat(trend)) > 1.5, "a trend shows in the halves of each chain"
    still = torch.ones(10, 4, 1, dtype=torch.float64)
    assert float(split_r_hat(still)) == 1
    assert float(chain_ess(still)) == 40
    stuck = still * torch.arange(4.0, dtype=torch.float64)[None, :, None]
    assert float(split_r_hat(stuck)) == math.inf
    assert torch.isnan(split_r_hat(still[:3])).all()


def test_ess_is_that_of_the_kernel(exact, rng):
    """The estimate from chains of the kernel, against the sum of autocorrelations that its powers give."""
    kernel = kernel_matrix(MCMC(), exact, exact.scored.log_prior.double()).clamp(min=0)
    posterior, value = exact.log_posterior.exp(), exact.scored.log_evidence
    centred = value - (posterior * value).sum()
    variance, moved, time = (posterior * centred.square()).sum(), centred.clone(), 1.0
    for _ in range(200):
        moved = kernel @ moved
        time += 2 * float((posterior * centred * moved).sum() / variance)
    states = [torch.multinomial(posterior, 100, replacement=True, generator=rng)]
    for _ in range(499):
        states.append(torch.multinomial(kernel[states[-1]], 1, generator=rng)[:, 0])
    trace = value[torch.stack(states)][:, :, None]
    assert float(chain_ess(trace)) == pytest.approx(50_000 / time, rel=0.15)
    assert float(split_r_hat(trace)) < 1.03


def test_chains_report_how_they_went(world, exact, rng):
    found = MCMC(chains=50, steps=100, warmup=20).sample(world.target, world.prompts, rng=rng).diagnostics
    assert float(found["acceptance"]) == pytest.approx(acceptance_at_p_star(exact), abs=0.02)
    assert float(found["r_hat"]) < 1.1
    assert 100 < float(found["ess"]) < 2000


def acceptance_at_p_star(exact):
    moves = kernel_matrix(AcceptsEverything(), exact, exact.scored.log_prior.double())
    rows, columns = (i.flatten() for i in torch.meshgrid(torch.arange(31), torch.arange(31), indexing="ij"))
    here, there = exact.scored.select(rows), exact.scored.select(columns)
    accept = (
        MCMC().log_acceptance(here, there, SuffixResampling().log_ratio(here.draws, there.draws)).clamp(max=0).exp()
    )
    return float((exact.log_posterior.exp()[:, None] * moves * accept.view(31, 31)).sum())


def test_chains_that_do_not_mix_are_warned_of(world, rng):
    with pytest.warns(
        tl.TiltWarning, match="1 of 1 prompts have not mixed .*raise steps and warmup, or give a proposal"
    ):
        weighted = MCMC(chains=4, steps=6, warmup=0).sample(world.target.at(0.02), world.prompts, rng=rng)
    assert float(weighted.diagnostics["r_hat"]) > 1.1


def test_a_chain_that_never_finds_the_support_has_no_weight(world, rng):
    one = min(ex.posterior(world.target, world.prompts).completions)
    rare = world.prior * tl.Reward(
        lambda completion_ids: [1.0 if tuple(x) == one else None for x in completion_ids], on_error="drop"
    )
    with pytest.warns(tl.TiltWarning, match="not mixed"):
        weighted = MCMC(chains=3, steps=4, warmup=0).sample(rare, world.prompts, rng=torch.Generator().manual_seed(1))
    inside = torch.tensor([tuple(x) == one for x in ids(weighted.scored.draws)])
    assert torch.equal(weighted.log_w == 0, inside)
    assert not inside.all()
    assert weighted.diagnostics["r_hat"].tolist() == [math.inf]
    assert weighted.diagnostics["ess"].tolist() == [0]


@pytest.mark.parametrize(("settings", "message"), [({"chains": 0}, "chains is 0"), ({"warmup": -1}, "warmup is -1")])
def test_senseless_settings(settings, message):
    with pytest.raises(tl.InputError, match=message):
        MCMC(**settings)


def test_a_proposal_that_cannot_redraw_is_refused(world, rng):
    class Whole:
        law = world.prior.law

    with pytest.raises(tl.InputError, match="has no redraw.*MCMC must stop it at any token"):
        MCMC().sample(world.target, world.prompts, proposal=Whole(), rng=rng)
