"""One side of the step benchmark: TiltLM. The time of a step is the wall time from the end of one to the end of the next."""

from typing import Any

from agreement import with_transformers
from common import (
    BETA,
    LR,
    CountedReward,
    alpha,
    answer,
    clock,
    peak_device_memory,
    peak_memory,
    prompts,
    quiet_stdout,
    resident_memory,
    reward_of,
    set_threads,
    step_facts,
    step_parser,
)

import tiltlm as tl
from tiltlm.inference.monitor import Monitor

PHASES = {"draw and score": "draw", "update": "update"}
ENGINES = {"rloo": tl.RLOO, "grpo": tl.GRPO}


class Stopwatch(Monitor):
    """Notes when each step ended and what it says of its phases."""

    def __init__(self, device: str) -> None:
        super().__init__(quiet=True)
        self.device = device
        self.marks: list[float] = []
        self.metrics: list[dict[str, Any]] = []

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        super().log(step, metrics)
        self.marks.append(clock(self.device))
        self.metrics.append(metrics)


def main() -> None:
    parser = step_parser(__doc__)
    parser.add_argument("--ahead", action="store_true", help="rewards beside the update and the next draws")
    default = tl.Training().micro_tokens
    parser.add_argument("--micro-tokens", type=int, default=default, help="completion tokens in a pass with gradient")
    arguments = parser.parse_args()
    set_threads(arguments)
    reward = CountedReward(reward_of(arguments.model), arguments.judge_seconds)
    with quiet_stdout():
        language_model = tl.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
        prior = language_model.prior(max_new_tokens=arguments.tokens)
        stopwatch = Stopwatch(arguments.device)
        lora = tl.LoRA(r=arguments.rank, alpha=alpha(arguments.rank)) if arguments.rank else None
        resident, began = resident_memory(), clock(arguments.device)
        policy = tl.fit(
            prior * tl.Reward(reward, beta=BETA),
            prompts(arguments.model, arguments.prompts, arguments.examples),
            engine=ENGINES[arguments.engine](group=arguments.group),
            source=tl.Ahead() if arguments.ahead else None,
            lora=lora,
            monitor=stopwatch,
            settings=tl.Training(
                steps=arguments.warmup + arguments.steps,
                batch=arguments.prompts,
                lr=LR,
                micro_tokens=arguments.micro_tokens,
            ),
        )
        found = step_facts(began, stopwatch.marks, reward, phases_of(stopwatch.metrics), arguments.warmup)
        trained = list(policy.named_parameters().values())
        facts = {
            **found,
            "resident_before_bytes": resident,
            "trained_parameters": sum(value.numel() for value in trained),
            "adapter_dtype": sorted({str(value.dtype).removeprefix("torch.") for value in trained}),
            "reward_seconds": reward.seconds[arguments.warmup :],
        }
        facts["peak_memory_bytes"] = peak_memory()  # before the check, which loads the model again
        facts["peak_device_memory_bytes"] = peak_device_memory(arguments.device)
        facts["agreement"] = with_transformers(policy, arguments)
    answer(facts, arguments, ["tiltlm", "torch", "transformers", "peft"])


def phases_of(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of drawing, judging and scoring together, and of the update."""
    return {name: [step[f"seconds_{key}"] for step in metrics] for name, key in PHASES.items()}


if __name__ == "__main__":
    main()
