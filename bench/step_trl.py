"""The other side of the step benchmark: TRL's RLOOTrainer, used as its documentation says.

Prints one JSON object on stdout. The time of a step is the wall time from one `on_step_end` to the next, so that
generation, which TRL does while it prepares a step's inputs, is inside.
"""

import sys
import tempfile
import time
from collections import defaultdict
from contextlib import redirect_stdout
from typing import Any

import torch
from common import ALPHA, BETA, LR, RANK, counted_reward, prompts, report, side_arguments
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import RLOOConfig, RLOOTrainer


class Stopwatch(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())


def clock(trainer: RLOOTrainer, methods: list[str]) -> dict[str, list[float]]:
    """Time each call of some of the trainer's methods, for the phases; the steps' times do not depend on it."""
    times: dict[str, list[float]] = defaultdict(list)

    def timed(name: str) -> Any:
        method = getattr(trainer, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = method(*args, **kwargs)
            times[name].append(time.perf_counter() - began)
            return out

        return call

    for name in methods:
        setattr(trainer, name, timed(name))
    return times


def main() -> None:
    arguments = side_arguments(__doc__)
    reward, lengths = counted_reward()
    stopwatch = Stopwatch()
    steps = arguments.steps + 1
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        config = RLOOConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": "bfloat16"},  # TRL's default is float32
            use_cpu=True,
            bf16=True,  # TRL's default
            gradient_checkpointing=False,  # TRL's default is True: slower, less memory
            per_device_train_batch_size=arguments.prompts * arguments.group,  # one generation, one pass, one update
            num_generations=arguments.group,
            max_completion_length=arguments.tokens,
            beta=BETA,
            learning_rate=LR,
            max_steps=steps,
            shuffle_dataset=False,  # the rows are the same prompts, over and over
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,  # warns on a CPU
        )
        trainer = RLOOTrainer(
            model=arguments.model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts(arguments.prompts) * steps}),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[stopwatch],
        )
        times = clock(trainer, ["_generate", "_generate_and_score_completions"])
        trainer.train()
    trained = [value for value in trainer.model.parameters() if value.requires_grad]
    draw, inputs = times["_generate"], times["_generate_and_score_completions"]
    # the update is what the step's wall time leaves; the warm-up's is dropped with its other figures
    whole = [0.0, *(end - begin for begin, end in zip(stopwatch.marks, stopwatch.marks[1:], strict=False))]
    report(
        stopwatch.marks,
        lengths,
        {
            "draw": draw,
            "score": [both - drawn for both, drawn in zip(inputs, draw, strict=True)],
            "update": [step - both for step, both in zip(whole, inputs, strict=True)],
        },
        {
            "trained_parameters": sum(value.numel() for value in trained),
            "adapter_dtype": sorted({str(value.dtype).removeprefix("torch.") for value in trained}),
            "threads": torch.get_num_threads(),
        },
        ["trl", "torch", "transformers", "peft", "accelerate", "vaderSentiment"],
    )


if __name__ == "__main__":
    main()
