"""Seconds of each phase of one of our steps, measured by itself through the same calls that `fit` makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from common import LR, alpha, prompts, reward_of
from roofline_counts import Model, Size
from roofline_machine import now

import tiltlm as tl
from tiltlm.inference.optimise import Optimiser
from tiltlm.lm.sample import pick
from tiltlm.protocols import Law

NEEDS = frozenset({"log_q"})


class Phases:
    """A policy, its prior and a batch of draws, to be timed phase by phase.

    Args:
        folder: of the model.
        size: of the step; `read` is taken from the prompts.
        micro: completion tokens in one pass with gradient.
    """

    def __init__(self, folder, size: Size, device: str, dtype: str, micro: int, repeats: int) -> None:
        language_model = tl.load(folder, dtype=dtype, device=device)
        self.device, self.repeats = device, repeats
        self.prior = language_model.prior(max_new_tokens=size.tokens)
        lora = tl.LoRA(r=size.rank, alpha=alpha(size.rank)) if size.rank else None
        self.policy = self.prior.policy(lora=lora)
        self.prompts = self.prior.encode(prompts(folder, size.prompts))
        self.evidence = tl.Reward(reward_of(folder))
        self.draws = self.draw(self.policy, size.group)
        rows = max(1, micro // size.tokens)
        self.parts = [torch.arange(s, min(s + rows, len(self.draws))) for s in range(0, len(self.draws), rows)]
        read = int(self.prompts.mask.sum()) // size.prompts
        self.size = replace(size, read=read, passes=len(self.parts))
        self.model = Model.of(self.policy.body.model.config, self.policy.body.model.dtype.itemsize)

    def draw(self, sampler, n: int):
        return sampler.draw(self.prompts, n, torch.Generator().manual_seed(0))

    def time(self, work: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        """Median seconds of a call, after one that is not counted."""
        took = []
        for _ in range(self.repeats + 1):
            if before is not None:
                before()
            began = now(self.device)
            work()
            took.append(now(self.device) - began)
        return median(took[1:])

    def measure(self) -> dict[str, float]:
        """Seconds by phase, in a step's order."""
        tokens, group = self.size.tokens, self.size.group
        one_token = replace(self.policy, law=Law(max_new_tokens=1))
        prefill = self.time(lambda: self.draw(one_token, 1))
        first = self.time(lambda: self.draw(one_token, group))
        whole = self.time(lambda: self.draw(self.policy, group))
        sampling = self.sampling()
        scoring = self.time(lambda: self.prior.log_prob(self.draws))
        forward = self.time(self.forward_only)
        both = self.time(self.forward_and_backward, self.clear)
        return {
            "prefill": prefill,
            "decode": max(0.0, whole - first - (tokens - 1) * sampling),
            "sampling from logits": tokens * sampling,
            "reward": self.time(lambda: self.evidence.log_likelihood(self.draws)),
            "prior scoring": scoring,
            "forward": forward,
            "backward": max(0.0, both - forward),
            "update": self.update(),
        }

    def sampling(self) -> float:
        """One token for every row."""
        logits = torch.randn(self.size.rows, self.model.vocabulary, device=self.device)
        uniform = torch.rand(self.size.rows, dtype=torch.float64, device=self.device)
        with torch.inference_mode():
            return self.time(lambda: pick(logits, uniform))

    def forward_only(self) -> None:
        """With what the backward pass would need."""
        for rows in self.parts:
            self.policy.forward(self.draws.select(rows), NEEDS)

    def forward_and_backward(self) -> None:
        for rows in self.parts:
            self.policy.forward(self.draws.select(rows), NEEDS).log_q.sum().backward()

    def clear(self) -> None:
        for value in self.policy.named_parameters().values():
            value.grad = None

    def update(self) -> float:
        """Gradients to the masters, their norm, AdamW, masters to the weights."""
        optimiser = Optimiser(self.policy.named_parameters(), LR, 0.0)

        def step() -> None:
            optimiser.gather()
            optimiser.step(1.0, 1.0)

        def gradients() -> None:
            for value in self.policy.named_parameters().values():
                value.grad = torch.ones_like(value)

        return self.time(step, gradients)
