"""Run by test_devices.py under a launcher, in several processes that train together.

    torchrun --nproc_per_node 2 train_in_processes.py FOLDER JOB[,JOB…]

Each job is a training run in FOLDER/JOB. Every process writes what it came to into FOLDER/JOB.RANK.pt.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.inference.monitor import Monitor
from tiltlm.lm.load import load
from tiltlm.world import join

PROMPTS = ["the film", "a quiet story of two friends", "good and bad", "friends who meet", "a film"]


def shortness(completions):
    return [-len(c) / 10 for c in completions]


def target():
    """In double precision, so that what differs is the order of sums and nothing else."""
    prior = load(make_model("gpt2").double(), make_tokenizer()).prior(max_new_tokens=6)
    return prior * tl.Reward(shortness, beta=0.2, bounds=(-4, 0))


def settings(out, **changes):
    common = {"steps": 4, "batch": 4, "lr": 1e-2, "warmup": 0, "micro_tokens": 24, "checkpoint_every": 2}
    return {"out": out, "monitor": Monitor(out, console=Console(quiet=True)), **common, **changes}


def lora(out, **changes):
    """Fresh draws, an adapter, a certificate."""
    ours = {"lora": tl.LoRA(r=2), "certify_every": 4, "certify_samples": 2}
    return tl.fit(target(), PROMPTS, tl.RLOO(group=3), **settings(out, **ours), **changes)


def full(out, **changes):
    """Old draws beside fresh ones, all weights, two updates a batch, a learned log Z."""
    engine = tl.TrajectoryBalance(group=3, updates=2)
    return tl.fit(target(), PROMPTS, engine, source=tl.Replay(old=2), **settings(out, lora=None), **changes)


def values(out, **changes):
    """PPO: value heads beside the adapter."""
    return tl.fit(target(), PROMPTS, tl.PPO(group=3), **settings(out, lora=tl.LoRA(r=2)), **changes)


JOBS = {"lora": lora, "full": full, "values": values}


def judged(policy):
    """Log-probabilities of fixed completions under policy and prior."""
    prior = policy.prior
    draws = prior.draw(prior.encode(PROMPTS), 2, torch.Generator().manual_seed(7))
    unknown = replace(draws, sampler="")  # so that the prior does not recognise its own
    return {"policy": policy.log_prob(unknown), "prior": prior.log_prob(unknown), "drawn": draws.log_q}


def run(folder: Path, job: str, name: str | None = None, **changes) -> None:
    policy = JOBS[job](folder / (name or job), **changes)
    weights = {key: value.detach().clone() for key, value in policy.named_parameters().items()}
    torch.save({"weights": weights, **judged(policy)}, folder / f"{name or job}.{join().rank}.pt")


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for job in sys.argv[2].split(","):
        job, _, rest = job.partition("+")
        changes = {"shard": "shard" in rest} if rest else {}
        if "resume" in rest:
            changes["resume"] = True
        run(folder, job, **changes)


if __name__ == "__main__":
    main()
