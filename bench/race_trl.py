"""The other side of the race: TRL's RLOOTrainer and GRPOTrainer on the same model, prompts, reward and number of samples.

Full weights, single precision. RLOO has the KL in the reward, as TRL does it. GRPO keeps TRL's habits but for beta, which is
set to the target's (TRL's default of 0 has no posterior). Saves the trained model, which the driver judges.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from race_task import BETA, LONGEST, PROMPTS, reward_function
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--engine", choices=["rloo", "grpo"], required=True)
parser.add_argument("--target", required=True)
parser.add_argument("--lr", type=float, required=True)
parser.add_argument("--seed", type=int, required=True)
parser.add_argument("--samples", type=int, required=True)
parser.add_argument("--group", type=int, default=8)
options = parser.parse_args()

torch.set_num_threads(1)
KIND = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}
config_of, trainer_of = KIND[options.engine]
batch = len(PROMPTS) * options.group
config = config_of(
    output_dir=str(options.out / "trainer"),
    per_device_train_batch_size=batch,
    num_generations=options.group,
    max_completion_length=LONGEST,
    max_steps=options.samples // batch,
    learning_rate=options.lr,
    lr_scheduler_type="linear",
    warmup_steps=2,
    beta=BETA[options.target],
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    report_to=[],
    save_strategy="no",
    logging_steps=1000,
    disable_tqdm=True,
    seed=options.seed,
)
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
prompts = Dataset.from_list([{"prompt": p} for p in PROMPTS] * 64)
trainer = trainer_of(
    model=model,
    reward_funcs=reward_function(options.target),
    args=config,
    train_dataset=prompts,
    processing_class=tokenizer,
)
began = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - began
trainer.model.save_pretrained(options.out)
tokenizer.save_pretrained(options.out)
print(json.dumps({"seconds": seconds, "samples": config.max_steps * batch}))
