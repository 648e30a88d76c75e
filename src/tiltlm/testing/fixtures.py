"""Two small languages whose posterior is known in closed form, without random numbers.

Both draw on logit(prefix h, token a) = sin(1 + 2 a + sum_i i (h_i + 1)), i from 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.evidence import Reward
from tiltlm.lm.load import load
from tiltlm.lm.view import ModelPolicy, ModelPrior
from tiltlm.posterior.exact import posterior
from tiltlm.records import Prompts
from tiltlm.target import Target
from tiltlm.testing.tabular import Logit, TabularConfig, TabularLM, tabular_tokenizer


@dataclass(frozen=True)
class Language:
    """A target on a tabular model, and the prompts it is meant for."""

    target: Target
    prompts: Prompts

    @property
    def prior(self) -> ModelPrior:
        assert isinstance(self.target.prior, ModelPrior)
        return self.target.prior


def sine_logit(prefix: Sequence[int], token: int, shift: float = 0.0) -> float:
    """The fixtures' logit rule; `shift` makes other languages of the same kind."""
    return math.sin(1 + shift + 2 * token + sum(i * (h + 1) for i, h in enumerate(prefix, 1)))


def language(
    logits: Logit,
    reward: Callable[[tuple[int, ...]], float],
    *,
    beta: float,
    prompts: Sequence[str] = ("0",),
    bounds: tuple[float, float] | None = None,
    vocab_size: int = 3,
    depth: int = 4,
    prompt_length: int = 1,
    eos: int | None = None,
) -> Language:
    """A target on a tabular model.

    Args:
        logits: (prompt, prefix) -> logits of the next token.
        reward: completion ids, EOS included -> reward.
        prompts: written as the tokenizer does: numbers with spaces between.
    """
    model = TabularLM.from_function(
        logits, vocab_size=vocab_size, depth=depth, prompt_length=prompt_length, eos_token_id=eos
    )

    def tabular_reward(completion_ids: list[list[int]]) -> list[float]:
        return [reward(tuple(ids)) for ids in completion_ids]

    prior = load(model, tabular_tokenizer(vocab_size, eos)).prior(max_new_tokens=depth)
    return Language(prior * Reward(tabular_reward, beta=beta, bounds=bounds), prior.encode(list(prompts)))


def fixture_a(beta: float = 0.5) -> Language:
    """V = 3, completions of exactly 4 tokens; r = cos(sum_i i x_i) + 0.5 [x_4 = 2]. 30 rewards on 81 strings."""
    return language(
        lambda _, prefix: [sine_logit(prefix, a) for a in range(3)],
        lambda x: math.cos(sum(i * t for i, t in enumerate(x, 1))) + 0.5 * (len(x) == 4 and x[3] == 2),
        beta=beta,
        bounds=(-1.0, 1.5),
    )


def fixture_b(beta: float = 0.5) -> Language:
    """Tokens 0, 1 and EOS = 2; at most 4 tokens, then EOS is certain; r = cos(sum_i i x_i) + 0.3 |x without EOS|."""

    def logits(_: tuple[int, ...], prefix: tuple[int, ...]) -> list[float]:
        if len(prefix) == 4:
            return [-math.inf, -math.inf, 0.0]
        return [sine_logit(prefix, a) for a in range(3)]

    def reward(x: tuple[int, ...]) -> float:
        words = [t for t in x if t != 2]
        return math.cos(sum(i * t for i, t in enumerate(words, 1))) + 0.3 * len(words)

    return language(logits, reward, beta=beta, bounds=(-1.0, 2.2), depth=5, eos=2)


def small_language(beta: float = 0.7) -> Language:
    """7 strings, few enough to enumerate tuples of draws: tokens 0, 1 and EOS = 2, at most 2 of them, some cut."""
    return language(
        lambda prompt, prefix: [sine_logit(prefix, a, shift=prompt[0]) for a in range(3)],
        lambda x: math.cos(2 * sum(i * t for i, t in enumerate(x, 1))) + 0.4 * len(x),
        beta=beta,
        prompts=("0",),
        bounds=(-1.0, 2.0),
        depth=2,
        eos=2,
    )


def posterior_policy(world: Language) -> ModelPolicy:
    """A policy that is exactly p*, for every prompt."""
    laws = [posterior(world.target, world.prompts, number).log_posterior for number in range(len(world.prompts))]
    return policy_with_law(world, *laws)


def policy_with_law(world: Language, *log_laws: Tensor) -> ModelPolicy:
    """A policy that has the given law over the completions of each prompt, as `posterior` lists them.

    The probability of a token is the mass of what starts with it. A prefix without mass keeps the prior's logits.
    """
    policy = world.prior.policy(lora=None)
    model = policy.body.model
    assert isinstance(model, TabularLM)
    for number, log_law in enumerate(log_laws):
        listed = posterior(world.target, world.prompts, number).completions
        prompt = world.prompts.tokens[number][world.prompts.mask[number]].tolist()
        row = sum(token * model.config.vocab_size**i for i, token in enumerate(reversed(prompt)))
        mass = _prefix_mass(listed, log_law.exp().tolist())
        with torch.no_grad():
            for column, prefix in enumerate(_prefixes(model.config)):
                if mass.get(prefix, 0.0) > 0:
                    shares = [mass.get((*prefix, token), 0.0) for token in range(model.config.vocab_size)]
                    model.table[row, column] = torch.tensor(shares, dtype=torch.float64).log()
    return policy


def _prefix_mass(completions: Sequence[tuple[int, ...]], probability: Sequence[float]) -> dict[tuple[int, ...], float]:
    """The probability that a completion starts with each prefix."""
    mass: dict[tuple[int, ...], float] = {}
    for completion, share in zip(completions, probability, strict=True):
        for length in range(len(completion) + 1):
            mass[completion[:length]] = mass.get(completion[:length], 0.0) + share
    return mass


def _prefixes(config: TabularConfig) -> Iterator[tuple[int, ...]]:
    """The prefixes in the order of a `TabularLM`'s table."""
    tokens = range(config.vocab_size)
    return itertools.chain.from_iterable(itertools.product(tokens, repeat=n) for n in range(config.depth))
