"""The other side of the step benchmark: TRL's RLOOTrainer and GRPOTrainer, used as their documentation says.

The time of a step is the wall time from one `on_step_end` to the next, so that generation, which TRL does while it prepares a
step's inputs, is inside.
"""

import tempfile
from itertools import pairwise
from typing import Any

import torch
from common import (
    BETA,
    LR,
    CountedReward,
    alpha,
    answer,
    clock,
    prompts,
    quiet_stdout,
    resident_memory,
    reward_of,
    set_threads,
    step_facts,
    step_parser,
)
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

ENGINES = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}


class Stopwatch(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(clock(self.device))


def timed(trainer: Any, name: str, device: str) -> list[float]:
    """Time each call of one of the trainer's methods, for the phases; the steps' times do not depend on it."""
    times: list[float] = []
    method = getattr(trainer, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = clock(device)
        out = method(*args, **kwargs)
        times.append(clock(device) - began)
        return out

    setattr(trainer, name, call)
    return times


def main() -> None:
    parser = step_parser(__doc__)
    parser.add_argument("--micro", type=int, default=32, help="completions in one pass with gradient")
    arguments = parser.parse_args()
    set_threads(arguments)
    reward = CountedReward(reward_of(arguments.model), arguments.judge_seconds)
    stopwatch = Stopwatch(arguments.device)
    steps, completions = arguments.warmup + arguments.steps, arguments.prompts * arguments.group
    micro = min(arguments.micro, completions)
    texts = prompts(arguments.model, arguments.prompts, arguments.examples)
    config_of, trainer_of = ENGINES[arguments.engine]
    with tempfile.TemporaryDirectory() as folder, quiet_stdout():
        config = config_of(
            output_dir=folder,
            model_init_kwargs={"dtype": arguments.dtype},  # TRL's default is float32
            use_cpu=arguments.device == "cpu",
            bf16=arguments.dtype == "bfloat16",
            gradient_checkpointing=False,  # TRL's default is True: slower, less memory
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=completions // micro,  # one generation and one update a step
            num_generations=arguments.group,
            max_completion_length=arguments.tokens,
            beta=BETA,
            learning_rate=LR,
            max_steps=steps,
            shuffle_dataset=False,  # the rows are the same prompts, over and over
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=arguments.device != "cpu",  # warns on a CPU
        )
        rank = arguments.rank
        lora = LoraConfig(r=rank, lora_alpha=alpha(rank), target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = trainer_of(
            model=str(arguments.model),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts * steps}),
            peft_config=lora if rank else None,
            callbacks=[stopwatch],
        )
        calls = {name: timed(trainer, name, arguments.device) for name in METHODS}
        resident, began = resident_memory(), clock(arguments.device)
        trainer.train()
    inputs = calls["_generate_and_score_completions"]
    whole = [end - begin for begin, end in pairwise([began, *stopwatch.marks])]
    phases = {
        "draw": calls["_generate"],
        "draw and score": inputs,
        "update": [step - both for step, both in zip(whole, inputs, strict=True)],  # what the step's wall time leaves
    }
    trained = [value for value in trainer.model.parameters() if value.requires_grad]
    facts = {
        **step_facts(began, stopwatch.marks, reward, phases, arguments.warmup),
        "resident_before_bytes": resident,
        "trained_parameters": sum(value.numel() for value in trained),
        "adapter_dtype": sorted({str(value.dtype).removeprefix("torch.") for value in trained}),
        "reward_seconds": reward.seconds[arguments.warmup :],
    }
    answer(facts, arguments, ["trl", "torch", "transformers", "peft", "accelerate"])


METHODS = ("_generate", "_generate_and_score_completions")

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
