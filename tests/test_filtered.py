"""Filtered fine-tuning: what is selected, by enumeration; false claims refuted; the drift of iterated forms; training."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import tiltlm as tl
from conftest import engine_id
from tiltlm.inference.source import Decoded, Given, Replay
from tiltlm.inference.training.filtered.bond import BOND
from tiltlm.inference.training.filtered.em import EM
from tiltlm.inference.training.filtered.raft import PRESETS, RAFT, Best, IteratedRAFT, above, best, tilted
from tiltlm.inference.training.filtered.sft import SFT
from tiltlm.lm.given import demonstrations
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.records import Forward
from tiltlm.testing import ClaimRefuted, check_engine, fixture_b, policy_with_law, small_language

QUICK = {"lora": None, "batch": 1, "lr": 0.1, "micro_tokens": 10**6}
TIGHT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(scope="module")
def b():
    world = fixture_b()
    return world, ex.posterior(world.target, world.prompts)


@pytest.fixture(scope="module")
def small():
    world = small_language()
    return world, ex.posterior(world.target, world.prompts)


def with_ties(exact):
    """The small language with rewards 0, 1 and 2, so that many are equal."""
    reward = exact.reward.round()
    assert len(reward.unique()) < len(reward)
    return ex.Exact(replace(exact.scored, log_evidence=reward / exact.beta), exact.beta)


# --- the claims ---


@pytest.mark.parametrize(
    "engine",
    [
        SFT(),
        RAFT(),
        RAFT(select=Best(2)),
        PRESETS["rest"],
        IteratedRAFT(),
        PRESETS["iterated-soft-raft"],
        BOND(backward=0.0),
        *(pytest.param(e, marks=pytest.mark.slow) for e in (EM(), PRESETS["soft-raft"], BOND(), BOND(backward=1.0))),
    ],
    ids=engine_id,
)
def test_claim_is_proved(engine):
    for check in check_engine(engine):
        print(check)


def selected_law(select, exact, log_law, group):
    """The law that a selection makes of groups of draws from a law: all tuples, each as a prompt of its own."""
    tuples = torch.tensor(list(itertools.product(range(len(log_law)), repeat=group)))
    probability = log_law.exp()[tuples].prod(-1)
    owner = torch.arange(len(tuples)).repeat_interleave(group)
    chosen = exact.scored.select(tuples.flatten())
    chosen = replace(chosen, draws=replace(chosen.draws, prompt_index=owner))
    share = select(chosen) * probability[owner]
    law = torch.zeros(len(log_law), dtype=torch.float64).index_add_(0, tuples.flatten(), share)
    return law / law.sum()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_of_n_among_any_number_of_draws(small, n, ties):
    _, exact = small
    exact = with_ties(exact) if ties else exact
    truth = ex.best_of_n_law(exact, n)
    for group in range(n, 5):
        assert_close(selected_law(Best(n), exact, exact.log_prior, group), truth, **TIGHT)
    assert_close(selected_law(best, exact, exact.log_prior, n), truth, **TIGHT)
    assert_close(Best(n).law(exact, 7).exp(), truth, **TIGHT)


def test_the_first_drawn_of_equals_is_the_best(small):
    _, exact = small
    three = replace(exact.scored.select(torch.tensor([0, 1, 2])), log_evidence=torch.tensor([1.0, 2.0, 2.0]))
    assert best(three).tolist() == [0.0, 1.0, 0.0]
    assert_close(Best(2)(three).tolist(), [0.0, 2 / 3, 1 / 3])
    assert Best(4)(three).tolist() == [0.0, 0.0, 0.0]


def test_a_threshold_keeps_what_is_on_it(small):
    """A reward of 1 is 1 - 1e-16 after r / beta * beta; it is still at least 1."""
    _, exact = small
    reward = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.5, 1.0, 0.0], dtype=torch.float64)
    assert any(beta * (1 / beta) < 1 for beta in (0.72, 0.91, 0.94))
    for beta in (0.72, 0.91, 0.94):
        scored = replace(exact.scored, log_evidence=reward / beta, beta=beta)
        kept = above(1.0)(scored) > 0
        assert kept.tolist() == (reward >= 1).tolist()
    filtered = above(1.0).law(ex.Exact(scored, beta), 8).exp()
    prior = exact.log_prior.exp() * (reward >= 1)
    assert_close(filtered, prior / prior.sum(), **TIGHT)


def test_impossible_completions_are_never_selected(small):
    _, exact = small
    evidence = exact.scored.log_evidence.clone()
    evidence[[1, 4]] = -torch.inf
    hard = ex.Exact(replace(exact.scored, log_evidence=evidence), exact.beta)
    for select in (best, Best(2), above(-5.0), tilted):
        law = selected_law(select, hard, hard.log_prior, 3)
        assert law[1] == law[4] == 0
        nothing = hard.scored.select(torch.tensor([1, 4, 4]))
        assert select(nothing).tolist() == [0.0, 0.0, 0.0]
        if select is not tilted:
            assert_close(law, select.law(hard, 3).exp(), **TIGHT)


def test_nothing_kept_is_no_step_and_no_error(b):
    world, exact = b
    policy = tl.fit(world.target, world.prompts, engine=RAFT(select=above(99.0)), steps=2, **QUICK)
    assert_close(exact.log_prob(policy), exact.log_prior)


def test_soft_raft_and_em_agree_on_prior_draws(small):
    _, exact = small
    rows = exact.scored.select(torch.tensor([0, 3, 3, 6]))
    losses = [engine.loss(Forward(rows.log_prior), rows)[0] for engine in (RAFT(select=tilted), EM())]
    assert_close(*losses, **TIGHT)


# --- BOND ---


def test_bond_estimates_the_density_of_best_of_n(small):
    """For rewards 0, 1, 1, 2, n = 2: F = 1/4, 3/4, 3/4, 1 and F_- = 0, 1/4, 1/4, 3/4; pi_2 / pi0 = F + F_-."""
    _, exact = small
    rows = exact.scored.select(torch.tensor([2, 0, 5, 3]))
    rows = replace(rows, log_evidence=torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.float64))
    _, info = BOND(n=2, backward=1.0).loss(Forward(rows.log_prior), rows)
    assert_close((-info["kl_best_of_n"]).exp(), torch.tensor([1 / 4, 1, 1, 7 / 4]), check_dtype=False)


@pytest.mark.parametrize("n", [2, 3])
def test_the_bias_of_bond_falls_with_the_group(small, n, rng):
    """At best-of-n's own law what the backward part wants is its bias; a group four times as large has a quarter of it."""
    world, exact = small
    exact = with_ties(exact)
    law = ex.best_of_n_law(exact, n)
    settled = policy_with_law(world, law.log())
    log_q = settled.log_prob(replace(exact.scored.draws, sampler=""))
    pulls = {group: mean_pull(BOND(n=n, backward=1.0), exact, settled, log_q, group, rng) for group in (8, 32)}
    print(pulls)
    assert pulls[32] < 0.4 * pulls[8]


def mean_pull(engine, exact, policy, log_q, group, rng):
    """The norm of the mean gradient over many groups of prior draws, each as a prompt of its own."""
    rows = torch.multinomial(exact.log_prior.exp(), 16_000, replacement=True, generator=rng)
    coefficient = torch.zeros_like(log_q)
    for part in rows.split(8 * group):
        some = exact.scored.select(part)
        some = replace(some, draws=replace(some.draws, prompt_index=torch.arange(len(part)) // group))
        leaf = log_q[part].clone().requires_grad_()
        loss, _ = engine.loss(Forward(leaf), some)
        coefficient.index_add_(0, part, torch.autograd.grad(loss, leaf)[0] * len(part))
    gradient = ex.expected_gradient(policy, exact, {"log_q": coefficient / len(rows)})
    return float(torch.cat([g.flatten() for g in gradient.values()]).norm())


# --- iteration ---


def test_iterating_the_best_of_n_composes(small):
    """Best of 2, of what the best of 2 made, is the best of 4: the reference has moved."""
    _, exact = small
    for case in (exact, with_ties(exact)):
        law = case.log_prior
        for _ in range(2):
            law = selected_law(best, case, law, 2).log()
        assert_close(law.exp(), ex.best_of_n_law(case, 4), **TIGHT)


def test_k_rounds_of_the_tilt_are_the_temperature_beta_over_k(small):
    """Exact rounds compose to beta / k; and what a group of n selects from a round's law is the next one's, up to 1 / n."""
    _, exact = small
    law = exact.log_prior
    for k in (1, 2, 3):
        following = (law + exact.scored.log_evidence).log_softmax(0)
        colder = ex.Exact(exact.scored.at(exact.beta / k), exact.beta / k)
        assert_close(following, colder.log_posterior, **TIGHT)
        errors = {n: (selected_law(tilted, exact, law, n) - following.exp()).abs().max() for n in (2, 4)}
        assert math.log2(errors[4] / errors[2]) < -0.5
        law = following
    assert ex.kl(law, exact.log_posterior) > 0.1


def test_filtering_again_changes_nothing(small):
    _, exact = small
    once = selected_law(above(0.5), exact, exact.log_prior, 2)
    assert_close(selected_law(above(0.5), exact, once.log(), 2), once, **TIGHT)


# --- false claims ---


class PosteriorBestOfN(RAFT):
    """Best-of-n distillation that says p*."""

    claim = Claim("p*", "expected log-likelihood", "none", data="prior")


class UnpinnedEM(IteratedRAFT):
    """exp(r / beta) on the policy's own draws, said to be p*."""

    claim = Claim("p*", "expected log-likelihood", "1/n")


class OmnivorousEM(RAFT):
    """The same on whatever draws, without the prior's probability over theirs."""

    claim = Claim("p*", "expected log-likelihood", "1/n", data="weighted")


class UnbiasedSoftRAFT(RAFT):
    """Forgets that the weights are normalised by their own sum."""

    claim = Claim("p*", "expected log-likelihood", "none", data="prior")


class UnbiasedBOND(BOND):
    """Forgets that the logarithm of a share is not that of the probability."""

    claim = replace(BOND().claim, bias="none")


class TwiceTheReward(BOND):
    """n r_BOND in place of (n - 1) r_BOND."""

    def _reward(self, scored):
        return super()._reward(scored) * self.n / (self.n - 1)


class BestOfNSaysFiltered(RAFT):
    """Claims another law than the one that it selects."""

    def settles_at(self, exact):
        return above(0.5).law(exact, self.group)


class OneTooMany(RAFT):
    def settles_at(self, exact):
        return best.law(exact, self.group + 1)


class PerToken(SFT):
    """Mean over each completion's tokens: long ones count less, and the data's law is not the minimum."""

    def loss(self, forward, scored, state=None):
        return -(forward.log_q.sum(-1) / scored.draws.lengths).mean(), {}


@pytest.mark.parametrize(
    "engine",
    [
        PosteriorBestOfN(),
        UnpinnedEM(select=tilted),
        OmnivorousEM(select=tilted),
        UnbiasedSoftRAFT(select=tilted),
        UnbiasedBOND(),
        TwiceTheReward(backward=1.0),
        BestOfNSaysFiltered(),
        OneTooMany(),
        PerToken(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_false_claim_is_refuted(engine, monkeypatch):
    monkeypatch.setattr("tiltlm.testing.training.FALLING", (2, 3))  # fewer tuples; a lie shows with these as well
    with pytest.raises(ClaimRefuted):
        check_engine(engine)


# --- settings ---


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SFT(group=0), "group is 0; SFT"),
        (lambda: EM(group=1), "group is 1; EM"),
        (lambda: RAFT(group=0), "group is 0"),
        (lambda: RAFT(group=2, select=Best(4)), "needs at least 4"),
        (lambda: RAFT(select="best"), "select is 'best'; give best"),
        (lambda: Best(0), "n is 0"),
        (lambda: BOND(n=1), "n is 1"),
        (lambda: BOND(n=8, group=4), "group is 4, but the best of n = 8"),
        (lambda: BOND(backward=1.5), "backward is 1.5"),
    ],
)
def test_senseless_settings(make, says):
    with pytest.raises(tl.InputError, match=says):
        make()


def test_sources_that_a_claim_does_not_cover(b):
    world, _ = b
    for engine in (RAFT(), BOND()):
        with pytest.raises(tl.InputError, match="FromPrior"):
            tl.fit(world.target, world.prompts, engine=engine, source=Replay(), steps=1, **QUICK)
    with pytest.raises(tl.InputError, match="cannot learn from"):
        tl.fit(world.target, world.prompts, engine=IteratedRAFT(), source=Replay(), steps=1, **QUICK)
    with pytest.raises(tl.InputError, match="pass source="):
        tl.fit(world.target, world.prompts, engine=SFT(), steps=1, **QUICK)


# --- training ---

LAWS = {
    "best of 4": (RAFT(group=4), lambda exact: ex.best_of_n_law(exact, 4).log()),
    "best of 4 among 16": (RAFT(group=16, select=Best(4)), lambda exact: ex.best_of_n_law(exact, 4).log()),
    "BOND of 4 by 32": (BOND(group=32, n=4), lambda exact: ex.best_of_n_law(exact, 4).log()),
    "soft RAFT": (RAFT(group=32, select=tilted), lambda exact: exact.log_posterior),
    "EM": (EM(group=32), lambda exact: exact.log_posterior),
}


@pytest.mark.parametrize(("engine", "law"), LAWS.values(), ids=LAWS)
def test_training_reaches_the_law(b, engine, law):
    world, exact = b
    truth = law(exact)
    prompts = world.prompts.select([0] * (64 // engine.group))
    policy = tl.fit(world.target, prompts, engine=engine, steps=60, **(QUICK | {"batch": len(prompts)}))
    before, after = (ex.kl(truth, log_q) for log_q in (exact.log_prior, exact.log_prob(policy)))
    print(f"KL(law||q): {before:.3f} -> {after:.3f}")
    assert after < 0.25 * before


def test_em_on_the_policys_own_draws_stays_at_the_posterior_and_iterated_raft_does_not(b):
    world, exact = b
    own = tl.fit(world.target, world.prompts, engine=EM(group=16), source=Replay(old=16), steps=50, **QUICK)
    drifted = tl.fit(world.target, world.prompts, engine=IteratedRAFT(group=16, select=tilted), steps=60, **QUICK)
    pinned, moving = exact.log_prob(own), exact.log_prob(drifted)
    print("KL(q||p*), pinned", ex.kl(pinned, exact.log_posterior), "moving", ex.kl(moving, exact.log_posterior))
    assert ex.kl(pinned, exact.log_posterior) < 0.2
    assert ex.kl(moving, exact.log_posterior) > 0.5
    colder = ex.posterior(world.target.at(exact.beta / 4), world.prompts)
    assert exact.mean_reward(moving) > exact.mean_reward(exact.log_posterior) + 0.2
    assert ex.kl(moving, colder.log_posterior) < ex.kl(moving, exact.log_posterior)


def test_sft_learns_the_law_of_the_data(b):
    """From rows of text; the empirical law is the minimum, whatever the reward."""
    world, exact = b
    rows = [{"prompt": "0", "completion": text} for text, count in DATA.items() for _ in range(count)]
    written = demonstrations(world.prior, rows)
    policy = tl.fit(
        world.target, written.draws.prompts, engine=SFT(), source=Given(written), steps=50, **(QUICK | {"lr": 0.3})
    )
    by_tokens = {ids: k for k, ids in enumerate(exact.completions)}
    data = torch.zeros(len(exact.completions), dtype=torch.float64)
    for ids, keep in zip(written.draws.tokens, written.draws.mask, strict=True):
        data[by_tokens[tuple(ids[keep].tolist())]] += 1 / len(rows)
    before, after = (ex.kl(data.log(), log_q) for log_q in (exact.log_prior, exact.log_prob(policy)))
    print(f"KL(data||q): {before:.3f} -> {after:.3f}")
    assert after < 0.02 < before


DATA = {"1 0": 5, "": 3, "0 0 1": 2}


@pytest.mark.parametrize("kind", ["posterior", "best of 4"])
def test_sft_on_what_a_decoding_engine_returns(b, kind):
    world, exact = b
    engine = tl.Rejection(n=128) if kind == "posterior" else tl.BestOfN(4)
    law = exact.log_posterior if kind == "posterior" else ex.best_of_n_law(exact, 4).log()
    group = 16 if kind == "posterior" else 1
    prompts = world.prompts.select([0] * (16 // group))
    settings = QUICK | {"batch": len(prompts), "source": Decoded(engine)}
    policy = tl.fit(world.target, prompts, engine=SFT(group=group), steps=50, **settings)
    before, after = (ex.kl(law, log_q) for log_q in (exact.log_prior, exact.log_prob(policy)))
    print(f"KL(law||q): {before:.3f} -> {after:.3f}")
    assert after < 0.4 * before


def test_a_hard_constraint_is_filtered(b):
    """Filtered fine-tuning leaves impossible completions out; BOND's policy gradient says that it cannot."""
    from tiltlm.evidence import Constraint

    def two_words(completion_ids):
        return [len(ids) == 3 for ids in completion_ids]

    world, exact = b
    target = world.prior * Constraint(two_words)
    policy = tl.fit(target, world.prompts, engine=RAFT(group=32, select=tilted), steps=60, **QUICK)
    inside = torch.tensor([len(ids) == 3 for ids in exact.completions])
    assert exact.log_prob(policy).exp()[inside].sum() > 0.9
    with pytest.raises(tl.InputError, match="needs finite evidence"):
        tl.fit(target, world.prompts, engine=BOND(), steps=3, **QUICK)
