"""Every engine's claim, proved by enumeration; and false claims, refuted."""

import itertools
import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

import tiltlm as tl
from tiltlm.inference.decoding.rejection import share_accepted
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.records import Weighted
from tiltlm.testing import ClaimRefuted, check_engine, fixture_b, language, small_language
from tiltlm.weights import group_mean, leave_one_out, log_mean_weight

ENGINES = [tl.RLOO(), tl.BestOfN(), tl.Importance(), tl.Rejection(), tl.Rejection(samples=2, round=3)]
P_STAR = Claim(fixed_point="p*", objective="KL(q||p*)", bias="none")


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_claim_is_proved(engine):
    for check in check_engine(engine):
        print(check)


@dataclass(frozen=True)
class Planted:
    """An engine with a claim that is not true; subclasses say what they really do."""

    group: int = 4
    updates = 1
    claim = P_STAR

    def init(self, prompts):
        return None

    def advantage(self, scored):
        raise NotImplementedError

    def loss(self, forward, scored, state=None):
        return -(self.advantage(scored).detach() * forward.log_q.sum(-1)).mean(), {}


class NoKL(Planted):
    """Forgets the KL: its optimum is a point mass."""

    def advantage(self, scored):
        return leave_one_out(scored.log_evidence, scored.draws.prompt_index)


class WrongSign(Planted):
    """Rewards the distance to the prior."""

    def advantage(self, scored):
        weight = scored.log_evidence - (scored.log_prior.sum(-1) - scored.draws.log_prob)
        return leave_one_out(weight, scored.draws.prompt_index)


class MeanWithSelf(Planted):
    """The group's mean, the draw itself included: shrinks the gradient by 1 - 1/G, at p* still nothing is left."""

    def advantage(self, scored):
        index = scored.draws.prompt_index
        return scored.log_weight - group_mean(scored.log_weight, index, int(index.max()) + 1)[index]


class NoBaseline(Planted):
    """Unbiased, but p*'s draws still carry a signal: not the zero-variance estimator that is claimed."""

    def advantage(self, scored):
        return scored.log_weight


class PerToken(Planted):
    """Divides by the completion's length, which hides a bonus for length."""

    def advantage(self, scored):
        return leave_one_out(scored.log_weight / scored.draws.lengths, scored.draws.prompt_index)


class WithoutEOS(Planted):
    """Leaves the EOS's log-probability out of the KL."""

    def advantage(self, scored):
        draws = scored.draws
        last = torch.zeros_like(draws.log_q).scatter_(1, (draws.lengths - 1)[:, None], 1.0)
        inner = ~(last.bool() & draws.ended[:, None])
        weight = scored.log_evidence + ((scored.log_prior - draws.log_q) * inner).sum(-1)
        return leave_one_out(weight, draws.prompt_index)


class NormalisedByStd(Planted):
    """GRPO's habit with the KL in the loss."""

    def loss(self, forward, scored, state=None):
        index = scored.draws.prompt_index
        groups = int(index.max()) + 1
        reward = scored.log_evidence
        centred = reward - group_mean(reward, index, groups)[index]
        std = group_mean(centred**2, index, groups).sqrt()[index] + 1e-4
        kl = (forward.log_q - scored.log_prior).sum(-1)
        return -((centred / std).detach() * forward.log_q.sum(-1)).mean() + (kl**2 / 2).mean(), {}


class K3InTheLoss(Planted):
    """The k3 estimator as a loss: the gradient of the other KL."""

    def loss(self, forward, scored, state=None):
        advantage = leave_one_out(scored.log_evidence, scored.draws.prompt_index)
        log_rho = (scored.log_prior - forward.log_q).sum(-1)
        return -(advantage.detach() * forward.log_q.sum(-1)).mean() + (log_rho.exp() - 1 - log_rho).mean(), {}


class Repelled(tl.RLOO):
    """The right loss with the wrong sign: p* is a fixed point, but nobody gets there."""

    def loss(self, forward, scored, state=None):
        loss, info = super().loss(forward, scored, state)
        return -loss, info

    claim = Claim(fixed_point="p*", objective="of its own", bias="none")


class Nothing(Repelled):
    """Wants nothing anywhere, so also nothing at p*."""

    def loss(self, forward, scored, state=None):
        return 0.0 * forward.log_q.sum(), {}


class ModestRLOO(tl.RLOO):
    """Says that it does not reach p*, although it does."""

    claim = Claim(fixed_point="none", objective="?")


@pytest.mark.parametrize(
    "engine",
    [
        NoKL(),
        WrongSign(),
        MeanWithSelf(),
        NoBaseline(),
        PerToken(),
        WithoutEOS(),
        NormalisedByStd(),
        K3InTheLoss(),
        Repelled(),
        Nothing(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_false_training_claim_is_refuted(engine):
    with pytest.raises(ClaimRefuted):
        check_engine(engine)


def test_a_too_modest_claim_is_refuted():
    with pytest.raises(ClaimRefuted, match="p\\* is not stationary"):
        check_engine(ModestRLOO())


def test_an_honest_negative_claim_passes():
    @dataclass(frozen=True)
    class Honest(NoKL):
        claim = Claim(fixed_point="none", objective="E r")

    check_engine(Honest())


class ExactBestOfN(tl.BestOfN):
    claim = Claim(fixed_point="p*", objective="law", bias="none")


class ExactImportance(tl.Importance):
    claim = Claim(fixed_point="p*", objective="law", bias="none")


class LooseRejection(tl.Rejection):
    """Accepts with a bound that is not one."""

    def selection(self, target, scored):
        low = replace(target, evidence=replace(target.evidence, bounds=(-1.0, 0.5)))
        return super().selection(low, scored).clamp(0, 1)


class UnweightedSample(tl.Importance):
    """Forgets the weights when it samples."""

    def sample(self, target, prompts, *, proposal=None, rng):
        weighted = super().sample(target, prompts, proposal=proposal, rng=rng)
        return Weighted(weighted.scored, torch.zeros_like(weighted.log_w))


class IgnoresTheProposal(tl.Importance):
    """Weights by the evidence alone, whoever drew."""

    def sample(self, target, prompts, *, proposal=None, rng):
        weighted = super().sample(target, prompts, proposal=proposal, rng=rng)
        return Weighted(weighted.scored, weighted.scored.log_evidence)


class TakesTheMeanAsIfNothingHadStopped(tl.Rejection):
    """Forgets, in its log Z, that a heavy weight has ended the drawing."""

    def sample(self, target, prompts, *, proposal=None, rng):
        weighted = super().sample(target, prompts, proposal=proposal, rng=rng)
        index = weighted.scored.draws.prompt_index
        return replace(weighted, log_z=log_mean_weight(weighted.scored.log_evidence, index, len(prompts)))


@pytest.mark.parametrize(
    "engine",
    [
        ExactBestOfN(),
        ExactImportance(),
        LooseRejection(),
        UnweightedSample(),
        IgnoresTheProposal(),
        TakesTheMeanAsIfNothingHadStopped(samples=2, round=1),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_false_decoding_claim_is_refuted(engine):
    with pytest.raises(ClaimRefuted):
        check_engine(engine)


def test_rejection_is_exact_only_where_it_says(rng):
    world = small_language()
    unbounded = replace(world.target, evidence=replace(world.target.evidence, bounds=None))
    with pytest.raises(tl.InputError, match="needs a reward with bounds"):
        tl.Rejection().sample(unbounded, world.prompts, rng=rng)
    with pytest.raises(tl.InputError, match="exact only from the prior"):
        tl.Rejection().sample(world.target, world.prompts, proposal=world.prior.policy(lora=None), rng=rng)


def test_rejection_stops_at_enough_and_shows_who_got_none(rng):
    world = fixture_b()
    prompts = world.prompts.select([0] * 20)
    few = tl.Rejection(n=500, samples=3, round=10).sample(world.target, prompts, rng=rng)
    counts = few.kept().scored.draws.prompt_index.bincount(minlength=20)
    assert (counts >= 3).all()
    assert len(few.scored) < 20 * 500
    cold = tl.Rejection(n=4).sample(world.target.at(0.02), prompts, rng=rng)
    assert len(cold.kept().scored) < 20
    assert len(cold.scored) == 80


def rare(probability):
    """Three completions; the one with the given probability is worth exp(10) of the others, and is always accepted."""
    light = (1 - probability) / 2
    return language(
        lambda prompt, prefix: [math.log(light), math.log(light), math.log(probability)],
        lambda x: float(x[0] == 2),
        beta=0.1,
        bounds=(0.0, 1.0),
        depth=1,
    )


@pytest.mark.parametrize(
    "engine",
    [
        tl.Rejection(n=256, samples=2, round=1),
        tl.Rejection(n=256, samples=2, round=16),
        tl.Rejection(n=30, samples=3, round=8),  # some get their three, most end with the budget
        tl.Rejection(n=64),
    ],
    ids=lambda e: f"{e.n}-{e.samples}-{e.round}",
)
def test_rejections_estimate_of_z_is_unbiased_whatever_ends_the_drawing(engine):
    """Twelve hundred runs of each; the mean weight as if nothing had stopped is 1.7, 1.2 and 1.2 times Z in the first three."""
    world = rare(0.1)
    exact, runs = ex.posterior(world.target, world.prompts), 1200
    rng = torch.Generator().manual_seed(0)
    weighted = engine.sample(world.target, world.prompts.select([0] * runs), rng=rng)
    assert weighted.log_z is not None
    assert {z.kind for z in weighted.log_z} == {"lower"}
    ratio = torch.tensor([z.value - exact.log_z for z in weighted.log_z], dtype=torch.float64).exp()
    stderr = float(ratio.std()) / math.sqrt(runs)
    assert stderr < 0.05
    assert abs(float(ratio.mean()) - 1) < 4 * stderr
    drawn = weighted.scored.draws.prompt_index.bincount(minlength=runs)
    assert [z.n for z in weighted.log_z] == drawn.tolist()


@pytest.mark.parametrize(("enough", "rounds"), [(1, (2, 2)), (2, (1, 1, 1, 1)), (2, (2, 2, 1)), (3, (2, 1, 2))])
def test_the_share_of_accepted_draws_is_exact(enough, rounds):
    """All runs, of draws of three kinds: the expectation of the estimate is Z to rounding."""
    kinds = [(0.2, 1.0), (0.5, 0.5), (0.3, 0.1)]  # probability, and weight over its bound
    outcomes = [(p * (w if kept else 1 - w), w, kept) for p, w in kinds for kept in (True, False)]
    total = expected = 0.0
    for run in itertools.product(outcomes, repeat=sum(rounds)):
        before = drawn = 0
        for size in rounds:
            before, drawn = drawn, drawn + size
            if sum(kept for _, _, kept in run[:drawn]) >= enough:
                break
        seen = run[:drawn]
        accepted, rejected = ([w for _, w, kept in seen if kept is which] for which in (True, False))
        share = share_accepted(drawn, before, len(accepted), enough)
        mean = sum(accepted) / max(1, len(accepted)) * share + sum(rejected) / max(1, len(rejected)) * (1 - share)
        probability = math.prod(p for p, _, _ in run)
        total, expected = total + probability, expected + probability * mean
    assert total == pytest.approx(1, abs=1e-12)
    assert expected == pytest.approx(sum(p * w for p, w in kinds), abs=1e-12)


def test_share_of_accepted_draws_one_by_one():
    """Haldane's estimate; with so many draws that binomial coefficients are no longer numbers."""
    for drawn, enough in ((7, 3), (50_000, 2), (50_000, 20_000)):
        assert share_accepted(drawn, drawn - 1, enough, enough) == pytest.approx((enough - 1) / (drawn - 1), rel=1e-9)


def test_rejection_has_no_log_z_from_one_sample(rng):
    world = rare(0.1)
    weighted = tl.Rejection(samples=1).sample(world.target, world.prompts, rng=rng)
    assert weighted.log_z is None
    assert len(weighted.kept().scored)
    with pytest.raises(tl.InputError, match="samples is 0; it must be at least 1"):
        tl.Rejection(samples=0)


@pytest.mark.parametrize("samples", [None, 2])
def test_a_completion_that_nobody_could_judge_weighs_nothing_in_rejections_log_z(samples, rng):
    """As in importance sampling: dropping it restricts the target, whose Z is then smaller."""
    world = rare(0.1)

    def fn(completion_ids):
        return [math.nan if ids[0] == 0 else float(ids[0] == 2) for ids in completion_ids]

    evidence = replace(world.target.evidence, fn=fn, on_error="drop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tl.TiltWarning)
        weighted = tl.Rejection(n=400, samples=samples, round=8).sample(
            world.prior * evidence, world.prompts.select([0] * 300), rng=rng
        )
    assert weighted.scored.dropped > 0
    z = math.log(0.45 + 0.1 * math.exp(10))
    ratio = torch.tensor([estimate.value - z for estimate in weighted.log_z], dtype=torch.float64).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(ratio))


def test_importance_with_a_proposal_corrects_it(rng):
    """Draws of another policy, weighted, have the posterior's mean reward and log Z."""
    world = fixture_b()
    exact = ex.posterior(world.target, world.prompts)
    proposal = world.prior.policy(lora=None)
    torch.manual_seed(0)
    with torch.no_grad():
        table = proposal.named_parameters()["table"]
        table.add_(0.5 * torch.randn_like(table).clamp(-2, 2))
    weighted = tl.Importance(n=20_000).sample(world.target, world.prompts, proposal=proposal, rng=rng)
    share = weighted.log_w.double().softmax(0)
    reward = exact.beta * weighted.scored.log_evidence
    assert float(share @ reward) == pytest.approx(exact.mean_reward(exact.log_posterior), abs=0.02)
    (log_z,) = weighted.log_z
    assert log_z.kind == "lower"
    assert abs(log_z.value - exact.log_z) < 4 * log_z.stderr


@pytest.mark.parametrize("make", [lambda: tl.RLOO(group=1), lambda: tl.BestOfN(n=0), lambda: tl.Importance(n=0)])
def test_senseless_settings(make):
    with pytest.raises(ValueError, match="is [01]"):
        make()
