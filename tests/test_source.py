"""Where completions come from: who may be fed with what, and that a replay buffer survives a crash."""

import typing
from dataclasses import dataclass, replace

import pytest
import torch

import tiltlm as tl
from tiltlm.inference.ahead import Ahead
from tiltlm.inference.lagging import Lagging
from tiltlm.inference.memory import DrawMemory
from tiltlm.inference.source import (
    ACCEPTED,
    Decoded,
    FromPrior,
    Given,
    OnPolicy,
    Pool,
    Replay,
    Turn,
    at_most,
    default_source,
    require_sound,
)
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.store import tensors_of
from tiltlm.testing import fixture_b, policy_with_law, small_language
from tiltlm.weights import group_mean

QUIET = {"lora": None, "batch": 1, "lr": 0.1}


@dataclass(frozen=True)
class LogVariance:
    """The squared log-variance loss: right for anybody's draws."""

    group: int = 8
    updates: int = 1
    claim = Claim(fixed_point="p*", objective="log-variance", data="any")

    def init(self, prompts):
        return None

    def loss(self, forward, scored, state):
        index = scored.draws.prompt_index
        log_w = scored.log_target - forward.log_q.sum(-1)
        return (log_w - group_mean(log_w, index, int(index.max()) + 1)[index]).square().mean() / 2, {}


def three_prompts():
    world = small_language()
    prompts = world.prior.encode(["0", "1", "0"])
    return world.target, prompts


class TestRecords:
    def test_prompts_know_their_rows_through_selections(self):
        _, prompts = three_prompts()
        assert prompts.select([2, 0]).select([1]).rows.tolist() == [0]

    def test_of_is_the_inverse_of_among(self, rng):
        target, prompts = three_prompts()
        scored = target.score(target.prior.draw(prompts.select([2, 1]), 3, rng))
        back = scored.among(prompts, [2, 1]).of([2, 1])
        assert back.draws.tokens.equal(scored.draws.tokens)
        assert back.draws.prompt_index.tolist() == scored.draws.prompt_index.tolist()
        assert back.draws.prompts.rows.tolist() == [2, 1]

    def test_pairs_follow_their_rows(self, rng):
        target, prompts = three_prompts()
        scored = replace(target.score(target.prior.draw(prompts, 2, rng)), pairs=torch.tensor([[0, 1], [3, 2], [4, 5]]))
        assert scored.select(torch.tensor([3, 2, 0])).pairs.tolist() == [[0, 1]]
        assert scored.of([2]).pairs.tolist() == [[0, 1]]
        both = tl.Scored.concatenate([scored, scored])
        assert both.pairs.tolist()[3:] == [[6, 7], [9, 8], [10, 11]]
        assert tl.Scored.concatenate([replace(scored, pairs=None), scored]).pairs.tolist() == [[6, 7], [9, 8], [10, 11]]


class TestAtMost:
    def test_takes_no_more_than_there_is_and_chooses_evenly(self, rng):
        target, prompts = three_prompts()
        scored = target.score(target.prior.draw(prompts, 5, rng))
        few = replace(scored.select(torch.arange(6)), log_evidence=torch.arange(6.0, dtype=torch.float64))
        assert at_most(few, 2, rng).draws.prompt_index.tolist() == [0, 0, 1]
        picks = torch.zeros(5)
        for _ in range(3000):
            picks[at_most(few, 2, rng).log_evidence[:2].long()] += 1
        assert (picks / 3000 - 0.4).abs().max() < 0.05


class TestSources:
    def test_pool_gives_the_draws_that_are_there(self, rng):
        target, prompts = three_prompts()
        scored = target.score(target.prior.draw(prompts, 6, rng))
        stream = Pool(scored).open(target.at(0.1), target.prior, prompts, 0)
        batch = stream.batch(Turn([2, 0], 4, rng))
        assert batch.drawn == 0
        assert batch.scored.draws.prompt_index.bincount().tolist() == [4, 4]
        assert batch.scored.draws.prompts.rows.tolist() == [2, 0]
        assert batch.scored.beta == 0.1

    def test_pool_of_other_prompts_is_refused(self, rng):
        target, prompts = three_prompts()
        scored = target.score(target.prior.draw(prompts.select([0]), 6, rng))
        with pytest.raises(tl.InputError, match="draws for 1 prompts that are not the 3"):
            Pool(scored).open(target, target.prior, prompts, 0)

    def test_decoded_gives_samples_of_the_engine(self, rng):
        target, prompts = three_prompts()
        exact = ex.posterior(target, prompts)
        stream = Decoded(tl.Rejection(n=400)).open(target, target.prior, prompts.select([0]), 0)
        batch = stream.batch(Turn([0], 4000, rng))
        assert batch.drawn == 400
        mean = float((target.beta * batch.scored.log_evidence).mean())
        assert mean == pytest.approx(exact.mean_reward(exact.log_posterior), abs=0.15)
        assert mean > exact.mean_reward(exact.log_prior) + 0.2

    def test_replay_remembers_the_law_that_drew(self, rng):
        world = fixture_b()
        policy = world.prior.policy(lora=None)
        stream = Replay(old=3, capacity=4).open(world.target, policy, world.prompts, 0)
        first = stream.batch(Turn([0], 2, rng))
        assert len(first.scored) == 2
        with torch.no_grad():
            next(iter(policy.named_parameters().values())).mul_(0.5)
        second = stream.batch(Turn([0], 2, rng))
        assert len(second.fresh) == 2
        assert second.drawn == 2
        assert set(second.scored.draws.log_prob[2:].tolist()) == set(first.scored.draws.log_prob.tolist())
        for _ in range(4):
            batch = stream.batch(Turn([0], 2, rng))
        assert len(batch.scored) == 5
        assert len(stream.memory()[1]["texts"]) == 4

    def test_every_update_gets_other_old_draws_beside_the_same_fresh_ones(self, rng):
        target, prompts = three_prompts()
        stream = Replay(old=2, capacity=64).open(target, target.prior.policy(lora=None), prompts, 0)
        for _ in range(6):
            batch = stream.batch(Turn([2, 0], 3, rng))
        later = [stream.again(batch, Turn([2, 0], 3, rng)) for _ in range(8)]
        assert all(scored.draws.prompts is batch.scored.draws.prompts for scored in later)
        assert all(scored.log_evidence[:6].equal(batch.fresh.log_evidence) for scored in later)
        assert len({tuple(scored.draws.log_prob[6:].tolist()) for scored in later}) > 1
        assert later[0].draws.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]

    def test_memory_keeps_the_newest_of_each_prompt_whole(self, rng):
        target, prompts = three_prompts()
        draws = target.score(target.prior.draw(prompts, 7, rng))
        memory = DrawMemory(prompts, capacity=3)
        assert memory.sample([0], 2, rng) is None
        for step in range(7):  # prompt 1 sits out the last two steps
            rows = [7 * p + step for p in range(3) if p != 1 or step < 5]
            memory.add(draws.select(torch.tensor(rows)))
        held = memory.everything()
        assert len(memory) == len(held) == 9
        newest = torch.tensor([*range(4, 7), *range(9, 12), *range(18, 21)])
        for name, expected in tensors_of(draws.select(newest))[0].items():
            assert held_tensor(held, name, expected).equal(expected)
        assert held.draws.texts == draws.select(newest).draws.texts
        some = memory.sample([1], 2, rng)
        assert some.draws.prompts.texts == prompts.select([1]).texts
        assert set(some.draws.log_prob.tolist()) <= set(draws.draws.log_prob[9:12].tolist())

    @pytest.mark.parametrize("share", [0.3, -0.3])
    def test_the_proposal_moves_up_only_towards_the_posterior(self, share, rng):
        """The policy is put some way towards p*, or away from it, and the exact KLs say whether the copy should follow."""
        world = fixture_b()
        exact = ex.posterior(world.target, world.prompts)
        law = exact.log_prior + share * (exact.log_posterior - exact.log_prior)
        policy = policy_with_law(world, law.log_softmax(-1))
        ((name, table),) = policy.named_parameters().items()
        there = table.detach().clone()
        with torch.no_grad():
            table.copy_(world.prior.policy(lora=None).named_parameters()[name])
        stream = Lagging(every=2).open(world.target, policy, world.prompts, 0)
        for _ in range(2):
            batch = stream.batch(Turn([0], 4000, rng))
            assert batch.scored.log_prior.allclose(batch.scored.draws.log_q)  # the copy is the prior
            with torch.no_grad():
                table.copy_(there)
        nearer = ex.kl(exact.log_posterior, exact.log_prob(policy)) < ex.kl(exact.log_posterior, exact.log_prior)
        assert nearer == (share > 0)
        renewed = stream.batch(Turn([0], 8, rng)).scored.draws
        assert policy.log_prob(renewed).allclose(renewed.log_q) == nearer
        assert table.equal(there)

    def test_what_was_given_is_part_of_a_runs_identity(self, rng):
        world = fixture_b()
        first, second = (world.target.score(world.prior.draw(world.prompts, 8, rng)) for _ in range(2))
        assert Given(first).identity == Given(first).identity != Given(second).identity

    def test_replay_settings(self):
        with pytest.raises(tl.InputError, match="capacity at least old"):
            Replay(old=8, capacity=4)


def held_tensor(scored, name, like):
    """A record's tensor by its stored name, as wide as another."""
    tensor = tensors_of(scored)[0][name]
    return torch.nn.functional.pad(tensor, (0, like.shape[1] - tensor.shape[1])) if like.dim() == 2 else tensor


class TestSoundness:
    def test_every_claim_has_a_rule(self):
        assert set(typing.get_args(typing.get_type_hints(Claim)["data"])) == set(ACCEPTED)

    @pytest.mark.parametrize(
        "source", [Replay(), FromPrior(), Lagging(), Decoded(tl.Rejection())], ids=lambda s: type(s).__name__
    )
    def test_an_on_policy_loss_refuses_other_draws(self, source):
        with pytest.raises(tl.InputError, match="RLOO cannot learn from"):
            require_sound(tl.RLOO(), source)

    def test_defaults(self):
        assert isinstance(default_source(tl.RLOO().claim), OnPolicy)
        assert isinstance(default_source(Claim("p*", "", data="prior")), FromPrior)
        with pytest.raises(tl.InputError, match="pass source="):
            default_source(Claim("data", "", data="given"))

    def test_fit_refuses_before_anything_is_drawn(self):
        world = small_language()
        with pytest.raises(tl.InputError, match="leave source out"):
            tl.fit(world.target, world.prompts, tl.RLOO(), source=Replay(), steps=1, **QUIET)


class TestTraining:
    @pytest.mark.parametrize(
        "source",
        [OnPolicy(), FromPrior(), Replay(), Lagging(), Ahead(), Ahead(reweigh=False), Decoded(tl.Importance(n=32))],
        ids=str,
    )
    def test_a_loss_that_is_right_for_any_draws_gets_there_from_all(self, source):
        world = fixture_b()
        exact = ex.posterior(world.target, world.prompts)
        start = ex.kl(exact.log_prior, exact.log_posterior)
        policy = tl.fit(world.target, world.prompts, LogVariance(), source=source, steps=80, **QUIET)
        end = ex.kl(exact.log_prob(policy), exact.log_posterior)
        assert end < (0.5 if isinstance(source, Decoded) else 0.25) * start  # resampled draws repeat each other

    def test_given_completions(self, rng):
        world = fixture_b()
        scored = world.target.score(world.prior.draw(world.prompts, 64, rng))
        policy = tl.fit(world.target, world.prompts, LogVariance(), source=Given(scored), steps=60, **QUIET)
        exact = ex.posterior(world.target, world.prompts)
        assert ex.kl(exact.log_prob(policy), exact.log_posterior) < 0.3

    @pytest.mark.parametrize(
        "source",
        [Replay(old=4, capacity=12), Lagging(3), Lagging(4, adaptive=False), Ahead(), Ahead(reweigh=False)],
        ids=str,
    )
    def test_a_resumed_run_has_its_source_as_it_was(self, source, tmp_path):
        """Ten steps in one go, or five and five after a crash: the same weights, bit for bit."""
        world = fixture_b()
        common = {**QUIET, "source": source, "checkpoint_every": 5}
        whole = tl.fit(world.target, world.prompts, LogVariance(), steps=10, out=tmp_path / "whole", **common)

        class Crash(Exception):
            pass

        calls = []

        @dataclass(frozen=True, repr=False)
        class Crashing(LogVariance):
            def __repr__(self):
                return repr(LogVariance())

            def loss(self, forward, scored, state):
                calls.append(1)
                if len(calls) == 8:
                    raise Crash
                return super().loss(forward, scored, state)

        with pytest.raises(Crash):
            tl.fit(world.target, world.prompts, Crashing(), steps=10, out=tmp_path / "parts", **common)
        parts = tl.fit(
            world.target, world.prompts, LogVariance(), steps=10, out=tmp_path / "parts", resume=True, **common
        )
        for name, value in whole.named_parameters().items():
            assert value.equal(parts.named_parameters()[name])

    @pytest.mark.parametrize("source", [Replay(old=4, capacity=12), Lagging(8)], ids=str)
    def test_all_that_a_stream_holds_is_remembered(self, source, rng):
        """Copy, step and the draws since the last look: whatever a later decision rests on."""
        target, prompts = three_prompts()
        policy = target.prior.policy(lora=None)
        stream, other = (source.open(target, policy, prompts, 0) for _ in range(2))
        for index in ([0, 1], [2, 0], [1, 2]):
            stream.batch(Turn(index, 4, rng))
        tensors, values = stream.memory()
        other.remember(tensors, values)
        again, found = other.memory()
        assert found == values
        assert tensors.keys() == again.keys()
        assert all(value.equal(again[name]) for name, value in tensors.items())
        if isinstance(source, Lagging):
            assert any(name.startswith("seen.") for name in again)

    def test_a_limit_of_seconds_ends_training(self, tmp_path):
        world = small_language()
        tl.fit(world.target, world.prompts, steps=100_000, seconds=0.5, out=tmp_path, **QUIET)
        steps = len((tmp_path / "metrics.jsonl").read_text().splitlines())
        assert 1 <= steps < 5000


def test_a_policy_with_a_value_head_trains_and_saves_it(tmp_path):
    """The value head learns beside the policy, at its own rate, and does not move it."""

    @dataclass(frozen=True)
    class Values(tl.RLOO):
        claim = Claim("p*", "KL(q||p*)", needs=frozenset({"log_q", "values"}))

        def loss(self, forward, scored, state=None):
            policy, info = super().loss(forward, scored, state)
            error = (forward.values - 3.0) * scored.draws.mask
            return policy + error.square().sum() / scored.draws.mask.sum(), info

    world = fixture_b()
    with_values = tl.fit(world.target, world.prompts, Values(), steps=70, engine_lr=0.03, schedule="constant", **QUIET)
    without = tl.fit(world.target, world.prompts, tl.RLOO(), steps=70, schedule="constant", **QUIET)
    draws = without.draw(world.prompts, 4, torch.Generator().manual_seed(0))
    values = with_values.forward(draws, frozenset({"values"})).values
    assert (values[draws.mask] - 3.0).abs().max() < 0.3
    assert with_values.named_parameters()["table"].equal(without.named_parameters()["table"])
    with_values.save(tmp_path / "policy")
    assert (tmp_path / "policy" / "value_head.safetensors").is_file()
    with pytest.raises(tl.InputError, match="no value head"):
        without.forward(draws, frozenset({"values"}))
