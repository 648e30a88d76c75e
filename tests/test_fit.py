"""The training loop: what a step is, and what it must not depend on."""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.inference import checkpoint
from tiltlm.inference.accumulate import accumulate
from tiltlm.inference.monitor import Monitor
from tiltlm.inference.optimise import Optimiser, learning_rate
from tiltlm.inference.source import batch_of
from tiltlm.lm.load import load
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.testing import fixture_a, fixture_b, language
from tiltlm.testing.fixtures import sine_logit
from tiltlm.weights import leave_one_out

PROMPTS = ["the film", "a quiet story of two friends", "good and bad"]
QUICK = {"steps": 4, "batch": 2, "lr": 1e-2, "warmup": 0}


def shortness(completions):
    return [-len(c) / 10 for c in completions]


def llama_target(max_new_tokens=8):
    return load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=max_new_tokens) * tl.Reward(
        shortness, beta=0.2
    )


def tabular(prompts=("0",), beta=0.5):
    """Three prompts with different laws, completions with an end."""
    return language(
        lambda prompt, prefix: [sine_logit(prefix, a, shift=prompt[0]) for a in range(3)],
        lambda x: math.cos(sum(i * t for i, t in enumerate(x, 1))),
        beta=beta,
        prompts=prompts,
        bounds=(-1.0, 1.0),
        depth=4,
        eos=2,
    )


def weights(policy):
    return {name: value.detach().clone() for name, value in policy.named_parameters().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(out):
    timed = ("seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


@dataclass(frozen=True)
class WithKL:
    """RLOO on the evidence with the exact per-token KL as a penalty."""

    group: int = 4
    updates: int = 1
    claim = Claim("none", "none", needs=frozenset({"log_q", "kl"}))

    def init(self, prompts):
        return None

    def loss(self, forward, scored, state=None):
        advantage = leave_one_out(scored.log_evidence, scored.draws.prompt_index)
        fit = -(advantage.to(forward.log_q.dtype) * forward.log_q.sum(-1)).mean()
        return fit + forward.kl.sum(-1).mean(), {"kl": forward.kl.detach().sum(-1)}


class LogZ(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_z = nn.Parameter(torch.zeros(()))
        self.register_buffer("batches", torch.zeros(()))


class TrajectoryBalance:
    """(log Z + log q - log pi0 - r / beta)^2 with a learned log Z; not a dataclass, because nothing asks for one."""

    claim = Claim("p*", "TB")

    def __init__(self, group=4, updates=1):
        self.group, self.updates = group, updates
        self.states = []

    def init(self, prompts):
        self.states.append(LogZ())
        return self.states[-1]

    def loss(self, forward, scored, state):
        state.batches += 1
        gap = state.log_z + forward.log_q.sum(-1) - scored.log_target
        return gap.square().mean(), {"log_z": state.log_z.detach()}


ENGINES = [tl.RLOO(group=4), WithKL(), TrajectoryBalance()]


def gradients(engine, target, prompts, micro_tokens, lora):
    policy = target.prior.policy(lora=lora, seed=1)
    with torch.no_grad():  # away from the prior, where the KL's gradient is zero
        for number, value in enumerate(policy.named_parameters().values()):
            value.add_(
                0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number), dtype=value.dtype)
            )
    draws = policy.draw(target.prior.encode(prompts), engine.group, torch.Generator().manual_seed(0))
    state = engine.init(draws.prompts)
    trained = dict(policy.named_parameters())
    if state is not None:
        trained |= dict(state.named_parameters())
    optimiser = Optimiser(trained, 1e-3, 0.0)
    for fresh in (True, False):
        loss, _ = accumulate(policy, engine, target.score(draws), state, micro_tokens, optimiser, fresh=fresh)
    return loss, {name: value.grad for name, value in optimiser.masters.items()}


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("micro_tokens", [1, 13])
def test_the_gradient_does_not_depend_on_micro_batches(engine, micro_tokens):
    whole_loss, whole = gradients(engine, llama_target(), PROMPTS, 10**6, tl.LoRA(r=2))
    loss, parts = gradients(engine, llama_target(), PROMPTS, micro_tokens, tl.LoRA(r=2))
    assert_close(loss, whole_loss, rtol=1e-5, atol=1e-6)
    for name, value in whole.items():
        assert value.abs().max() > 0, name
        assert_close(parts[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_nor_in_double_precision_to_the_last_digits(engine):
    world = tabular(("0", "1", "2"))
    _, whole = gradients(engine, world.target, world.prompts, 10**6, None)
    _, parts = gradients(engine, world.target, world.prompts, 3, None)
    for name, value in whole.items():
        assert_close(parts[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", [WithKL(updates=2), TrajectoryBalance(updates=2)], ids=lambda e: type(e).__name__)
def test_several_updates_a_batch_do_not_depend_on_micro_batches(engine):
    ends = []
    for micro_tokens in (10**6, 3):
        world = tabular(("0", "1", "2"))
        policy = tl.fit(world.target, world.prompts, engine, lora=None, micro_tokens=micro_tokens, **QUICK)
        ends.append(weights(policy)["table"])
    assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


def test_several_updates_a_batch_are_several_steps():
    ends = []
    for updates in (1, 2):
        world = tabular()
        engine = TrajectoryBalance(updates=updates)
        policy = tl.fit(world.target, world.prompts, engine, lora=None, steps=1, lr=1e-2, warmup=0)
        assert int(engine.states[0].batches) == updates
        ends.append(float((weights(policy)["table"] - world.prior.body.model.table).abs().max()))
    assert ends[1] > 1.5 * ends[0] > 0


@pytest.mark.parametrize("lora", [tl.LoRA(r=2), None], ids=["lora", "full"])
def test_one_step_changes_the_policy_and_never_the_prior(lora):
    target = llama_target()
    draws = target.prior.draw(target.prior.encode(PROMPTS), 2, torch.Generator().manual_seed(0))
    draws = replace(draws, sampler="")  # so that the prior does not recognise its own
    before = target.prior.log_prob(draws)
    start = weights(target.prior.policy(lora=lora))
    policy = tl.fit(target, PROMPTS, lora=lora, steps=1, warmup=0, lr=1e-2)
    changed = [name for name, value in weights(policy).items() if not torch.equal(value, start[name])]
    assert changed
    if lora is not None:
        assert all("lora_B" in name for name in changed)  # A has no gradient while B is zero
    assert torch.equal(target.prior.log_prob(draws), before)
    assert not torch.equal(policy.log_prob(draws), before)


def test_the_same_seed_is_the_same_run_and_another_is_another(tmp_path):
    ends = {}
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        policy = tl.fit(llama_target(), PROMPTS, lora=tl.LoRA(r=2), out=tmp_path / name, seed=seed, **QUICK)
        ends[name] = weights(policy)
    assert same(ends["a"], ends["b"])
    assert not same(ends["a"], ends["c"])
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    world = tabular()
    tl.fit(world.target, world.prompts, lora=None, steps=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("prompts", "size"), [(10, 4), (7, 7), (3, 5), (1, 4), (12, 5), (5, 1)])
def test_every_prompt_comes_once_an_epoch(prompts, size):
    steps = math.lcm(prompts, min(size, prompts)) // min(size, prompts)
    batches = [batch_of(step, prompts, size, seed=3) for step in range(steps)]
    assert all(len(batch) == min(size, prompts) for batch in batches)
    flat = [number for batch in batches for number in batch]
    for epoch in range(len(flat) // prompts):
        assert sorted(flat[epoch * prompts : (epoch + 1) * prompts]) == list(range(prompts))
    assert len(set(Counter(flat).values())) == 1


def test_the_order_of_prompts_depends_on_seed_and_epoch():
    def epoch(number, seed):
        return tuple(batch_of(number, 20, 20, seed))

    assert epoch(0, 0) == epoch(0, 0)
    assert len({epoch(0, 0), epoch(1, 0), epoch(0, 1)}) == 3


def test_learning_rates():
    def all_of(schedule, warmup=2, steps=6):
        return [learning_rate(step, steps, warmup, schedule) for step in range(steps)]

    assert all_of("constant") == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert all_of("linear") == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert all_of("cosine") == pytest.approx([1 / 3, 2 / 3, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    assert all_of("linear", warmup=0, steps=1) == [1.0]
    assert all(0 < rate <= 1 for rate in all_of("cosine", warmup=9))


def test_the_norm_is_clipped_and_the_one_before_is_reported():
    weight = nn.Parameter(torch.zeros(4))
    optimiser = Optimiser({"w": weight}, lr=0.1, weight_decay=0.0)
    seen = []
    optimiser.adam.step = lambda: seen.append(weight.grad.clone())
    weight.grad = torch.full((4,), 3.0)
    optimiser.gather()
    assert optimiser.step(clip=1.0, factor=1.0) == pytest.approx(6.0)
    assert seen[0].norm() == pytest.approx(1.0, rel=1e-4)


def test_a_gradient_that_is_not_finite_leaves_the_weights():
    weight = nn.Parameter(torch.ones(2))
    optimiser = Optimiser({"w": weight}, lr=0.1, weight_decay=0.0)
    weight.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(optimiser.step(clip=1.0, factor=1.0))
    assert weight.tolist() == [1, 1]
    assert weight.grad is None


def test_half_precision_weights_keep_what_rounding_would_lose():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimiser = Optimiser({"w": weight}, lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones(1, dtype=torch.bfloat16)
        optimiser.gather()
        optimiser.step(clip=1.0, factor=1.0)
    assert optimiser.masters["w"].item() == pytest.approx(0.99, abs=1e-3)
    assert weight.item() < 1


def test_certificates_land_in_the_metrics(tmp_path):
    world = tabular(("0", "1"))
    tl.fit(world.target, world.prompts, lora=None, out=tmp_path, steps=5, certify_every=2, certify_samples=8)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert ["certificate" in row for row in found] == [False, True, False, True, False]
    certificate = found[1]["certificate"]
    assert {"kl_posterior", "elbo", "log_z_lower", "ess", "diversity", "per_prompt"} <= set(certificate)
    assert certificate["samples_per_prompt"] == 8


def test_metrics_are_json_and_hold_what_a_person_watches(tmp_path):
    target = llama_target()
    tl.fit(target, PROMPTS, out=tmp_path, lora=tl.LoRA(r=2), **QUICK)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    last = json.loads(text.splitlines()[-1])
    expected = {
        "step",
        "reward",
        "kl_prior",
        "elbo",
        "loss",
        "grad_norm",
        "length",
        "truncated",
        "dropped",
        "tokens_per_second",
    }
    assert expected <= set(last)
    assert last["reward/shortness"] == pytest.approx(last["reward"])
    assert last["elbo"] == pytest.approx(last["reward"] / 0.2 - last["kl_prior"], abs=1e-4)


def test_training_stops_when_the_elbo_no_longer_grows(tmp_path):
    world = tabular(("0",))
    settings = {"steps": 50, "lr": 1e-12, "certify_every": 2, "certify_samples": 8, "patience": 2}
    tl.fit(world.target, world.prompts, lora=None, out=tmp_path, **settings)
    assert len(rows(tmp_path)) == 6  # the first certificate is the best, then two that are not better
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 6
    tl.fit(world.target, world.prompts, lora=None, out=tmp_path, resume=True, **settings)
    assert len(rows(tmp_path)) == 6


def test_rloo_comes_to_the_posterior():
    world = fixture_b()
    policy = tl.fit(
        world.target, world.prompts, tl.RLOO(group=64), lora=None, steps=300, batch=1, lr=0.05, schedule="cosine"
    )
    exact = ex.posterior(world.target, world.prompts)
    before = ex.kl(exact.log_prior, exact.log_posterior)
    after = ex.kl(exact.log_prob(policy), exact.log_posterior)
    print(f"KL(q||p*): {before:.3f} before, {after:.4f} after")
    assert before > 0.5
    assert after < 0.02


def test_an_engines_own_weights_are_trained():
    world = fixture_a()
    engine = TrajectoryBalance(group=32)
    policy = tl.fit(
        world.target, world.prompts, engine, lora=None, steps=250, batch=1, lr=0.05, engine_lr=0.05, schedule="cosine"
    )
    exact = ex.posterior(world.target, world.prompts)
    assert float(engine.states[0].log_z.detach()) == pytest.approx(exact.log_z, abs=0.05)
    assert ex.kl(exact.log_prob(policy), exact.log_posterior) < 0.05


def test_an_engines_own_weights_are_resumed(tmp_path):
    settings = {"steps": 8, "lr": 0.05, "checkpoint_every": 2, "lora": None}

    class Stop(Monitor):
        def log(self, step, metrics):
            super().log(step, metrics)
            if step == 5:
                raise KeyboardInterrupt

    def run(engine, out, **more):
        world = tabular()
        return weights(tl.fit(world.target, world.prompts, engine, out=out, **settings, **more))

    whole = TrajectoryBalance()
    through = run(whole, tmp_path / "whole")
    parts = TrajectoryBalance()
    with pytest.raises(KeyboardInterrupt):
        run(parts, tmp_path / "parts", monitor=Stop(tmp_path / "parts"))
    resumed = run(parts, tmp_path / "parts", resume=True)
    assert same(through, resumed)
    assert torch.equal(whole.states[0].log_z, parts.states[1].log_z)
    assert int(whole.states[0].batches) == int(parts.states[1].batches) == 8
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_a_step_of_which_nothing_is_left_is_an_error():
    world = tabular()
    nothing = tl.Reward(lambda completion_ids: [None] * len(completion_ids), on_error="drop")
    with pytest.raises(tl.InputError, match="every completion of a step was dropped"):
        tl.fit(world.prior * nothing, world.prompts, lora=None, steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0; it must be between"),
        ({"lr": math.nan}, "lr is nan"),
        ({"clip": 0.0}, "clip is 0.0; it must be positive"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; choose constant, linear, cosine"),
        ({"warmup": -1}, "warmup is -1; it must not be negative"),
        ({"patience": 3}, "patience is 3, but certify_every is 0"),
        ({"resume": True}, "resume is on, but there is no out folder"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    world = tabular()
    with pytest.raises(tl.InputError, match=message):
        tl.fit(world.target, world.prompts, lora=None, **changes)


def test_an_engine_by_its_name_is_refused():
    with pytest.raises(tl.InputError, match=r"engine is 'rloo'; give one such as RLOO\(\)"):
        tl.fit(tabular().target, tabular().prompts, "rloo", lora=None, steps=1)


@pytest.mark.parametrize(("reward", "steps", "said"), [("same", 12, 1), ("same", 4, 0), ("rarely", 12, 0)])
def test_rewards_that_do_not_differ_are_said_once(reward, steps, said, recwarn):
    """Prompts may differ in their rewards: nothing is learned where the completions of each are alike."""
    calls = []

    def same(prompts):
        return [float(prompt == "0") for prompt in prompts]

    def rarely(prompts):
        calls.append(1)
        values = same(prompts)
        return values if len(calls) < 5 else [*values[1:], 0.5]

    world = tabular(prompts=("0", "1"))
    target = world.prior * tl.Reward(same if reward == "same" else rarely, beta=0.5)
    tl.fit(target, world.prompts, tl.RLOO(group=2), lora=None, steps=steps, batch=2)
    found = [str(warning.message) for warning in recwarn if "nothing to learn but" in str(warning.message)]
    assert len(found) == said
    assert all("in 5 steps all completions of a prompt got the same reward" in message for message in found)


def test_settings_are_taken_as_a_whole_or_one_by_one():
    with pytest.raises(TypeError):
        tl.fit(tabular().target, ["0"], stepz=3)
    assert replace(tl.Training(steps=7), lr=0.1).steps == 7
