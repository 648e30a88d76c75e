"""Run by test_resume.py in a process of its own: training runs that are killed, and go on.

It imports everything once and forks a child for each run, so that a dozen kills cost a dozen short runs and not a dozen
imports. Prints one JSON object: for each scenario, how its children ended.

    python kill_and_resume.py FOLDER SEED
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.inference import checkpoint
from tiltlm.inference.monitor import Monitor
from tiltlm.lm.load import load

STEPS, EVERY = 12, 2
PROMPTS = ["the film", "a quiet story of two friends", "good and bad"]


def shortness(completions):
    return [-len(c) / 10 for c in completions]


class KillAt(Monitor):
    """Kills the process in the middle of reporting a step."""

    def __init__(self, out, step):
        super().__init__(out, console=Console(quiet=True))
        self.step = step

    def log(self, step, metrics):
        super().log(step, metrics)
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(out: Path, kill_at: int = 0, resume: bool = False) -> None:
    """One run, or the rest of one; leaves the policy's weights in `out`."""
    prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=6)
    policy = tl.fit(
        prior * tl.Reward(shortness, beta=0.2, bounds=(-4, 0)),
        PROMPTS,
        tl.RLOO(group=3),
        lora=tl.LoRA(r=2),
        out=out,
        resume=resume,
        monitor=KillAt(out, kill_at),
        steps=STEPS,
        batch=2,
        lr=1e-2,
        checkpoint_every=EVERY,
        certify_every=6,
        certify_samples=2,
    )
    policy.save(out / "policy")


def kill_on_call(owner, name: str, number: int, before=None) -> None:
    """From now on the `number`-th call of a function is the end; `before(*args)` is what it still does."""
    inner, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            if before is not None:
                before(inner, *args)
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)

    setattr(owner, name, counted)


def half_a_file(save, tensors, path) -> None:
    save(tensors, path)
    os.truncate(path, path.stat().st_size // 2)


def half_removed(remove, folder, **_) -> None:
    next(iter(folder.iterdir())).unlink()


def in_a_write(name: str, number: int):
    owner = {"fsync": os, "rename": os, "save_file": checkpoint, "rmtree": checkpoint.shutil}[name]
    before = {"save_file": half_a_file, "rmtree": half_removed}.get(name)
    return lambda: kill_on_call(owner, name, number, before)


def disk_full() -> None:
    """The third checkpoint finds no room: the system refuses larger files, as it does on a full disk."""
    inner, calls = checkpoint.save_file, [0]

    def limited(*args):
        calls[0] += 1
        if calls[0] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            return inner(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoint.save_file = limited


def child(out: Path, *, kill_at: int = 0, plant=None, resume: bool = False, after: float = 0.0) -> dict:
    """Train in a fork; how it ended. `after`: kill it from outside so many seconds after it began."""
    note = out.with_suffix(".said")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if plant is not None:
                plant()
            train(out, kill_at, resume)
            code = 0
        except tl.InputError as error:
            note.write_text(str(error))
            code = 2
        finally:
            os._exit(code)
    if after:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "code": os.waitstatus_to_exitcode(status),
        "said": note.read_text() if note.exists() else "",
    }


def scenarios(seconds: float, seed: int) -> dict[str, list[dict]]:
    """Name -> the ends that a run meets, one after the other; then it may finish."""
    rng = random.Random(seed)
    found = {f"after step {step}": [{"kill_at": step}] for step in (1, 4, 7, 12)}
    found |= {f"at moment {i}": [{"after": rng.uniform(0.1, 0.95) * seconds}] for i in range(3)}
    writes = [("fsync", 1), ("fsync", 4), ("fsync", 5), ("fsync", 12), ("rename", 1), ("rename", 4), ("save_file", 1)]
    writes += [("save_file", 3), ("rmtree", 1)]
    found |= {f"in {name} {number}": [{"plant": in_a_write(name, number)}] for name, number in writes}
    found["twice"] = [{"kill_at": 5}, {"plant": in_a_write("fsync", 3)}]
    found["disk full"] = [{"plant": disk_full}]
    return found


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    began = time.perf_counter()
    ends = {"whole": [child(folder / "whole")]}
    seconds = time.perf_counter() - began
    for name, planned in scenarios(seconds, seed).items():
        out = folder / name
        ends[name] = [child(out, resume=number > 0, **end) for number, end in enumerate(planned)]
        ends[name].append(child(out, resume=True))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
