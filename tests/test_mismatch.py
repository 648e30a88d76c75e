"""Draws of a law that is not quite the policy's: the corrections, by enumeration in float64, and what happens without them."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import tiltlm as tl
from tiltlm.inference.accumulate import accumulate
from tiltlm.inference.memory import DrawMemory
from tiltlm.inference.optimise import Optimiser
from tiltlm.inference.training.policy_gradients.baselines import no_baseline, of_the_group
from tiltlm.inference.training.policy_gradients.credit import to_go
from tiltlm.inference.training.policy_gradients.grpo import PRESETS
from tiltlm.inference.training.policy_gradients.kl_terms import rao_blackwell
from tiltlm.mismatch import LEAST_CEILING, TRUNCATE, accept, ceilings, row_weights
from tiltlm.posterior import exact as ex
from tiltlm.store import scored_of, tensors_of
from tiltlm.testing import posterior_policy, small_language

SMALL, LARGE = 0.3, 1.5


def shifted(policy, size, wave):
    """The policy, moved."""
    with torch.no_grad():
        for weight in policy.named_parameters().values():
            weight.add_(size * wave(torch.arange(weight.numel(), dtype=weight.dtype)).view_as(weight))
    return policy


class World:
    """A policy, and a law mu that draws for it, as log-probabilities of every completion's tokens."""

    def __init__(self, mismatch, policy=None):
        self.world = small_language()
        self.exact = ex.posterior(self.world.target, self.world.prompts)
        self.policy = policy(self.world) if policy else shifted(self.world.prior.policy(lora=None), 0.4, torch.cos)
        other = self.world.prior.policy(lora=None)
        mine = self.policy.named_parameters()
        with torch.no_grad():
            for name, weight in other.named_parameters().items():
                weight.copy_(mine[name].nan_to_num(neginf=-60.0))
        draws = replace(self.exact.scored.draws, sampler="")
        self.log_q = self.policy.log_prob(draws).double()
        self.log_mu = shifted(other, mismatch, lambda n: (3 * n).sin()).log_prob(draws).double()

    @property
    def ratio(self):
        return (self.log_q - self.log_mu).sum(-1)

    def scored(self, log_mu):
        """Every completion as a draw of the policy, that mu drew if it is said."""
        draws = replace(self.exact.scored.draws, log_q=self.log_q, log_mu=log_mu, sampler="")
        return replace(self.exact.scored, draws=draws)

    def expected_gradient(self, engine, *, corrected=True, by=None, micro_tokens=10_000):
        """Of the loop's own `accumulate`, over all tuples of draws of mu (or of another law)."""
        scored = self.scored(self.log_mu if corrected else None)
        probability = (self.log_mu if by is None else by).sum(-1).exp()
        named = self.policy.named_parameters()
        found = {name: torch.zeros_like(value) for name, value in named.items()}
        for rows in itertools.product(range(len(probability)), repeat=engine.group):
            index, optimiser = torch.tensor(rows), Optimiser(named, 0.1, 0.0)
            some, state = scored.select(index), engine.init(self.world.prompts)
            accumulate(self.policy, engine, some, state, micro_tokens, optimiser, fresh=True)
            for name, value in named.items():
                if value.grad is not None:
                    found[name] += probability[index].prod() * value.grad
                value.grad = None
        return found

    def error(self, engine, **how):
        """Largest difference from the gradient of KL(q || p*), relative to its largest entry."""
        truth = ex.reverse_kl_gradient(self.policy, self.exact)
        found = self.expected_gradient(engine, **how)
        return max(float((found[n] - truth[n]).abs().max() / truth[n].abs().max()) for n in truth)


@pytest.fixture(scope="module")
def near():
    world = World(SMALL)
    assert world.ratio.exp().max() < TRUNCATE  # nothing is truncated
    assert world.ratio.abs().max() > 0.2  # and there is something to correct
    return world


@pytest.fixture(scope="module")
def far():
    world = World(LARGE)
    assert world.ratio.exp().max() > 2 * TRUNCATE
    return world


ENGINES = {
    "rloo": tl.RLOO(group=2),
    "rloo, KL exact, to go": tl.RLOO(group=2, kl=rao_blackwell, credit=to_go),
    "reinforce": tl.Reinforce(group=1, baseline=no_baseline),
    "grpo-tilt": replace(PRESETS["grpo-tilt"], group=2),
}


class TestTraining:
    @pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
    def test_the_expected_gradient_is_right_with_the_weights_and_wrong_without(self, near, engine):
        assert near.error(engine) < 1e-10
        assert near.error(engine, corrected=False) > 0.05
        assert (
            near.error(engine, corrected=False, by=near.log_q) < 1e-10
        )  # on its own draws there is nothing to correct

    def test_micro_batches_change_nothing(self, near):
        whole = near.expected_gradient(tl.RLOO(group=2))
        cut = near.expected_gradient(tl.RLOO(group=2), micro_tokens=1)
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, rtol=1e-10, atol=1e-12)

    def test_an_engine_biased_by_its_own_group_keeps_that_bias_and_gets_no_other(self, near):
        engine = tl.Reinforce(group=2, baseline=of_the_group)
        own = near.expected_gradient(engine, corrected=False, by=near.log_q)
        for corrected, limit in ((True, 0.06), (False, None)):
            found = near.expected_gradient(engine, corrected=corrected)
            error = max(float((found[n] - own[n]).abs().max() / own[n].abs().max()) for n in own)
            assert error < limit if limit else error > 0.06

    def test_an_engine_for_anybodys_draws_still_rests_at_the_posterior(self):
        there = World(SMALL, policy=posterior_policy)
        found = there.expected_gradient(tl.VarGrad(group=2))
        assert max(float(value.abs().max()) for value in found.values()) < 1e-10

    def test_what_truncation_leaves_out_is_bounded_by_what_is_measured(self, far):
        mu, q = far.log_mu.sum(-1).exp(), far.log_q.sum(-1).exp()
        weights = row_weights(far.scored(far.log_mu).draws)
        assert weights.max() == pytest.approx(TRUNCATE)
        lost = float((mu * (far.ratio.exp() - TRUNCATE).clamp(min=0)).sum())
        assert 0.01 < lost < 0.6
        assert float((mu * weights).sum()) == pytest.approx(1 - lost, rel=1e-12)
        for wave in range(5):
            f = (wave + torch.arange(len(mu), dtype=torch.float64)).cos()
            assert abs(float((mu * weights * f).sum() - (q * f).sum())) <= lost * float(f.abs().max()) + 1e-12


class TestRejection:
    def test_what_is_kept_has_our_law(self, near, far):
        """Of the draws of mu a share q / (C mu) is kept, or all of them: what is kept has the law min(q, C mu)."""
        grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        for world, is_exact in ((near, True), (far, False)):
            mu, q = world.log_mu.sum(-1).exp(), world.log_q.sum(-1).exp()
            ceiling = torch.full_like(mu, TRUNCATE)
            share = torch.stack(
                [
                    accept(r.expand(len(grid)), c.expand(len(grid)), grid).double().mean()
                    for r, c in zip(world.ratio, ceiling, strict=True)
                ]
            )
            law = mu * share / (mu * share).sum()
            wanted = torch.minimum(q, TRUNCATE * mu)
            torch.testing.assert_close(law, wanted / wanted.sum(), rtol=2e-5, atol=1e-6)
            assert (ex.total_variation(law.log(), q.log()) < 1e-5) is is_exact
            assert ex.total_variation(mu.log(), q.log()) > 0.03

    def test_a_draws_ceiling_does_not_look_at_the_draw(self):
        log_ratio = torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64)
        assert ceilings(log_ratio).log().tolist() == pytest.approx([0.5, 0.3, 0.5])
        moved = torch.tensor([0.1, 9.0, 0.3], dtype=torch.float64)
        assert ceilings(moved)[1] == ceilings(log_ratio)[1]
        assert ceilings(moved)[0] == TRUNCATE
        assert ceilings(torch.zeros(4, dtype=torch.float64)).tolist() == [LEAST_CEILING] * 4
        assert ceilings(torch.zeros(1, dtype=torch.float64)).tolist() == [TRUNCATE]


class TestMeasure:
    def test_by_hand(self, near):
        draws = near.scored(near.log_mu).draws
        found, ratio, gap = tl.Mismatch.of(draws), near.ratio, (near.log_q - near.log_mu).abs()[draws.mask]
        weight = ratio.exp()
        assert found.mean == pytest.approx(float(gap.mean()))
        assert found.largest == pytest.approx(float(gap.max()))
        assert found.kl == pytest.approx(-float(ratio.mean()))
        assert found.ess == pytest.approx(float(weight.sum() ** 2 / (weight**2).sum() / len(weight)))
        assert found.lost == 0.0
        assert set(found.metrics()) == {f"mismatch/{name}" for name in ("mean", "largest", "kl", "ess", "lost")}

    def test_no_mismatch_is_none(self, near):
        found = tl.Mismatch.of(near.scored(near.log_q).draws)
        assert (found.mean, found.largest, found.kl, found.lost) == (0.0, 0.0, 0.0, 0.0)
        assert found.ess == pytest.approx(1.0)
        assert row_weights(near.scored(None).draws) is None

    def test_impossible_draws_have_no_weight(self, near):
        draws = near.scored(near.log_mu).draws
        log_q = draws.log_q.clone()
        log_q[0, 0] = -math.inf
        impossible = replace(draws, log_q=log_q)
        assert row_weights(impossible)[0] == 0
        found = tl.Mismatch.of(impossible)
        assert found.largest == found.kl == math.inf
        assert found.mean < 1
        assert found.ess < tl.Mismatch.of(draws).ess

    def test_too_much_is_refused_in_a_sentence(self, near, far):
        tl.Tolerance(mean=0.5).require(near.scored(near.log_mu).draws, "it")
        few = far.scored(far.log_mu).draws
        many = tl.Draws.concatenate([few] * 5)
        tl.Tolerance(mean=9).require(few, "it")  # too few to tell by their weights
        with pytest.raises(tl.InputError, match="% of the draws count"):
            tl.Tolerance(mean=9).require(many, "it")
        none = replace(few, log_q=torch.full_like(few.log_q, -math.inf))
        with pytest.raises(tl.InputError, match="0% of the draws count"):
            tl.Tolerance(mean=9).require(none, "it")
        with pytest.raises(
            tl.InputError, match="it draws from another law than the model here: .* nats on average.*newest adapter"
        ):
            tl.Tolerance().require(far.scored(far.log_mu).draws, "it")
        with pytest.raises(tl.InputError, match="mean is 0"):
            tl.Tolerance(mean=0)


class TestRecords:
    def test_the_law_that_drew_goes_where_the_draws_go(self, near):
        scored = near.scored(near.log_mu)
        two = torch.tensor([3, 1])
        assert scored.select(two).draws.log_mu.equal(near.log_mu[two])
        both = tl.Scored.concatenate([scored, near.scored(None)]).draws
        assert both.log_mu.equal(torch.cat([near.log_mu, near.log_q]))
        assert tl.Scored.concatenate([near.scored(None)] * 2).draws.log_mu is None
        assert scored_of(*tensors_of(scored)).draws.log_mu.equal(near.log_mu)
        assert scored_of(*tensors_of(near.scored(None))).draws.log_mu is None

    @pytest.mark.parametrize("first", [True, False])
    def test_a_memory_may_hold_both(self, near, first, rng):
        memory = DrawMemory(near.world.prompts, 64)
        parts = [near.scored(near.log_mu), near.scored(None)]
        for part in parts if first else parts[::-1]:
            memory.add(part)
        held = memory.everything().draws
        ratio = (held.log_q - held.log_mu).sum(-1)
        expected = torch.cat(
            [near.ratio, torch.zeros_like(near.ratio)] if first else [torch.zeros_like(near.ratio), near.ratio]
        )
        torch.testing.assert_close(ratio, expected)
