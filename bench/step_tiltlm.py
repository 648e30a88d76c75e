"""One side of the step benchmark: TiltLM's RLOO + LoRA. Prints one JSON object on stdout.

The time of a step is the wall time from the end of one step to the end of the next, everything included.
"""

import time
from typing import Any

import torch
from common import ALPHA, BETA, LR, RANK, counted_reward, prompts, report, side_arguments

import tiltlm as tl
from tiltlm.inference.monitor import Monitor


class Stopwatch(Monitor):
    """The usual progress bar, which also notes when each step ended."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[float] = []
        self.metrics: list[dict[str, Any]] = []

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        super().log(step, metrics)
        self.marks.append(time.perf_counter())
        self.metrics.append(metrics)


def main() -> None:
    arguments = side_arguments(__doc__)
    reward, lengths = counted_reward()
    prior = tl.load(arguments.model, dtype="bfloat16", device="cpu").prior(max_new_tokens=arguments.tokens)
    stopwatch = Stopwatch()
    policy = tl.fit(
        prior * tl.Reward(reward, beta=BETA),
        prompts(arguments.prompts),
        engine=tl.RLOO(group=arguments.group),
        lora=tl.LoRA(r=RANK, alpha=ALPHA),
        monitor=stopwatch,
        settings=tl.Training(steps=arguments.steps + 1, batch=arguments.prompts, lr=LR),
    )
    trained = policy.named_parameters().values()
    report(
        stopwatch.marks,
        lengths,
        {phase: [step[f"seconds_{phase}"] for step in stopwatch.metrics] for phase in ("draw", "score", "update")},
        {
            "trained_parameters": sum(value.numel() for value in trained),
            "adapter_dtype": sorted({str(value.dtype).removeprefix("torch.") for value in trained}),
            "threads": torch.get_num_threads(),
        },
        ["tiltlm", "torch", "transformers", "peft", "vaderSentiment"],
    )


if __name__ == "__main__":
    main()
