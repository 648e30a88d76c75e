"""What every side of a speed benchmark shares: the task, its command line, and how it reports.

Standard library only at the top, because TiltLM's and the peers' environments all import it. A side is a process of its own
that prints one JSON object as its last line.
"""

import argparse
import json
import resource
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TASK = "bench.json"
"""File in a model's folder that says which prompts and which reward go with it; `models.py` writes it."""
BETA = 0.25
LR = 3e-4


def alpha(rank: int) -> int:
    """LoRA's alpha, twice the rank as is the custom."""
    return 2 * rank


def side_parser(description: str | None) -> argparse.ArgumentParser:
    """What the command line of every side has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="folder with config.json, safetensors, a tokenizer and bench.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    return parser


def step_parser(description: str | None) -> argparse.ArgumentParser:
    """What the sides of the step benchmark have beside."""
    parser = side_parser(description)
    parser.add_argument("--engine", choices=["rloo", "grpo"], default="rloo")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are reported, and not counted")
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a completion")
    parser.add_argument("--examples", type=int, default=0, help="lines that stand before every prompt, the same ones")
    parser.add_argument(
        "--judge-seconds", type=float, default=0, help="what the reward waits a batch, as for a remote judge"
    )
    parser.add_argument("--rank", type=int, default=16, help="LoRA's, on all linear layers; 0 trains all weights")
    return parser


def generation_parser(description: str | None) -> argparse.ArgumentParser:
    """What the sides of the generation benchmark have beside."""
    parser = side_parser(description)
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--prompts", type=int, default=4, help="different prompts among the sequences")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a sequence")
    return parser


def smc_parser(description: str | None) -> argparse.ArgumentParser:
    """What the sides of the SMC benchmark have beside."""
    parser = side_parser(description)
    parser.add_argument("--particles", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--tokens", type=int, default=24, help="tokens a particle")
    return parser


def prompts(model: Path, count: int, examples: int = 0) -> list[str]:
    """The first `count` prompts of a model's task, after the last `examples` ones: every step of every side sees exactly these."""
    lines = json.loads((model / TASK).read_text())["prompts"]
    if count < 1 or examples < 0 or count + examples > len(lines):
        raise SystemExit(f"--prompts is {count} and --examples {examples}; there are {len(lines)} lines to choose from")
    before = "".join(f"{line}\n" for line in lines[len(lines) - examples :])
    return [before + line for line in lines[:count]]


def reward_of(model: Path) -> Callable[..., list[float]]:
    """A model's reward: the demo's for a model that writes English, the share of even tokens for one at random weights."""
    name = json.loads((model / TASK).read_text())["reward"]
    if name == "sentiment":
        return runpy.run_path(str(RECIPES / "sentiment.py"))["sentiment"]
    return even_share


def even_share(completions: list[str], completion_ids: Sequence[Sequence[int]], **columns: object) -> list[float]:
    """How many of a completion's tokens have an even id."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


class CountedReward:
    """A reward that notes the lengths of what it judges and the seconds that it takes, at each call.

    Counting in the reward counts the same thing on both sides: each of them hands it the completions' token ids, up
    to and including the first EOS.
    """

    __name__ = "counted"

    def __init__(self, reward: Callable[..., list[float]], wait: float = 0.0) -> None:
        self.reward, self.wait = reward, wait
        self.lengths: list[list[int]] = []
        self.seconds: list[float] = []

    def __call__(self, completions: list[str], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        began = time.perf_counter()
        values = self.reward(completions, completion_ids=completion_ids)
        time.sleep(self.wait)
        self.seconds.append(time.perf_counter() - began)
        self.lengths.append([len(ids) for ids in completion_ids])
        return values


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """What libraries print goes to stderr: stdout is for the report."""
    with redirect_stdout(sys.stderr):
        yield


def set_threads(arguments: argparse.Namespace) -> None:
    """Torch's threads, if the command line says how many."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def clock(device: str) -> float:
    """Seconds, once the device has done all that it was told."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory() -> int:
    """Most bytes that were ever resident in this process, loading the model included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int | None:
    """Bytes that are resident now; None where the system has no /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def peak_device_memory(device: str) -> int | None:
    """Most bytes that torch held on the accelerator; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.max_memory_allocated(device)


def answer(facts: Mapping[str, Any], arguments: argparse.Namespace, packages: Sequence[str]) -> None:
    """Print a side's report as one JSON object."""
    import torch

    out = {
        "peak_memory_bytes": peak_memory(),
        "peak_device_memory_bytes": peak_device_memory(arguments.device),
        "threads": torch.get_num_threads(),
        **facts,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
    }
    print(json.dumps(out))


def step_facts(
    began: float,
    marks: Sequence[float],
    reward: CountedReward,
    phases: Mapping[str, Sequence[float]],
    warmup: int,
) -> dict[str, Any]:
    """A step benchmark's figures.

    Args:
        began: the clock when training was asked for.
        marks: the clock at the end of each step, the warm-up's first; so a step's time is all that lies between.
        phases: seconds of each phase in each step, the warm-up's first.
    """
    seconds = [end - begin for begin, end in pairwise([began, *marks])]
    lengths = reward.lengths
    if not len(marks) == len(lengths):
        raise SystemExit(f"{len(marks)} steps were timed, but the reward was called {len(lengths)} times")
    return {
        "warmup_seconds": seconds[:warmup],
        "seconds": seconds[warmup:],
        "phases": {name: list(values[warmup:]) for name, values in phases.items()},
        "tokens": [sum(step) for step in lengths[warmup:]],
        "completions": [len(step) for step in lengths[warmup:]],
    }
