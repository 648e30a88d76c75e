"""What both sides of the step benchmark share: the task, the counting of tokens, the report.

Standard library only at the top, because TiltLM's and TRL's environments both import it.
"""

import argparse
import json
import resource
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BETA = 0.25
LR = 3e-4
RANK, ALPHA = 16, 32


def size_arguments() -> argparse.ArgumentParser:
    """The size of a step; the driver hands the same values to both sides."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a run, after one warm-up step")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="most new tokens a completion")
    return parser


def side_arguments(description: str | None) -> argparse.Namespace:
    """The command line of one side."""
    parser = argparse.ArgumentParser(description=description, parents=[size_arguments()])
    parser.add_argument("model", help="folder with config.json, safetensors and a tokenizer")
    return parser.parse_args()


def prompts(count: int) -> list[str]:
    """The first `count` film openings: every step of both sides sees exactly these."""
    lines = (RECIPES / "film_openings.txt").read_text().splitlines()
    if not 1 <= count <= len(lines):
        raise SystemExit(f"--prompts is {count}; there are {len(lines)} film openings to choose from")
    return lines[:count]


def counted_reward() -> tuple[Callable[..., list[float]], list[list[int]]]:
    """The demo's reward, and a list that gets the lengths of the completions at each call.

    Counting in the reward counts the same thing on both sides: each of them hands it the completions' token ids, up
    to and including the first EOS.
    """
    sentiment = runpy.run_path(str(RECIPES / "sentiment.py"))["sentiment"]
    lengths: list[list[int]] = []

    def counted(completions: list[str], completion_ids: Sequence[Sequence[int]], **columns: object) -> list[float]:
        lengths.append([len(ids) for ids in completion_ids])
        return sentiment(completions)

    return counted, lengths


def peak_memory() -> int:
    """Most bytes that were ever resident in this process, loading the model included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report(
    marks: Sequence[float],
    lengths: Sequence[Sequence[int]],
    phases: Mapping[str, Sequence[float]],
    facts: Mapping[str, Any],
    packages: Sequence[str],
) -> None:
    """Print the run as one JSON object.

    Args:
        marks: the clock at the end of each step, the warm-up's first; so a step's time is all that lies between.
        lengths: completion lengths of each step, the warm-up's first; so are `phases`.
    """
    seconds = [end - begin for begin, end in pairwise(marks)]
    if not len(marks) == len(lengths) == len(seconds) + 1:
        raise SystemExit(f"{len(marks)} steps were timed, but the reward was called {len(lengths)} times")
    timed = lengths[1:]
    out = {
        "seconds": seconds,
        "phases": {name: list(values[1:]) for name, values in phases.items()},
        "tokens": [sum(step) for step in timed],
        "completions": [len(step) for step in timed],
        "longest": max(map(max, timed)),
        "peak_memory_bytes": peak_memory(),
        **facts,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
    }
    print(json.dumps(out))
