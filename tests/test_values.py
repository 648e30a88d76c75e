"""Value learning: engines proved on tables, refuted where they must be, and the critic on real models."""

import contextlib
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.inference.accumulate import accumulate
from tiltlm.inference.monitor import Monitor
from tiltlm.inference.optimise import Optimiser
from tiltlm.inference.source import Replay
from tiltlm.inference.training.values import soft_value_regression as svr
from tiltlm.inference.training.values.contrastive_twist import ContrastiveTwist
from tiltlm.inference.training.values.controlled_decoding import ControlledDecoding
from tiltlm.inference.training.values.dqn import DQN
from tiltlm.inference.training.values.fudge import EDGE, Fudge, log_failure
from tiltlm.inference.training.values.q_learning import QLearning
from tiltlm.inference.training.values.sarsa import SARSA
from tiltlm.inference.training.values.soft_q_learning import SoftQLearning
from tiltlm.inference.training.values.soft_sarsa import SoftSARSA
from tiltlm.inference.training.values.soft_value_regression import SoftValueRegression, squared_weight
from tiltlm.inference.training.values.temporal import lambda_return, per_completion, squared
from tiltlm.lm.load import load
from tiltlm.posterior import exact as ex
from tiltlm.posterior.values import Tree, max_backup, prior_backup, soft_backup
from tiltlm.protocols import Claim
from tiltlm.records import Forward
from tiltlm.testing import ClaimRefuted, check_engine, examine, fixture_a, fixture_b, small_language, tabular_tokenizer
from tiltlm.testing.values import Signals, behaviours, even, forward_of, settle_on_population, tree_of

ENGINES = {
    "soft-q": SoftQLearning(),
    "soft-q, one token ahead": SoftQLearning(trace=0.0),
    "soft-q, Monte Carlo": SoftQLearning(trace=1.0),
    "soft-sarsa": SoftSARSA(),
    "regression": SoftValueRegression(),
    "regression, squared": SoftValueRegression(regress=squared_weight),
    "fudge": Fudge(),
    "contrastive": ContrastiveTwist(),
    "controlled decoding": ControlledDecoding(),
    "sarsa": SARSA(),
    "q": QLearning(),
    "dqn": DQN(),
}
EVERYTHING = frozenset({"log_q", "q", "values", "q_target", "soft_target", "max_target", "double_target"})


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_claim_is_proved(engine):
    for check in check_engine(engine):
        print(check)


# --- false claims ---


def claiming(engine, **changes):
    """The same engine with another claim, settling wherever it does."""
    kind = type(f"False{type(engine).__name__}", (type(engine),), {"claim": replace(engine.claim, **changes)})
    return kind(**vars(engine))


@dataclass(frozen=True)
class BeyondTheEnd(SoftQLearning):
    """Bootstraps from the padding after a completion instead of taking its evidence."""

    def loss(self, forward, scored, state=None):
        longer = replace(scored.draws, mask=torch.ones_like(scored.draws.mask))
        goal = lambda_return(forward.soft_target, forward.q_target, replace(scored, draws=longer), self.trace)
        return per_completion(squared(forward.q - goal), scored), {}


@dataclass(frozen=True)
class WithItself(SoftValueRegression):
    """The scale is the prompt's mean, this draw included: it shrinks exactly the draws that are worth most."""

    def loss(self, forward, scored, state=None):
        log_phi = scored.log_evidence[:, None]
        scale = log_phi.logsumexp(0) - math.log(len(scored))
        return per_completion(self.regress(forward.q - scale, log_phi - scale), scored), {}


@dataclass(frozen=True)
class Unweighted(ContrastiveTwist):
    """Takes the draws for the posterior's and the prior's, whoever drew."""

    def loss(self, forward, scored, state=None):
        return super().loss(forward, replace(scored, draws=replace(scored.draws, log_q=scored.log_prior)), state)


@dataclass(frozen=True)
class MaximumOfTarget(SoftQLearning):
    """Calls the hard maximum soft."""

    claim = replace(SoftQLearning.claim, needs=frozenset({"q", "q_target", "max_target"}))

    def loss(self, forward, scored, state=None):
        return super().loss(replace(forward, soft_target=forward.max_target), scored, state)


FALSE = {
    "hard Q-learning reaches p*": claiming(QLearning(), fixed_point="p*"),
    "DQN reaches p*": claiming(DQN(), fixed_point="p*"),
    "SARSA without the KL reaches p*": claiming(SARSA(), fixed_point="p*"),
    "the expected reward's tilt is p*": claiming(ControlledDecoding(), fixed_point="p*"),
    "regression may see the policy's draws": claiming(SoftValueRegression(), data="on-policy"),
    "FUDGE may see the policy's draws": claiming(Fudge(), data="on-policy"),
    "soft SARSA may see any draws": claiming(SoftSARSA(), data="any"),
    "soft Q-learning is modest": claiming(SoftQLearning(), fixed_point="none"),
    "regression is modest": claiming(SoftValueRegression(), fixed_point="none"),
    "the contrast needs no weights": Unweighted(),
    "values beyond the end": BeyondTheEnd(),
    "a scale that knows the draw": WithItself(),
    "a hard maximum": MaximumOfTarget(),
    "the greedy value, by the mean": claiming(ControlledDecoding(), fixed_point="greedy"),
}


@pytest.mark.parametrize("engine", FALSE.values(), ids=FALSE)
def test_false_claim_is_refuted(engine):
    with pytest.raises(ClaimRefuted) as refusal:
        check_engine(engine)
    print(refusal.value)


def test_a_scale_without_this_draw_and_one_with_it():
    """The control above differs from the engine in one thing only."""
    failed = [c for c in examine(WithItself()) if not c.passed]
    assert any("vanishes at Q*" in c.name for c in failed)
    assert all(c.passed for c in examine(SoftValueRegression()))


def test_the_contrast_has_a_bias():
    """Self-normalised weights: at Q* the expected gradient is not zero, except for the critic's own draws."""
    tree = tree_of(small_language())
    best = tree.fixed_point(soft_backup)
    (_, own), (_, another) = behaviours(ContrastiveTwist.claim, tree)
    assert Signals(ContrastiveTwist(group=2), tree, best, own(best)).largest < 1e-12
    assert Signals(ContrastiveTwist(group=2), tree, best, another(best)).pull > 1e-3


# --- numbers ---


def test_soft_values_of_fixture_a():
    tree = tree_of(fixture_a())
    q = tree.fixed_point(soft_backup)
    first = [0.5 * float(q[tree.pairs.index((a,))]) for a in range(3)]
    assert_close(torch.tensor(first), torch.tensor([0.676332, 0.734342, 0.599125]), rtol=0, atol=5e-7)
    law = tree.log_tilted(q)
    first = [float(law[tree.pairs.index((a,))].exp()) for a in range(3)]
    assert_close(torch.tensor(first), torch.tensor([0.588557, 0.328108, 0.083335]), rtol=0, atol=5e-7)


def test_tree_agrees_with_the_exact_soft_values():
    for world in (fixture_b(), small_language()):
        tree = tree_of(world)
        soft = tree.exact.soft_values()
        q = tree.fixed_point(soft_backup)
        assert max(abs(float(v) - soft[p] / tree.exact.beta) for p, v in zip(tree.pairs, q, strict=True)) < 1e-12


def test_controlled_decoding_on_fixture_a():
    exact = ex.posterior(fixture_a().target, fixture_a().prompts)
    law = ControlledDecoding().settles_at(exact)
    assert abs(ex.kl(law, exact.log_posterior) - 0.10727) < 5e-6
    assert abs(exact.beta * exact.elbo(law) - 0.63383) < 5e-6


@pytest.mark.parametrize(("world", "log_z"), [(fixture_a, 1.374937057482), (fixture_b, 2.704975916076)])
def test_a_table_learns_log_z(world, log_z):
    tree = tree_of(world())
    q = settle_on_population(SoftQLearning(trace=0.0), tree)
    assert abs(float(soft_backup(tree.by_state(tree.log_prior), tree.by_state(q))[0]) - log_z) < 1e-9
    assert abs(ex.kl(tree.log_law(q), tree.exact.log_posterior)) < 1e-9


def test_the_greedy_law_is_the_limit_of_small_beta():
    tree = tree_of(fixture_b())
    hard = tree.fixed_point(max_backup) * tree.exact.beta
    gaps = []
    for beta in (0.1, 0.01, 0.001):
        soft = tree_of(fixture_b(beta)).fixed_point(soft_backup) * beta
        gaps.append(float((hard - soft).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.01


def test_jensen():
    """E[r / beta | s] <= V*(s), which is why the mean reward's tilt is another law."""
    tree = tree_of(fixture_a())
    assert float((tree.fixed_point(soft_backup) - tree.fixed_point(prior_backup)).min()) >= -1e-12


def test_lambda_return_by_hand():
    world = small_language()
    scored = ex.posterior(world.target, world.prompts).scored
    values, taken = (torch.randn(len(scored), 2, dtype=torch.float64) for _ in range(2))
    got = lambda_return(values, taken, scored, 0.25)
    for row in range(len(scored)):
        end = scored.log_evidence[row]
        if scored.draws.lengths[row] == 1:
            assert got[row, 0] == end
        else:
            assert got[row, 1] == end
            assert_close(got[row, 0], values[row, 1] + 0.25 * (end - taken[row, 1]))


# --- the critic on models ---


def gemma():
    """A model whose logits are capped, so that they are no linear function of the features."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        final_logit_softcapping=3.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return Gemma2ForCausalLM(config).eval()


def shaken(critic, size=0.3):
    """The critic with noise on its weights, its target network left where it is."""
    with torch.no_grad():
        for number, (name, value) in enumerate(critic.named_parameters().items()):
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
            unit = float(critic.head.unit) if "tilt" in name else 1.0
            value.add_(size * noise.to(value.dtype) * unit / 10)
    return critic


MODELS = {
    "llama": lambda: (load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=5), None),
    "warm": lambda: (load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=5, temperature=0.7), None),
    "lora": lambda: (load(make_model("qwen"), make_tokenizer()).prior(max_new_tokens=5, temperature=1.3), tl.LoRA(r=4)),
    "gpt2": lambda: (load(make_model("gpt2"), make_tokenizer()).prior(max_new_tokens=5), tl.LoRA(r=4)),
    "softcap": lambda: (load(gemma(), make_tokenizer()).prior(max_new_tokens=4), None),
    "table": lambda: (fixture_b().prior, None),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def critic(request):
    prior, lora = request.param()
    critic = prior.critic(lora=lora, seed=3)
    shaken(critic)
    critic.refresh_target(1.0)
    return shaken(critic)


def prompts_of(critic):
    texts = ["0", "1"] if critic.body.backbone.width == 3 else ["the film", "a quiet story of two friends"]
    return critic.encode(texts)


def test_the_critic_draws_the_law_that_it_scores(critic):
    draws = critic.draw(prompts_of(critic), 6, torch.Generator().manual_seed(0))
    assert_close(critic.log_prob(draws), draws.log_q, atol=2e-5, rtol=0)
    walk, log_q = critic.walk(draws.prompts, 6), torch.zeros(len(draws))
    for t in range(draws.tokens.shape[1]):
        log_q += torch.where(draws.mask[:, t], walk.log_probs().gather(-1, draws.tokens[:, t, None])[:, 0], 0.0)
        walk.extend(draws.tokens[:, t], draws.mask[:, t])
    assert_close(log_q.double(), draws.log_prob.double(), atol=5e-5, rtol=0)
    assert critic.token_kl(draws).max() > 0.01  # it is not the prior


def test_every_field_against_the_whole_vocabulary(critic):
    """Q of every token by scoring every token; from it what the chunked passes must give."""
    prior, draws = critic.prior, critic.draw(prompts_of(critic), 3, torch.Generator().manual_seed(0))
    forward = critic.forward(draws, EVERYTHING)
    vocabulary = critic.body.model.config.vocab_size
    told_apart = False
    for row in (0, 4):
        ids = draws.tokens[row][draws.mask[row]].tolist()
        for t in range(len(ids)):
            owner = torch.full((vocabulary,), int(draws.prompt_index[row]))
            every = prior.complete(draws.prompts, owner, [[*ids[:t], a] for a in range(vocabulary)])
            log_prior = every.log_q[:, t].double()
            each = critic.forward(every, frozenset({"q", "q_target"}))
            q, target = (
                torch.where(log_prior > -torch.inf, f[:, t].detach().double(), -torch.inf)
                for f in (each.q, each.q_target)
            )
            joint = log_prior + q
            expected = {
                "q": q[ids[t]],
                "q_target": target[ids[t]],
                "log_q": joint[ids[t]] - joint.logsumexp(0),
                "values": joint.logsumexp(0),
                "soft_target": (log_prior + target).logsumexp(0),
                "max_target": target.max(),
                "double_target": target[q.argmax()],
            }
            for name, value in expected.items():
                got = getattr(forward, name)[row, t].detach().double()
                assert abs(float(got - value)) < 1e-4, (name, t, float(got), float(value))
            told_apart |= bool(target[q.argmax()] < target.max() - 0.01)
    assert told_apart or vocabulary == 3  # the target network's best token is another than the critic's somewhere


def test_tokens_that_the_prior_rules_out_do_not_count():
    """Against the backups of the exact tree, which lists what is possible and nothing else."""
    world = fixture_b()
    critic, tree = shaken(world.prior.critic(lora=None), size=3.0), tree_of(world)
    critic.refresh_target(1.0)
    draws = replace(tree.exact.scored.draws, sampler="")
    with torch.no_grad():
        forward = critic.forward(draws, EVERYTHING)
        again = critic.forward(draws, frozenset({"q"}))
    q = tree.gathered(forward.q.double())
    log_prior, by_state = tree.by_state(tree.log_prior), tree.by_state(q)
    for name, backup in (("soft_target", soft_backup), ("max_target", max_backup), ("double_target", max_backup)):
        expected = tree.completions(backup(log_prior, by_state)[tree.state_of])
        assert_close(getattr(forward, name).double(), expected, atol=1e-5, rtol=0)
    assert_close(forward.log_q, tree.completions(tree.log_tilted(q)), atol=1e-5, rtol=0)
    assert_close(again.q, forward.q)
    prior = torch.tensor([[0.5, -torch.inf, 1.0]], dtype=torch.float64)
    look = critic.look(prior + 1.0, prior, critic.head)  # as of an adapter, where logits are the features
    assert_close(look.direction.isfinite().all(), torch.tensor(True))


def test_only_what_was_asked_for_has_a_gradient(critic):
    draws = critic.draw(prompts_of(critic), 2, torch.Generator().manual_seed(0))
    forward = critic.forward(draws, frozenset({"q", "soft_target"}))
    assert forward.q.requires_grad
    assert not forward.log_q.requires_grad
    assert not forward.soft_target.requires_grad
    assert forward.max_target is None
    forward.q.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.named_parameters().values())
    assert not any(v.requires_grad for v in critic.named_buffers().values())
    with pytest.raises(tl.InputError, match="kl"):
        critic.forward(draws, frozenset({"kl"}))


def test_the_twist_follows_its_rows(critic):
    draws = critic.draw(prompts_of(critic), 4, torch.Generator().manual_seed(0))
    forward = critic.forward(draws, frozenset({"q", "values"}))
    twist = critic.twist_walk(draws.prompts, 4)
    assert_close(twist.log_twist().double(), forward.values[:, 0].detach().double(), atol=2e-5, rtol=0)
    order = torch.tensor([5, 1, 1, 7, 0, 3, 2, 6])
    rows = torch.arange(len(draws))
    for t in range(draws.tokens.shape[1]):
        live, before = draws.mask[rows, t], twist.log_twist()
        twist.extend(draws.tokens[rows, t], live)
        assert torch.equal(twist.log_twist()[~live], before[~live])
        assert_close(twist.log_twist()[live].double(), forward.q[rows, t][live].detach().double(), atol=5e-5, rtol=0)
        if t == 1:
            before = twist.log_twist()
            twist.select(order)
            rows = rows[order]
            assert torch.equal(twist.log_twist(), before[order])


def test_a_new_critic_is_the_prior_and_has_no_values():
    for lora in (None, tl.LoRA(r=4)):
        prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=5)
        critic = prior.critic(lora=lora)
        draws = prior.draw(prior.encode(["the film"]), 4, torch.Generator().manual_seed(0))
        forward = critic.forward(draws, EVERYTHING)
        assert_close(forward.log_q, draws.log_q, atol=1e-5, rtol=0)
        for name in ("q", "values", "q_target", "soft_target", "max_target"):
            assert float(getattr(forward, name).detach().abs().max()) < 1e-5


def test_a_learning_rate_means_the_same_for_any_unembedding():
    """The same step of the head moves Q by the same nats, be the logits a hundred times as large."""
    found = []
    for scale in (1.0, 100.0):
        model = make_model("llama")
        model.lm_head.weight.data *= scale
        prior = load(model, make_tokenizer()).prior(max_new_tokens=5, temperature=scale**0.5)
        critic = prior.critic(lora=None)
        with torch.no_grad():
            critic.head.tilt.bias.fill_(1.0)
            draws = prior.complete(prior.encode(["the film"]), torch.tensor([0]), [[5, 6, 7, 8]])
            found.append(critic.forward(draws, frozenset({"q"})).q)
    assert_close(found[0], found[1])
    assert 1e-3 < float(found[0].abs().max()) < 2.0


def test_a_critic_of_an_adapted_prior():
    """Its reference is the prior with its adapter; with LoRA it starts from a copy of that adapter, which stays as it was."""
    lm = load(make_model("llama"), make_tokenizer())
    adapted = lm.prior(max_new_tokens=5)
    policy = adapted.policy(lora=tl.LoRA(r=4))
    with torch.no_grad():
        for value in policy.named_parameters().values():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    prior = replace(adapted, adapter=policy.adapter)
    draws = prior.draw(prior.encode(["the film"]), 4, torch.Generator().manual_seed(0))
    for lora in (None, tl.LoRA(r=4)):
        critic = prior.critic(lora=lora)
        assert_close(critic.log_prob(draws), draws.log_q, atol=1e-5, rtol=0)
        shaken(critic)
        assert_close(prior.log_prob(replace(draws, sampler="")), draws.log_q, atol=1e-5, rtol=0)
        assert (critic.log_prob(draws) - draws.log_q).abs().max() > 1e-3
        critic.discard()
        assert prior.adapter in prior.body.adapters.names


def test_half_precision_keeps_small_values_apart():
    """The tilt is taken from its own direction, not from a difference of logits that bfloat16 has rounded."""
    prior = load(make_model("llama").to(torch.bfloat16), make_tokenizer()).prior(max_new_tokens=5)
    critic = shaken(prior.critic(lora=None), size=0.02)
    critic.refresh_target(1.0)
    draws = prior.draw(prior.encode(["the film"]), 8, torch.Generator().manual_seed(0))
    forward = critic.forward(draws, EVERYTHING)
    exact = (
        load(make_model("llama").to(torch.bfloat16).float(), make_tokenizer()).prior(max_new_tokens=5).critic(lora=None)
    )
    exact.head.load_state_dict(critic.head.state_dict())
    truth = exact.forward(draws, frozenset({"q"})).q
    size = truth.detach().std()
    assert float((forward.q - truth).detach().abs().max()) < 0.2 * float(size)
    assert forward.q.dtype == torch.float32


# --- target network, saving, the loop ---


def test_the_target_is_what_the_critic_was(critic):
    draws = critic.draw(prompts_of(critic), 3, torch.Generator().manual_seed(0))
    critic.refresh_target(1.0)
    with torch.no_grad():
        before = critic.forward(draws, frozenset({"q", "values"}))
        shaken(critic)
        after = critic.forward(draws, EVERYTHING)
    assert_close(after.q_target, before.q)
    assert_close(after.soft_target.double(), before.values.double(), atol=2e-5, rtol=0)
    assert (after.q - before.q).abs().max() > 1e-3


def test_the_target_moves_by_its_rate(critic):
    online = {name: value.detach().clone() for name, value in critic.named_parameters().items()}
    before = {name: value.clone() for name, value in critic.named_buffers().items()}
    critic.refresh_target(0.25)
    for name, value in critic.named_buffers().items():
        there = online[name.removeprefix("target:")]
        assert_close(value, before[name] + 0.25 * (there - before[name]))
    assert {f"target:{name}" for name in online} == set(before)


def test_save_and_load(critic, tmp_path):
    critic.save(tmp_path)
    assert json.loads((tmp_path / "critic.json").read_text())["adapter"] == critic.has_adapter
    again = critic.prior.critic(lora=tl.LoRA(), start=tmp_path)
    draws = critic.draw(prompts_of(critic), 3, torch.Generator().manual_seed(0))
    mine, theirs = (c.forward(draws, frozenset({"q", "values"})) for c in (critic, again))
    assert_close(mine.q, theirs.q)
    assert_close(mine.values, theirs.values)
    assert again.has_adapter == critic.has_adapter


def test_loading_names_what_is_wrong(tmp_path):
    prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=5)
    with pytest.raises(tl.InputError, match="holds no critic"):
        prior.critic(start=tmp_path)
    prior.critic(lora=None).save(tmp_path)
    with pytest.warns(tl.TiltWarning, match="other weights"):
        load(make_model("llama", seed=1), make_tokenizer()).prior(max_new_tokens=5).critic(start=tmp_path)
    with pytest.raises(tl.InputError, match="other features"):
        small_language().prior.critic(start=tmp_path)
    with pytest.raises(tl.InputError, match="top_k is 5"):
        replace(prior, law=replace(prior.law, top_k=5)).critic()


def length_target(lora_seed=0, eos=1):
    """A tiny transformer with 781 completions of a prompt."""
    prior = load(make_model("llama", vocab=6, seed=lora_seed), tabular_tokenizer(6, eos)).prior(max_new_tokens=4)

    def reward(completion_ids):
        return [sum(t in (3, 4) for t in x) / 2 - 0.5 * (x[0] == 2) for x in completion_ids]

    return prior * tl.Reward(reward, beta=0.5, bounds=(-0.5, 2.0)), prior.encode(["0 2", "3 4"])


@pytest.mark.parametrize("engine", [SoftQLearning(group=4), SoftValueRegression(group=4), ContrastiveTwist(group=4)])
def test_micro_batches_do_not_change_the_gradient(engine):
    target, prompts = length_target()
    critic = shaken(target.prior.critic(lora=tl.LoRA(r=2)))
    sampler = target.prior if engine.claim.data == "prior" else critic
    scored = target.score(sampler.draw(prompts, 4, torch.Generator().manual_seed(0)))
    gradients = []
    for micro in (1000, 6):
        optimiser = Optimiser(critic.named_parameters(), 1e-3, 0.0)
        accumulate(critic, engine, scored, None, micro, optimiser, fresh=False)
        gradients.append({name: master.grad.clone() for name, master in optimiser.masters.items()})
        optimiser.adam.zero_grad()
    for name, whole in gradients[0].items():
        assert_close(gradients[1][name], whole, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_has_the_same_critic_and_target(tmp_path):
    def run(out, steps, resume):
        target, prompts = length_target()
        options = {
            "lora": tl.LoRA(r=2),
            "settings": tl.Training(steps=6, batch=1, checkpoint_every=2, schedule="constant"),
        }
        critic = target.prior.critic(lora=tl.LoRA(r=2))
        stop = Stop(steps)
        with contextlib.suppress(KeyboardInterrupt):
            tl.fit(
                target,
                prompts,
                SoftQLearning(group=2),
                policy=critic,
                source=Replay(old=2),
                out=out,
                resume=resume,
                monitor=stop,
                **options,
            )
        return {**critic.named_parameters(), **critic.named_buffers()}

    whole = run(tmp_path / "a", 6, resume=False)
    run(tmp_path / "b", 3, resume=False)
    again = run(tmp_path / "b", 6, resume=True)
    for name, value in whole.items():
        assert torch.equal(again[name], value), name
    assert whole["target:head:value.weight"].abs().max() > 0  # where it began
    assert any(
        not torch.equal(value, whole[name.removeprefix("target:")])
        for name, value in whole.items()
        if name[:7] == "target:"
    )


class Stop(Monitor):
    """Interrupts the run after so many steps."""

    def __init__(self, steps):
        super().__init__(quiet=True)
        self.steps = steps

    def log(self, step, metrics):
        super().log(step, metrics)
        if step == self.steps:
            raise KeyboardInterrupt


def learned(engine, lora, steps, **settings):
    """KL(pi_Q || p*) of both prompts before and after, and the critic's log Z minus the truth."""
    target, prompts = length_target()
    exact = [ex.posterior(target, prompts, number) for number in range(2)]
    settings = {"steps": steps, "batch": 2, "lr": 1e-3, "engine_lr": 2e-2} | settings
    critic = tl.fit(target, prompts, engine, lora=lora, monitor=Monitor(quiet=True), **settings)
    before = [ex.kl(x.log_prob(target.prior), x.log_posterior) for x in exact]
    after = [ex.kl(x.log_prob(critic), x.log_posterior) for x in exact]
    roots = [
        critic.forward(x.scored.draws.select(torch.tensor([0])), frozenset({"values"})).values[0, 0] for x in exact
    ]
    gaps = [float(root.detach()) - x.log_z for root, x in zip(roots, exact, strict=True)]
    print(type(engine).__name__, before, after, gaps)
    return sum(before), sum(after), gaps


def test_a_critic_on_frozen_features_learns_in_a_few_steps():
    before, after, _ = learned(SoftQLearning(), None, 25)
    assert after < 0.3 * before


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, tl.LoRA(r=4)], ids=["frozen", "lora"])
@pytest.mark.parametrize(
    "engine",
    [SoftQLearning(), SoftSARSA(), SoftValueRegression(), ContrastiveTwist(), Fudge()],
    ids=lambda e: type(e).__name__,
)
def test_soft_engines_approach_the_posterior(engine, lora):
    before, after, gaps = learned(engine, lora, 120)
    assert after < 0.15 * before
    assert max(map(abs, gaps)) < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("engine", [QLearning(), DQN()], ids=lambda e: type(e).__name__)
def test_hard_engines_find_the_best_completion_and_not_the_posterior(engine):
    _, after, gaps = learned(engine, None, 120)
    assert after > 0.15
    assert min(gaps) > 1.0


# --- bad input ---


def test_settings_name_the_remedy():
    for make, message in (
        (lambda: SoftQLearning(trace=1.5), "trace is 1.5"),
        (lambda: SoftSARSA(target_rate=0.0), "target_rate is 0.0"),
        (lambda: SoftValueRegression(group=1), "group is 1"),
        (lambda: ContrastiveTwist(group=1), "group is 1"),
        (lambda: ContrastiveTwist(anchor=0.0), "anchor is 0.0"),
        (lambda: Fudge(log_bound=math.inf), "log_bound is inf"),
    ):
        with pytest.raises(tl.InputError, match=message):
            make()


def test_evidence_that_no_value_can_follow():
    world = small_language()
    tree = tree_of(world)
    scored = tree.exact.scored

    forward = forward_of(tree, torch.zeros(len(tree.pairs), dtype=torch.float64))
    impossible = replace(scored, log_evidence=scored.log_evidence.index_fill(0, torch.tensor([2]), -torch.inf))
    with pytest.raises(tl.InputError, match="log_evidence is -inf"):
        SoftQLearning().loss(forward, impossible)
    loss, _ = SoftValueRegression().loss(forward, impossible)
    assert loss.isfinite()
    loss, _ = ContrastiveTwist().loss(forward, impossible)
    assert loss.isfinite()
    with pytest.raises(tl.InputError, match="log_bound"):
        Fudge(log_bound=0.5).loss(forward, scored)


def test_hard_constraints_are_learned_by_regression():
    """phi = 0 for some completions: exp Q* is the mean of the others' weight."""
    world = small_language()
    tree = tree_of(world)
    evidence = tree.exact.scored.log_evidence.clone()
    evidence[tree.exact.completions.index((0, 0))] = -torch.inf
    tree = Tree(replace(tree.exact, scored=replace(tree.exact.scored, log_evidence=evidence)))
    q = settle_on_population(ContrastiveTwist(), tree)
    finite = tree.fixed_point(soft_backup).isfinite()
    law, truth = tree.log_law(q).exp(), tree.exact.log_posterior.exp()
    assert float((law - truth).abs().max()) < 1e-3
    assert_close(q[finite], tree.fixed_point(soft_backup)[finite], atol=1e-3, rtol=0)


def test_scale_of_others():
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    scored = exact.scored.select(torch.tensor([0, 1, 2]))
    phi = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    got = svr.others_log_mean(phi.log(), scored).exp()
    assert_close(got, torch.tensor([3.0, 2.5, 1.5], dtype=torch.float64))
    alone = svr.others_log_mean(phi[:1].log(), scored.select(torch.tensor([0])))
    assert alone[0] == -torch.inf


def test_a_constant_of_a_length_is_open_but_for_the_anchor():
    tree = tree_of(small_language())
    scored = tree.exact.scored
    scored = replace(scored, draws=replace(scored.draws, log_q=even(tree), sampler=""))
    gradients = []
    for shift in torch.tensor([[0.0, 0.0], [0.7, -1.3]], dtype=torch.float64):
        q = (0.1 * torch.arange(14).view(7, 2).double() + shift).requires_grad_()
        for anchor in (1e-12, 1.0):
            loss, _ = ContrastiveTwist(anchor=anchor).loss(Forward(scored.log_prior, q=q), scored)
            gradients.append(torch.autograd.grad(loss, q)[0])
    assert_close(gradients[0], gradients[2], atol=1e-10, rtol=0)
    assert (gradients[1] - gradients[3]).abs().max() > 0.01


def test_failure_goes_on_as_its_tangent():
    log_p = torch.tensor([-2.0, -EDGE, -EDGE / 2, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    value = log_failure(log_p)
    (slope,) = torch.autograd.grad(value.sum(), log_p)
    assert_close(value[0].detach(), torch.tensor(1 - math.exp(-2.0), dtype=torch.float64).log())
    edge = -math.exp(-EDGE) / (1 - math.exp(-EDGE))
    assert_close(slope[2:], torch.full((3,), edge, dtype=torch.float64))
    assert_close(value[3] - value[2], torch.tensor(edge * EDGE / 2, dtype=torch.float64))


def test_sources_are_refused_by_the_claim():
    target, prompts = length_target()
    with pytest.raises(tl.InputError, match="SoftValueRegression"):
        tl.fit(target, prompts, SoftValueRegression(), source=Replay(), steps=1)
    with pytest.raises(tl.InputError, match="SoftSARSA"):
        tl.fit(target, prompts, SoftSARSA(), source=Replay(), steps=1)


def test_claims_are_what_they_say():
    assert {name for name, e in ENGINES.items() if e.claim.fixed_point != "p*"} == {
        "controlled decoding",
        "sarsa",
        "q",
        "dqn",
    }
    assert all(isinstance(e.claim, Claim) and "q" in e.claim.needs for e in ENGINES.values())
