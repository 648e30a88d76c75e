"""The token MDP as a gymnasium environment: it passes gymnasium's checker, and tabular agents find what they must."""

import math
from collections import defaultdict

import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.utils.env_checker import check_env  # noqa: E402

import tiltlm as tl  # noqa: E402
from conftest import make_model, make_tokenizer  # noqa: E402
from tiltlm.inference.environment import ID, TokenEnv  # noqa: E402
from tiltlm.lm.load import load  # noqa: E402
from tiltlm.posterior import exact as ex  # noqa: E402
from tiltlm.testing import fixture_b, small_language  # noqa: E402


def make(world):
    return gymnasium.make(ID, target=world.target, prompts=world.prompts)


def episode(env, choose, **reset):
    """One completion: its (state, action, next state) steps, the evidence, and the sum of log pi0."""
    observation, info = env.reset(**reset)
    steps, log_prior, reward, over = [], 0.0, 0.0, False
    while not over:
        state, ahead = key(observation), info["log_prior_next"]
        action = int(choose(state, ahead))
        observation, reward, over, truncated, info = env.step(action)
        assert not truncated
        assert info["log_prior"] == pytest.approx(ahead[action])
        steps.append((state, action, ahead, key(observation)))
        log_prior += info["log_prior"]
    return steps, reward, log_prior


def key(observation):
    return tuple(observation["tokens"][observation["mask"] == 1].tolist())


@pytest.mark.parametrize("world", [small_language(), fixture_b()], ids=["cut", "ended"])
def test_it_passes_the_checker_of_gymnasium(world):
    # fixture_b's impossible tokens have log pi0 = -inf, which is an outcome that the reward still judges
    check_env(gymnasium.make(ID, target=world.target, prompts=world.prompts).unwrapped)


def test_a_language_model_passes_too_and_the_model_is_not_copied():
    prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=6, stop=("a",))
    target = prior * tl.Reward(lambda completions: [-len(c) / 10 for c in completions], beta=0.2)
    env = gymnasium.make(ID, target=target, prompts=["the film", "a quiet story of two friends"], render_mode="ansi")
    check_env(env.unwrapped)
    assert env.unwrapped.target is target
    env.reset(options={"prompt": 1})
    assert env.render() == "<s>a quiet story of two friends"


def test_random_episodes_have_the_law_and_the_evidence_of_the_target():
    world = fixture_b()
    exact = ex.posterior(world.target, world.prompts)
    number = {c: k for k, c in enumerate(exact.completions)}
    env, rng = make(world), torch.Generator().manual_seed(0)

    def prior(_, ahead):
        return torch.multinomial(torch.as_tensor(ahead).exp(), 1, generator=rng)

    lengths = set()
    for seed in range(60):
        steps, reward, log_prior = episode(env, prior, seed=seed)
        k = number[steps[-1][3][1:]]
        assert reward == pytest.approx(float(exact.scored.log_evidence[k]), abs=1e-12)
        assert log_prior == pytest.approx(float(exact.log_prior[k]), abs=1e-12)
        lengths.add(len(steps))
    assert len(lengths) > 2


def learn(env, backup, episodes=100):
    """Tabular Q-learning; transitions are certain, so that each step replaces the old value."""
    q, ahead_of = defaultdict(float), {}
    tried = defaultdict(int)

    def explore(state, ahead):
        action = min((a for a in range(len(ahead)) if ahead[a] > -math.inf), key=lambda a: tried[state, a])
        tried[state, action] += 1
        return action

    for _ in range(episodes):
        steps, reward, _ = episode(env, explore)
        for state, action, ahead, following in reversed(steps):
            ahead_of[state] = ahead
            q[state, action] = backup(q, following, ahead_of[following]) if following in ahead_of else reward
    return q, ahead_of


def hard(q, state, ahead):
    return max(q[state, a] for a in range(len(ahead)) if ahead[a] > -math.inf)


def soft(q, state, ahead):
    return math.log(sum(math.exp(ahead[a] + q[state, a]) for a in range(len(ahead)) if ahead[a] > -math.inf))


@pytest.mark.parametrize("world", [small_language(), fixture_b()], ids=["small", "b"])
def test_tabular_agents(world):
    exact = ex.posterior(world.target, world.prompts)
    root = (0,)
    q, ahead_of = learn(make(world), hard)
    _, reward, _ = episode(
        make(world), lambda s, ahead: max(range(len(ahead)), key=lambda a: (ahead[a] > -math.inf, q[s, a]))
    )
    assert reward == pytest.approx(float(exact.scored.log_evidence.max()))
    assert hard(q, root, ahead_of[root]) == pytest.approx(reward)
    q, ahead_of = learn(make(world), soft)
    assert soft(q, root, ahead_of[root]) == pytest.approx(exact.log_z, abs=1e-9)


def test_bad_input():
    world = small_language()
    env = TokenEnv(world.target, world.prompts)
    with pytest.raises(tl.InputError, match=r"reset\(\)"):
        env.step(0)
    with pytest.raises(tl.InputError, match="prompt is 7"):
        env.reset(options={"prompt": 7})
