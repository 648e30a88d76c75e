"""Rewards beside the next draws: what runs when, that draws one update old count rightly, and that a cut changes nothing."""

import json
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tiltlm as tl
from conftest import make_model, make_tokenizer
from test_mismatch import World as Enumerated
from test_mismatch import shifted
from tiltlm.inference.ahead import Ahead
from tiltlm.inference.catalogue import training_engines
from tiltlm.inference.divided import require_divisible
from tiltlm.inference.monitor import Monitor
from tiltlm.inference.source import Turn, default_source, require_sound
from tiltlm.posterior import exact as ex
from tiltlm.testing import fixture_b, small_language
from tiltlm.world import World

PROMPTS = ["the film", "a quiet story", "two friends"]
SOON = 20.0
"""Seconds that a reward waits for what should happen beside it; reached only where a test fails."""


def shortness(completions):
    return [-len(text) / 20 for text in completions]


def target(reward=shortness, kind="gpt2", beta=0.2):
    lm = tl.load(make_model(kind), tokenizer=make_tokenizer())
    return lm.prior(max_new_tokens=5) * tl.Reward(reward, beta=beta)


def train(on, out=None, **changes):
    settings = {
        "engine": tl.RLOO(group=4),
        "source": Ahead(),
        "lora": None,
        "steps": 4,
        "batch": 2,
        "lr": 0.02,
        "checkpoint_every": 2,
        "monitor": Monitor(quiet=True, out=out),
    }
    return tl.fit(on, PROMPTS, out=out, **settings | changes)


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def turns(world, count, group=6):
    return [Turn([0], group, torch.Generator().manual_seed(step)) for step in range(count)]


def moved(policy, size):
    with torch.no_grad():
        for weight in policy.named_parameters().values():
            weight.add_(size * torch.arange(weight.numel(), dtype=weight.dtype).cos().view_as(weight))


class TestOrder:
    def test_a_reward_runs_while_the_next_completions_are_drawn(self, monkeypatch):
        """Each reward waits until the draws after its own have begun; in one thread it would wait for ever."""
        begun, late = threading.Semaphore(0), []

        def judge(completions):
            if len(late) < 2:  # beside the last nothing is drawn
                late.append(not begun.acquire(timeout=SOON))
            return shortness(completions)

        on = target(judge)
        policy = on.prior.policy(lora=None)
        own, count = type(policy).draw, iter(range(100))

        def draw(self, *args):
            if next(count):  # of the first nobody is judged yet
                begun.release()
            return own(self, *args)

        monkeypatch.setattr(type(policy), "draw", draw)
        train(on, policy=policy, steps=3)
        assert late == [False, False]

    def test_a_reward_runs_while_the_policy_is_updated(self):
        updated, late = threading.Semaphore(0), []

        def judge(completions):
            if late:  # the first are waited for by the first update
                late.append(not updated.acquire(timeout=SOON))
            late.append(False)
            return shortness(completions)

        class Told(Monitor):
            def log(self, step, metrics):
                updated.release()

        tl.fit(target(judge), PROMPTS, source=Ahead(), lora=None, steps=3, batch=2, monitor=Told(quiet=True))
        assert late
        assert not any(late)

    @pytest.mark.parametrize("asks", ["certificate", "gold"])
    def test_never_are_two_rewards_asked_for_at_a_time(self, tmp_path, asks):
        inside, most = [], []

        def judge(completions):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)  # longer than whoever asks next takes to draw
            inside.pop()
            return shortness(completions)

        more = {"gold": judge} if asks == "gold" else {"certify_every": 1, "certify_samples": 2}
        train(target(judge), tmp_path, checkpoint_every=100, **more)
        assert len(most) >= 8
        assert max(most) == 1

    def test_nothing_runs_once_training_is_over(self):
        threads = []

        def judge(completions):
            threads.append(threading.current_thread())
            time.sleep(0.05)
            return shortness(completions)

        train(target(judge), seconds=1e-3)  # over after one step, with the next one's rewards under way
        assert len(threads) == 2
        assert not any(thread.is_alive() for thread in threads)
        threads.clear()
        train(target(judge))
        assert len(threads) == 4  # a step's completions are judged once, and none are drawn in vain
        assert not any(thread.is_alive() for thread in threads)


class TestDraws:
    def test_they_are_of_the_policy_before_its_last_update_and_count_for_the_one_after(self):
        world = small_language()
        policy = world.prior.policy(lora=None)
        first, second = turns(world, 2)
        stream = Ahead().open(world.target, policy, world.prompts, 0)
        before = policy.draw(world.prompts.select([0]), 6, torch.Generator().manual_seed(1))
        stream.expect(second)
        now = stream.batch(first)
        assert now.scored.draws.log_mu.equal(now.scored.draws.log_q)  # nothing has moved yet
        moved(policy, 0.5)
        stream.expect(None)
        batch = stream.batch(second)
        draws = batch.scored.draws
        assert draws.tokens.equal(before.tokens)
        assert draws.log_mu.equal(before.log_q)
        assert draws.log_q.equal(policy.log_prob(replace(draws, sampler="")))
        assert not draws.log_q.equal(draws.log_mu)
        assert batch.fresh is batch.scored
        expected = world.target.score(before)
        assert batch.scored.log_prior.equal(expected.log_prior)
        assert batch.scored.log_evidence.equal(expected.log_evidence)

    def test_the_expected_gradient_is_that_of_fresh_draws(self):
        """Over everything that the law before the update can draw, by the stream itself and the loop's own gradient."""
        there = Enumerated(0.3)
        assert there.error(tl.RLOO(group=2)) < 1e-10
        stream = Ahead().open(there.world.target, there.policy, there.world.prompts, 0)
        by_stream = stream._reweighed(
            replace(there.scored(None), draws=replace(there.scored(None).draws, log_q=there.log_mu))
        )
        assert by_stream.draws.log_mu.equal(there.log_mu)
        torch.testing.assert_close(by_stream.draws.log_q.double(), there.log_q, rtol=1e-12, atol=1e-12)

    def test_engines_for_other_laws_get_the_draws_as_they_are(self):
        world = small_language()
        policy = world.prior.policy(lora=None)
        first, second = turns(world, 2)
        stream = Ahead(reweigh=False).open(world.target, policy, world.prompts, 0)
        stream.expect(second)
        stream.batch(first)
        before = policy.draw(world.prompts.select([0]), 6, torch.Generator().manual_seed(1))
        moved(policy, 0.5)
        stream.expect(None)
        draws = stream.batch(second).scored.draws
        assert draws.log_mu is None
        assert draws.log_q.equal(before.log_q)

    def test_what_the_reward_drops_is_left_out_and_counted(self, tmp_path):
        def some(completions):
            return [None if i == 0 else 0.1 * len(text) for i, text in enumerate(completions)]

        on = target()
        on = on.prior * tl.Reward(some, beta=0.2, on_error="drop")
        train(on, tmp_path, steps=2)
        assert [row["dropped"] for row in logged(tmp_path)] == [1, 1]
        assert [row["drawn"] for row in logged(tmp_path)] == [8, 8]

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_a_reward_that_reads_the_model_itself_waits_for_its_turn(self, kind):
        """The adapter is off for its passes and on for the policy's, whichever thread is at work."""
        lm = tl.load(make_model(kind), tokenizer=make_tokenizer())
        prior = lm.prior(max_new_tokens=5)
        found = []

        def remembered(completions, prompts):
            values = tl.rewards.Fluency(lm)(completions=completions, prompts=prompts)
            found.append((list(prompts), list(completions), values))
            return values

        train(prior * tl.Reward(remembered, beta=0.2), lora=tl.LoRA(r=2), steps=6)
        assert len(found) == 6
        for prompts, completions, values in found:
            again = tl.rewards.Fluency(lm)(completions=completions, prompts=prompts)
            assert again == pytest.approx(values, rel=1e-6)


class TestClaims:
    @pytest.mark.parametrize(
        "engine", [tl.RLOO(), tl.VarGrad(), tl.PPO(), tl.FDivergence()], ids=lambda e: type(e).__name__
    )
    def test_each_engine_gets_what_its_claim_covers(self, engine):
        source = Ahead.for_claim(engine.claim)
        assert source.reweigh is (engine.claim.data == "on-policy")
        require_sound(engine, source)

    @pytest.mark.parametrize("name", ["rloo", "reinforce", "grpo-tilt", "minimum-risk", "ppo"])
    def test_the_weights_give_an_engine_its_own_expected_gradient(self, name):
        """Those whose loss is a sum over completions, to rounding; minimum risk, which divides by its sample, nearly."""
        engine = training_engines()[name]
        values = "values" in engine.claim.needs
        there = Enumerated(
            0.3, policy=lambda world: shifted(world.prior.policy(lora=None, values=values), 0.4, torch.cos)
        )
        engine = replace(engine, group=1 if values else 2)
        own = there.expected_gradient(engine, corrected=False, by=there.log_q)

        def error(found):
            return max(float((found[n] - own[n]).abs().max() / own[n].abs().max().clamp(min=1e-12)) for n in own)

        # a value head is in single precision
        assert error(there.expected_gradient(engine)) < (1e-6 if name in ("ppo", "minimum-risk") else 1e-10)
        assert error(there.expected_gradient(engine, corrected=False)) > 0.05

    def test_what_no_claim_covers_is_refused(self):
        with pytest.raises(tl.InputError, match="source is Ahead, which RLOO cannot learn from"):
            require_sound(tl.RLOO(), Ahead(reweigh=False))
        prior_only = next(engine for engine in (tl.ControlledDecoding(), tl.Fudge()) if engine.claim.data == "prior")
        with pytest.raises(tl.InputError, match="source is Ahead"):
            require_sound(prior_only, Ahead())
        assert not isinstance(default_source(tl.RLOO().claim), Ahead)

    def test_several_processes_are_refused(self):
        with pytest.raises(tl.InputError, match="ahead is on, but 2 processes were launched"):
            require_divisible(Ahead(), World(rank=0, size=2), shard=False)

    def test_it_reaches_the_posterior(self):
        world = fixture_b()
        exact = ex.posterior(world.target, world.prompts)
        start = ex.kl(exact.log_prior, exact.log_posterior)
        settings = {"lora": None, "steps": 80, "batch": 1, "lr": 0.1, "monitor": Monitor(quiet=True)}
        policy = tl.fit(world.target, world.prompts, tl.RLOO(group=16), source=Ahead(), **settings)
        assert ex.kl(exact.log_prob(policy), exact.log_posterior) < 0.1 * start


class TestRuns:
    def test_a_run_that_was_cut_off_ends_with_the_same_weights(self, tmp_path):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        train(target(), whole, steps=6)

        class Cut(Monitor):
            def log(self, step, metrics):
                super().log(step, metrics)
                if step == 5:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(target(), cut, steps=6, monitor=Cut(quiet=True, out=cut))
        train(target(), cut, steps=6, resume=True)
        name = "checkpoints/step-000006/state.safetensors"
        a, b = load_file(whole / name), load_file(cut / name)
        assert a.keys() == b.keys()
        assert all(a[key].equal(b[key]) for key in a)
        assert [row["reward"] for row in logged(whole)] == [row["reward"] for row in logged(cut)]

    def test_a_reward_that_fails_ends_the_run_as_ever(self):
        def broken(completions):
            raise ValueError("no key")

        with pytest.raises(tl.InputError, match="no key"):
            train(target(broken))

    def test_the_log_says_what_was_waited_for_and_what_was_not(self, tmp_path):
        def judge(completions):
            time.sleep(0.05)
            return shortness(completions)

        train(target(judge), tmp_path)
        rows = logged(tmp_path)
        for row in rows:
            assert row["reward_calls/completions"] == 8
            assert row["seconds_reward"] + row["seconds_reward_beside"] >= 0.05
            assert {"mismatch/ess", "mismatch/kl"} <= row.keys()
        assert rows[0]["mismatch/ess"] == pytest.approx(1.0)

    def test_what_is_logged_is_of_the_law_that_drew(self, tmp_path):
        """Its draws have its mean reward, its KL and so its ELBO; those of the policy after it would belong to other draws."""
        seen = []

        class Seen(tl.RLOO):
            def loss(self, forward, scored, state):
                seen.append(scored)
                return super().loss(forward, scored, state)

        train(target(), tmp_path, engine=Seen(group=4))
        for row, scored in zip(logged(tmp_path), seen, strict=True):
            log_mu, log_q = (t.double().sum(-1) for t in (scored.draws.log_mu, scored.draws.log_q))
            log_prior = scored.log_prior.double().sum(-1)
            assert row["kl_prior"] == pytest.approx(float((log_mu - log_prior).mean()), abs=1e-6)
            assert row["elbo"] == pytest.approx(float((scored.log_evidence + log_prior - log_mu).mean()), abs=1e-5)
        assert not torch.allclose(log_mu, log_q)

    def test_an_update_that_goes_too_far_is_said(self):
        with pytest.warns(
            tl.TiltWarning, match="one update moved the policy so far that of the draws before it .* count"
        ):
            train(target(beta=0.001), lr=0.9, engine=tl.RLOO(group=32), warmup=0)

    def test_from_a_recipe(self, cli, refused, here):
        ended = cli("train", "recipe.yaml", "--ahead", "--engine", "rloo")
        assert ended.code == 0, ended
        assert "mismatch/ess" in logged(here / "run")[0]
        ended = cli("train", "recipe.yaml", "--ahead", "--engine", "var-grad", "--out", "other")
        assert ended.code == 0, ended
        assert "mismatch/ess" not in logged(here / "other")[0]
        assert "replay and ahead are ways to get completions" in refused(
            "train", "recipe.yaml", "--ahead", "--replay", "4"
        )
        assert "source is Ahead" in refused("train", "recipe.yaml", "--ahead", "--engine", "bond", "--out", "third")
