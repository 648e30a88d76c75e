"""The other side of the SMC benchmark: genlm-control on its transformers backend, the same reward of the unfinished text as its critic.

A sequence that has all of its tokens is closed without a weight (`terminate_when`), as ours is cut: both estimate the same Z.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from common import BETA, answer, clock, prompts, quiet_stdout, reward_of, set_threads, smc_parser
from genlm.control import PromptedLLM, direct_token_sampler
from genlm.control.potential.base import Potential


class RewardOfText(Potential):
    """exp(r / beta) of the text so far, whether it is finished or not."""

    def __init__(self, llm: PromptedLLM, reward: Any) -> None:
        super().__init__(llm.vocab, tables=llm.tables)
        self.reward = reward

    def _log(self, contexts: Sequence[Sequence[Any]]) -> list[float]:
        texts = [b"".join(bytes(token) for token in some).decode("utf-8", "replace") for some in contexts]
        ids = [[token.token_id for token in some] for some in contexts]
        return [value / BETA for value in self.reward(texts, completion_ids=ids)]

    async def prefix(self, context: Sequence[Any]) -> float:
        return self._log([context])[0]

    async def complete(self, context: Sequence[Any]) -> float:
        return self._log([context])[0]

    async def batch_prefix(self, contexts: Sequence[Sequence[Any]]) -> Any:
        import numpy

        return numpy.array(self._log(contexts))

    async def batch_complete(self, contexts: Sequence[Sequence[Any]]) -> Any:
        return await self.batch_prefix(contexts)


def main() -> None:
    arguments = smc_parser(__doc__).parse_args()
    set_threads(arguments)
    with quiet_stdout():
        facts = asyncio.run(_measure(arguments))
    answer(facts, arguments, ["genlm-control", "genlm-backend", "torch", "transformers"])


async def _measure(arguments: Any) -> dict[str, Any]:
    opts = {"device_map": None, "dtype": getattr(torch, arguments.dtype), "torch_dtype": None}
    llm = PromptedLLM.from_name(
        str(arguments.model),
        backend="hf",
        hf_opts={name: value for name, value in opts.items() if value is not None},
        batch_size=arguments.particles[0],
    )
    llm.model.model.to(arguments.device)
    llm.model.device = llm.model.model.device
    llm.set_prompt_from_str(prompts(arguments.model, 1)[0])
    critic = RewardOfText(llm, reward_of(arguments.model))
    began = clock(arguments.device)
    await _run(arguments.particles[0], llm, critic, arguments.tokens)
    facts: dict[str, Any] = {
        "warmup_seconds": [clock(arguments.device) - began],
        "seconds": [],
        "tokens": [],
        "log_z": [],
    }
    for count in arguments.particles:
        began = clock(arguments.device)
        sequences = await _run(count, llm, critic, arguments.tokens)
        facts["seconds"].append(clock(arguments.device) - began)
        facts["tokens"].append(sum(len(context) - 1 for context in sequences.contexts))  # genlm's end mark is no token
        facts["log_z"].append(float(sequences.log_ml))
    return facts


async def _run(particles: int, llm: PromptedLLM, critic: RewardOfText, tokens: int) -> Any:
    """A run with nothing known from an earlier one but the prompt, whose keys and values genlm can keep."""
    llm.model.clear_cache()
    llm.model.cache_kv(llm.prompt_ids)
    llm.model.batch_size = particles  # a batch runs as soon as every particle has asked
    sampler = direct_token_sampler(llm)
    return await sampler.smc(
        particles,
        0.5,
        tokens + 1,
        critic=critic,
        resampling_method="systematic",
        terminate_when=lambda context: len(context) >= tokens,
    )


if __name__ == "__main__":
    main()
