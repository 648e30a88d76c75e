"""Completions from a server that speaks vLLM's endpoints: the draws are our law's, the weights arrive, and faults are sentences.

The server is tests/serving.py, with a model of its own behind a socket. vLLM itself: tests/test_vllm.py.
"""

import json
import sys
from dataclasses import replace

import pytest
import torch

import tiltlm as tl
from conftest import settings, write
from serving import Serving
from tiltlm.inference.source import Turn
from tiltlm.lm.generators.protocol import Continuation
from tiltlm.posterior import exact as ex
from tiltlm.testing import fixture_b

PROMPTS = ["the film was", "a quiet story of two friends", "good"]
QUICK = {"retries": 0, "timeout": 20.0}


@pytest.fixture(scope="module")
def folder(models):
    return models / "base"


@pytest.fixture(scope="module")
def serving(folder):
    with Serving(folder) as server:
        yield server


@pytest.fixture
def server(serving):
    """The shared server, as new."""
    serving.log.clear()
    serving.adapters.clear()
    return serving


def prior_at(server, folder, *, tolerance=tl.Tolerance(), root=None, **law):
    generator = tl.VLLMServer(server.url, tolerance=tolerance, folder=root, **QUICK)
    return tl.load(folder).prior(**{"max_new_tokens": 8, **law}, generator=generator)


def move(policy, size, seed=0):
    with torch.no_grad():
        for weight in policy.named_parameters().values():
            weight.add_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return policy


class TestDraws:
    def test_tokens_go_as_ids_and_come_back_as_draws_of_our_law(self, server, folder, rng):
        prior = prior_at(server, folder)
        prompts = prior.encode(PROMPTS)
        draws = prior.draw_weighted(prompts, 5, rng)
        sent = sorted(tuple(body["prompt"]) for body in server.calls("/v1/completions"))
        assert sent == sorted(tuple(t[m].tolist()) for t, m in zip(prompts.tokens, prompts.mask, strict=True))
        assert len({body["seed"] for body in server.calls("/v1/completions")}) == 3
        assert draws.prompt_index.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        torch.testing.assert_close(draws.log_q, prior.log_prob(replace(draws, sampler="")), rtol=0, atol=1e-5)
        torch.testing.assert_close(draws.log_mu.float(), draws.log_q, rtol=0, atol=1e-4)
        assert (draws.log_mu[~draws.mask] == 0).all()
        for ids, keep, ended in zip(draws.tokens, draws.mask, draws.ended, strict=True):
            assert_complete(prior, ids[keep].tolist(), bool(ended))

    @pytest.mark.parametrize(
        "law", [{"temperature": 0.6}, {"top_k": 5}, {"temperature": 1.7, "top_k": 20}, {"max_new_tokens": 1}]
    )
    def test_temperature_and_top_k_mean_the_same_there(self, server, folder, rng, law):
        draws = prior_at(server, folder, **law).draw_weighted(prior_at(server, folder).encode(PROMPTS), 8, rng)
        assert tl.Mismatch.of(draws).largest < 1e-3

    @pytest.mark.parametrize("fault", [{}, {"deaf": True}, {"most": 3}, {"deaf": True, "most": 2}], ids=str)
    def test_a_completion_ends_where_our_law_ends_it_whatever_the_server_does(self, folder, rng, fault):
        with Serving(folder, **fault) as server:
            prior = prior_at(server, folder, stop=("o", "th"), max_new_tokens=10)
            draws = prior.draw_weighted(prior.encode(PROMPTS), 16, rng)
        assert 0.05 < draws.ended.double().mean() < 0.6
        assert tl.Mismatch.of(draws).largest < 1e-3
        for ids, keep, ended in zip(draws.tokens, draws.mask, draws.ended, strict=True):
            assert_complete(prior, ids[keep].tolist(), bool(ended))

    @pytest.mark.parametrize("fault", [{}, {"deaf": True}, {"most": 3}], ids=str)
    def test_a_special_token_goes_as_an_id_that_ends(self, folder, rng, fault):
        with Serving(folder, **fault) as server:
            prior = prior_at(server, folder, stop=("<s>", "o"), max_new_tokens=10)
            draws = prior.draw_weighted(prior.encode(PROMPTS), 64, rng)
            body = server.calls("/v1/completions")[0]
        assert (body["stop"], body["stop_token_ids"]) == (["o"], [1, 0])
        assert tl.Mismatch.of(draws).largest < 1e-3
        last = {int(ids[keep][-1]) for ids, keep in zip(draws.tokens, draws.mask, strict=True)}
        assert {0, 1} <= last
        for ids, keep, ended in zip(draws.tokens, draws.mask, draws.ended, strict=True):
            assert_complete(prior, ids[keep].tolist(), bool(ended))

    def test_the_same_seed_draws_the_same(self, server, folder):
        prior = prior_at(server, folder)
        prompts = prior.encode(PROMPTS)
        one, two, other = (prior.draw(prompts, 4, torch.Generator().manual_seed(s)) for s in (7, 7, 8))
        assert one.tokens.equal(two.tokens)
        assert one.texts != other.texts

    def test_without_a_generator_a_weighted_draw_is_a_draw(self, folder, rng):
        prior = tl.load(folder).prior(max_new_tokens=4)
        assert prior.draw_weighted(prior.encode(PROMPTS), 2, rng).log_mu is None


def assert_complete(view, ids, ended):
    """Ended exactly where our rule says, or cut at the law's length."""
    assert not any(view.ends(ids[:length]) for length in range(1, len(ids)))
    assert view.ends(ids) is ended
    assert ended or len(ids) == view.law.max_new_tokens


class FromAnotherLaw:
    """A generator on a tabular language that draws from a law of its own, and says so."""

    tolerance = tl.Tolerance(mean=9.0, ess=0.1, lost=0.5)

    def __init__(self, sampler):
        self.sampler = sampler

    def serve(self, view):
        return "table"

    def generate(self, requests, terms):
        found = []
        for request in requests:
            prompts = self.sampler.encode([" ".join(map(str, request.tokens))])
            draws = self.sampler.draw(prompts, request.n, torch.Generator().manual_seed(request.seed))
            rows = zip(draws.tokens, draws.mask, draws.log_q, strict=True)
            found.append(tuple(Continuation(tuple(t[m].tolist()), tuple(q[m].tolist())) for t, m, q in rows))
        return found

    def close(self):
        """It holds nothing."""


class TestExactDraws:
    """`draw` gives draws of our law although another one drew; without the correction they are not (fixture B, known in closed form)."""

    def truth(self, size):
        world = fixture_b()
        other = world.prior.policy(lora=None)
        move(other, size)
        exact = ex.posterior(world.target, world.prompts)
        return world, replace(world.prior, generator=FromAnotherLaw(other)), exact

    def test_they_have_our_law(self, rng):
        world, prior, exact = self.truth(0.25)
        draws = prior.draw(world.prompts, 2500, rng)
        assert len(draws) == 2500
        assert draws.log_mu is None
        assert draws.sampler == prior.identity
        rough = replace(prior.draw_weighted(world.prompts, 2500, rng), log_mu=None)
        place = {ids: row for row, ids in enumerate(exact.completions)}
        error = {}
        for name, some in (("exact", draws), ("as they come", rough)):
            seen = torch.zeros(len(place), dtype=torch.float64)
            for ids, keep in zip(some.tokens, some.mask, strict=True):
                seen[place[tuple(ids[keep].tolist())]] += 1
            expected = 2500 * exact.log_prior.exp()
            error[name] = float(((seen - expected) ** 2 / expected).sum()) / (
                len(place) - 1
            )  # chi-squared a degree of freedom
        assert error["exact"] < 1.6, error
        assert error["as they come"] > 2 * error["exact"], error

    def test_the_certificate_is_that_of_our_policy(self):
        """Certified through another law's draws, the ELBO is the policy's own: within 4 standard errors of the truth."""
        world, prior, exact = self.truth(0.25)
        policy = move(prior.policy(lora=None), 0.5, seed=1)
        assert policy.generator is prior.generator
        certificate = tl.certify(policy, world.target, world.prompts, samples=2000)
        truth = exact.elbo(exact.log_prob(policy))
        assert certificate.elbo.value == pytest.approx(truth, abs=4 * certificate.elbo.stderr)
        assert certificate.elbo.stderr < 0.05
        kl = exact.log_z - truth
        assert certificate.kl_posterior.low - 0.02 <= kl <= certificate.kl_posterior.high + 0.02

    def test_each_prompt_gets_what_was_asked_for(self, server, folder, rng):
        prior = prior_at(server, folder)
        draws = prior.draw(prior.encode(PROMPTS), 3, rng)
        assert draws.prompt_index.tolist() == [0] * 3 + [1] * 3 + [2] * 3


class TestWeights:
    def test_a_policy_that_has_moved_is_what_is_drawn_from(self, server, folder, rng, tmp_path):
        prior = prior_at(server, folder, root=tmp_path)
        policy = move(prior.policy(lora=tl.LoRA(4)), 0.1)
        prompts = prior.encode(PROMPTS)
        for turn in range(3):
            before = len(server.calls("/v1/load_lora_adapter"))
            for _ in range(2):
                assert tl.Mismatch.of(policy.draw_weighted(prompts, 4, rng)).largest < 1e-3
            assert len(server.calls("/v1/load_lora_adapter")) == before + 1  # unchanged weights stay
            assert len(server.adapters) == len(list(tmp_path.iterdir())) == 1  # and old ones go
            move(policy, 0.1, seed=turn + 1)
        names = [body["lora_name"] for body in server.calls("/v1/load_lora_adapter")]
        assert len(set(names)) == 3
        assert tl.Mismatch.of(prior.draw_weighted(prompts, 4, rng)).largest < 1e-3  # the base, without

    def test_all_weights_go_in_place_and_the_priors_come_back(self, folder, rng, tmp_path):
        with Serving(folder) as server:
            (tmp_path / "base").mkdir()  # somebody's own
            prior = prior_at(server, folder, root=tmp_path)
            policy = move(prior.policy(lora=None), 0.05)
            prompts = prior.encode(PROMPTS)
            for view in (policy, policy, prior, policy):
                assert tl.Mismatch.of(view.draw_weighted(prompts, 4, rng)).largest < 1e-3
            assert len(server.calls("/collective_rpc")) == len(server.calls("/reset_prefix_cache")) == 3
            assert (tmp_path / "base").is_dir()
            assert len(list(tmp_path.iterdir())) == 2

    def test_a_prior_with_an_adapter_of_its_own(self, server, folder, rng, tmp_path):
        move(tl.load(folder).prior().policy(lora=tl.LoRA(4)), 0.1).save(tmp_path / "adapter")
        generator = tl.VLLMServer(server.url, **QUICK)
        prior = tl.load(folder).prior(max_new_tokens=8, adapter=tmp_path / "adapter", generator=generator)
        assert tl.Mismatch.of(prior.draw_weighted(prior.encode(PROMPTS), 4, rng)).largest < 1e-3
        generator.close()

    def test_a_folder_has_another_name_there(self, server, folder, rng, tmp_path):
        (tmp_path / "there").symlink_to(tmp_path / "here")
        generator = tl.VLLMServer(server.url, folder=tmp_path / "here", remote_folder=tmp_path / "there", **QUICK)
        policy = tl.load(folder).prior(max_new_tokens=4, generator=generator).policy()
        policy.draw_weighted(policy.encode(PROMPTS), 1, rng)
        assert server.calls("/v1/load_lora_adapter")[0]["lora_path"].startswith(str(tmp_path / "there"))

    def test_a_stale_adapter_is_corrected_while_it_is_small_and_then_refused(self, folder, rng):
        with Serving(folder, stale=True) as server:
            prior = prior_at(server, folder)
            policy = move(prior.policy(lora=tl.LoRA(4)), 0.004)
            prompts = prior.encode(PROMPTS)
            found = tl.Mismatch.of(policy.draw_weighted(prompts, 16, rng))
            assert found.mean > 1e-4
            assert found.ess < 1
            move(policy, 0.5)
            with pytest.raises(tl.InputError, match="draws from another law than the model here.*newest adapter"):
                policy.draw_weighted(prompts, 16, rng)

    def test_a_critic_draws_for_itself(self, server, folder, rng):
        critic = prior_at(server, folder).critic(lora=None)
        critic.draw(critic.encode(PROMPTS), 2, rng)
        assert not server.log


def shifted_log_probs(choice):
    choice["logprobs"]["token_logprobs"] = [value - 0.5 for value in choice["logprobs"]["token_logprobs"]]
    return choice


def without(name):
    return lambda choice: {key: value for key, value in choice.items() if key != name}


def nothing(choice):
    return {**choice, "token_ids": [], "logprobs": {"token_logprobs": []}}


def a_token_short(choice):
    return {**choice, "token_ids": choice["token_ids"][:-1]}


WRONG = {
    "log-probabilities": (shifted_log_probs, "differs by 0.5 nats on average"),
    "no ids": (without("token_ids"), "completions without token ids or log-probabilities"),
    "no log-probabilities": (without("logprobs"), "completions without token ids or log-probabilities"),
    "a token short": (a_token_short, "not a log-probability for each token"),
    "nothing": (nothing, "stopped a completion after 0 of 8 tokens and does not go on"),
}


class TestFaults:
    @pytest.mark.parametrize(("mangle", "sentence"), WRONG.values(), ids=WRONG)
    def test_wrong_answers(self, folder, rng, mangle, sentence):
        with Serving(folder, mangle=mangle) as server:
            prior = prior_at(server, folder)
            with pytest.raises(tl.InputError, match=sentence):
                prior.draw(prior.encode(PROMPTS), 4, rng)

    def test_another_model(self, models, folder, rng):
        with Serving(models / "other") as server:
            prior = prior_at(server, folder)
            with pytest.raises(tl.InputError, match="draws from another law.*serves the same model"):
                prior.draw(prior.encode(PROMPTS), 16, rng)

    def test_a_server_that_is_down(self, folder, rng):
        with Serving(folder) as server:
            prior = prior_at(server, folder)
        with pytest.raises(
            tl.InputError, match=r"at http://127.0.0.1:\d+ cannot be reached .* start it with vllm serve"
        ):
            prior.draw(prior.encode(PROMPTS), 2, rng)

    def test_a_server_that_is_slow(self, folder, rng):
        with Serving(folder, seconds=1.0) as server:
            generator = tl.VLLMServer(server.url, timeout=0.2, retries=0)
            prior = tl.load(folder).prior(generator=generator)
            with pytest.raises(tl.InputError, match=r"did not answer /v1/models within 0.2 s; .* raise timeout"):
                prior.draw(prior.encode(PROMPTS), 2, rng)

    def test_a_server_that_may_not_change_its_weights(self, folder, rng):
        with Serving(folder, runtime_lora=False, dev_mode=False) as server:
            prior = prior_at(server, folder)
            prompts = prior.encode(PROMPTS)
            with pytest.raises(
                tl.InputError, match="refused /v1/load_lora_adapter .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve"
            ):
                prior.policy(lora=tl.LoRA(2)).draw_weighted(prompts, 2, rng)
            with pytest.raises(
                tl.InputError, match="refused /collective_rpc .*VLLM_SERVER_DEV_MODE=1 .* or train an adapter"
            ):
                move(prior.policy(lora=None), 0.01).draw_weighted(prompts, 2, rng)

    def test_what_is_not_there_or_too_long(self, server, folder, rng):
        named = tl.load(folder).prior(generator=tl.VLLMServer(server.url, "large", **QUICK))
        with pytest.raises(tl.InputError, match="serves tiny, not model 'large'"):
            named.draw(named.encode(PROMPTS), 1, rng)
        prior = prior_at(server, folder)
        long = prior.encode(["the film was good and the film was bad " * 10])
        with pytest.raises(tl.InputError, match="refused /v1/completions .400: This model's maximum context length"):
            prior.draw(long, 1, rng)

    def test_settings(self, server, folder, rng):
        with pytest.raises(tl.InputError, match="generator is 'localhost:8000'; give the address"):
            tl.VLLMServer("localhost:8000")
        with pytest.raises(tl.InputError, match="timeout is 0"):
            tl.VLLMServer("http://a", timeout=0)
        with pytest.raises(tl.InputError, match="concurrency is 0"):
            tl.VLLMServer("http://a", concurrency=0)
        with pytest.raises(tl.InputError, match="remote_folder is 'x' without a folder"):
            tl.VLLMServer("http://a", remote_folder="x")
        cold = prior_at(server, folder, temperature=0.001)
        with pytest.raises(tl.InputError, match="temperature is 0.001, and vLLM draws at no less than 0.01"):
            cold.draw(cold.encode(PROMPTS), 1, rng)

    def test_vllm_that_is_not_installed(self, folder, rng, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)  # in its environment it is
        prior = tl.load(folder).prior(generator=tl.VLLM())
        with pytest.raises(
            tl.InputError, match="generator is vllm, which is not installed here .* pip install 'tiltlm.vllm.'"
        ):
            prior.draw(prior.encode(PROMPTS), 1, rng)


class TestTheLoop:
    def test_training_over_http_logs_the_mismatch_and_wastes_no_draw(self, server, folder, tmp_path):
        prior = prior_at(server, folder)
        target = prior * tl.Reward(lambda completions: [len(set(c)) / 8 for c in completions], beta=0.2, bounds=(0, 4))
        policy = tl.fit(target, PROMPTS, tl.RLOO(group=4), steps=3, batch=2, lr=1e-2, lora=tl.LoRA(2), out=tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert all(line["mismatch/mean"] < 1e-4 and line["mismatch/ess"] > 0.999 for line in lines)
        assert all(line["drawn"] == 8 for line in lines)
        assert len(server.calls("/v1/load_lora_adapter")) == 3
        assert tl.certify(policy, target, PROMPTS, samples=8).kl_prior.value > 0

    def test_replay_keeps_the_law_that_drew(self, server, folder, rng):
        prior = prior_at(server, folder)
        target = prior * tl.Reward(lambda completions: [float(len(c)) for c in completions], beta=10.0)
        policy = prior.policy(lora=tl.LoRA(2))
        stream = tl.Replay(old=2).open(target, policy, prior.encode(PROMPTS), 0)
        first = stream.batch(Turn([0, 1], 3, rng))
        again = stream.batch(Turn([1, 0], 3, rng))
        assert first.fresh.draws.log_mu is not None
        assert again.scored.draws.log_mu.shape == again.scored.draws.log_q.shape


class TestCommands:
    def test_plan_train_certify_sample(self, cli, here, models):
        with Serving(models / "chat") as server:
            write(here / "recipe.yaml", settings(models, generator=server.url, generator_options={"retries": 0}))
            for command in (
                ("plan",),
                ("train",),
                ("certify",),
                ("sample", "--engine", "rejection"),
                ("sample", "--engine", "smc"),
            ):
                ended = cli(command[0], "recipe.yaml", *command[1:])
                assert ended.code == 0, ended.err
            assert server.calls("/v1/load_lora_adapter")
        lines = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
        assert all("mismatch/ess" in line for line in lines)

    def test_what_a_recipe_may_not_say(self, refused, here, models):
        recipe = "recipe.yaml"
        assert "generator is 'vlm'; write vllm, or the address" in refused("plan", recipe, "--generator", "vlm")
        assert "generator_options has 'n'" in refused(
            "plan", recipe, "--generator", "http://a", "--generator-options", "n=1"
        )
        assert "but generator is missing" in refused("plan", recipe, "--generator-options", "n=1")
        wrong = refused("plan", recipe, "--generator", "http://a", "--generator-options", "tolerance=3")
        assert "tolerance is 3; write it as {mean: …, ess: …, lost: …}" in wrong
        assert "cannot be reached" in refused(
            "plan", recipe, "--generator", "http://127.0.0.1:9", "--generator-options", "retries=0"
        )
