"""Run by test_devices.py under a launcher, in several processes that train together; and imported by it, to train in one.

    torchrun --nproc_per_node 2 train_in_processes.py FOLDER NAME=JOB[,shard][,begin][,resume] …

Each is a training run in FOLDER/NAME: a whole one, or one that is interrupted after step 3, or one that goes on from there.
Every process writes what it came to into FOLDER/NAME.RANK.pt, or why it was refused into FOLDER/NAME.RANK.refused.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import tiltlm as tl
from conftest import make_model, make_tokenizer
from test_fit import WithKL, shortness
from tiltlm.inference.monitor import Monitor
from tiltlm.lm.load import load
from tiltlm.world import join

PROMPTS = ["the film", "a quiet story of two friends", "good and bad", "friends who meet", "a film"]


def target(model, max_new_tokens=6):
    """In double precision, so that little but the order of sums differs. GPT-2 is double throughout, Llama has single parts."""
    prior = load(make_model(model).double(), make_tokenizer()).prior(max_new_tokens=max_new_tokens)
    return prior * tl.Reward(shortness, beta=0.2, bounds=(-4, 0))


def lora():
    """Fresh draws, an adapter, a certificate."""
    return {"target": target("gpt2"), "engine": tl.RLOO(group=3), "certify_every": 4, "certify_samples": 2}


def llama():
    """The same of another kind of model, and with a rank that leaves one of two processes without a row of A."""
    return {"target": target("llama"), "engine": tl.RLOO(group=3), "lora": tl.LoRA(r=1)}


def full():
    """All weights; old draws beside fresh ones, two updates a batch, a learned log Z."""
    engine = tl.TrajectoryBalance(group=3, updates=2)
    return {"target": target("gpt2"), "engine": engine, "source": tl.Replay(old=2), "lora": None}


def values():
    """Value heads beside the adapter; prompts of which a process has one, and passes of one token."""
    return {"target": target("gpt2", max_new_tokens=2), "engine": tl.PPO(group=3), "micro_tokens": 2, "batch": 3}


def kl():
    """The prior runs beside the policy where gradients are taken: all weights, so that it is a model of its own."""
    return {"target": target("gpt2"), "engine": WithKL(), "lora": None}


def kl_lora():
    """The prior is the same model with the adapter off."""
    return {"target": target("gpt2"), "engine": WithKL()}


def fails_in_one():
    """The reward fails in the second of two processes, from the third step on."""
    calls = []

    def reward(completions):
        calls.append(len(completions))
        return [1 / 0 if join().rank == 1 and len(calls) >= 3 else 0.5 for _ in completions]

    prior = load(make_model("gpt2"), make_tokenizer()).prior(max_new_tokens=4)
    return {"target": prior * tl.Reward(reward, beta=0.2, bounds=(0, 1)), "engine": tl.RLOO(group=2)}


def differs():
    """Every process has another model."""
    prior = load(make_model("gpt2", seed=join().rank), make_tokenizer()).prior(max_new_tokens=4)
    return {"target": prior * tl.Reward(shortness, beta=0.2), "engine": tl.RLOO(group=2)}


def lags():
    return {"target": target("gpt2"), "engine": tl.FDivergence(), "source": tl.Lagging()}


def critic():
    return {"target": target("gpt2"), "engine": tl.SoftQLearning()}


def one_prompt():
    return {"target": target("gpt2"), "engine": tl.RLOO(group=2), "batch": 1}


REFUSED = (fails_in_one, differs, lags, critic, one_prompt)
JOBS = {job.__name__: job for job in (lora, llama, full, values, kl, kl_lora, *REFUSED)}
COMMON = {
    "steps": 4,
    "batch": 4,
    "lr": 1e-2,
    "warmup": 0,
    "micro_tokens": 24,
    "checkpoint_every": 2,
    "lora": tl.LoRA(r=2),
}


class StopAt(Monitor):
    """As somebody who presses Ctrl-C while a step is logged."""

    def __init__(self, out, step):
        super().__init__(out, console=Console(quiet=True))
        self.step = step

    def log(self, step, metrics):
        super().log(step, metrics)
        if step == self.step:
            raise KeyboardInterrupt


def judged(policy):
    """Log-probabilities of fixed completions under policy and prior."""
    prior = policy.prior
    draws = prior.draw(prior.encode(PROMPTS), 2, torch.Generator().manual_seed(7))
    unknown = replace(draws, sampler="")  # so that the prior does not recognise its own
    return {"policy": policy.log_prob(unknown), "prior": prior.log_prob(unknown), "drawn": draws.log_q}


def train(folder: Path, name: str, job: str, *flags: str) -> None:
    given = {**COMMON, **JOBS[job](), "shard": "shard" in flags, "resume": "resume" in flags, "out": folder / name}
    monitor = StopAt(folder / name, 3 if "begin" in flags else 0)
    try:
        policy = tl.fit(given.pop("target"), PROMPTS, given.pop("engine"), monitor=monitor, **given)
    except KeyboardInterrupt:
        (folder / f"{name}.{join().rank}.interrupted").touch()
        return
    except tl.InputError as error:
        (folder / f"{name}.{join().rank}.refused").write_text(str(error))
        return
    weights = {key: value.detach().clone() for key, value in policy.named_parameters().items()}
    torch.save({"weights": weights, **judged(policy)}, folder / f"{name}.{join().rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what in sys.argv[2:]:
        name, _, rest = what.partition("=")
        train(Path(sys.argv[1]), name, *rest.split(","))
