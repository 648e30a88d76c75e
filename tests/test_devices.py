"""Several processes train as one does: the same draws, the same weights, the same files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import train_in_processes
from test_fit import rows
from tiltlm.inference import checkpoint

TESTS = Path(__file__).parent
HOW = ("plain", "shard")
QUICK, SLOW = ("lora",), ("llama", "full", "values", "kl", "kl_lora")
"""Jobs of the default tests, and of the slow ones."""
TOLERANCE = {"llama": 1e-6, "values": 1e-6}
"""Largest difference of a weight. Llama's norms and positions are in single precision, and so are value heads; GPT-2 is double."""


def launch(count, *arguments, **changes):
    """Run a script of this folder, or a module, in so many processes; returns how the launcher ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    where = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **where},
        **changes,
    )


def flag(how):
    return ("shard",) if how == "shard" else ()


def in_one_and_two(folder, jobs):
    """Train each job in one process, here, and in two, plain and sharded, under one launch: whole runs, runs that one process
    begins and two finish, and runs that two begin and one finishes."""
    one, two = train_in_processes.train, []
    for job in jobs:
        one(folder, job, job)
        for how in HOW:
            one(folder, f"{job}-from-1-{how}", job, "begin")
            two += [
                (f"{job}-{how}", job),
                (f"{job}-from-1-{how}", job, "resume"),
                (f"{job}-from-2-{how}", job, "begin"),
            ]
    work = [f"{name}={','.join([*rest, *name.split('-')[-1:]])}" for name, *rest in two]
    done = launch(2, TESTS / "train_in_processes.py", folder, *work)
    assert done.returncode == 0, done.stderr
    for job in jobs:
        for how in HOW:
            one(folder, f"{job}-from-2-{how}", job, "resume")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return in_one_and_two(tmp_path_factory.mktemp("trained"), QUICK)


@pytest.fixture(scope="module")
def trained_slowly(tmp_path_factory):
    return in_one_and_two(tmp_path_factory.mktemp("trained"), SLOW)


def came_to(folder, name, rank=0):
    return torch.load(folder / f"{name}.{rank}.pt")


def require_same(folder, job, how):
    """Two processes come to the weights of one; as do one that goes on where two stopped, and two where one did."""
    expected, tolerance = came_to(folder, job), TOLERANCE.get(job, 1e-9)
    assert (expected["policy"] - expected["prior"]).abs().max() > 1e-3  # there was something to come to
    found = [came_to(folder, f"{job}-{how}", rank) for rank in (0, 1)]
    found += [came_to(folder, f"{job}-from-1-{how}", rank) for rank in (0, 1)] + [
        came_to(folder, f"{job}-from-2-{how}")
    ]
    for one in found:
        assert one["weights"].keys() == expected["weights"].keys()
        for name, value in one["weights"].items():
            assert_close(value, expected["weights"][name], rtol=0, atol=tolerance)
        # the adapter off, or a model of its own, and weights that were divided: the prior is what it always was
        assert_close(one["prior"], expected["drawn"], rtol=0, atol=min(tolerance, 1e-12 if job != "llama" else 1))
        assert torch.equal(one["drawn"], expected["drawn"])
    assert (folder / f"{job}-from-1-{how}.0.interrupted").exists()
    assert (folder / f"{job}-from-2-{how}.1.interrupted").exists()  # by the main process, whose Ctrl-C it was


def require_same_metrics(folder, job, how):
    """One process logs each step once, and what it logs is of the whole batch."""
    expected = rows(folder / job)
    for name in (f"{job}-{how}", f"{job}-from-1-{how}", f"{job}-from-2-{how}"):
        found = rows(folder / name)
        assert [row["step"] for row in found] == [1, 2, 3, 4]
        for one, other in zip(found, expected, strict=True):
            assert one["reward_calls/calls"] in (1, 2)  # of each process, for its own completions
            same = {key: value for key, value in one.items() if key != "reward_calls/calls"}
            other = {key: value for key, value in other.items() if key != "reward_calls/calls"}
            assert_close(same, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("job", QUICK)
def test_two_processes_are_as_one(trained, job, how):
    require_same(trained, job, how)
    require_same_metrics(trained, job, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("job", SLOW)
def test_two_processes_are_as_one_with_other_engines_and_models(trained_slowly, job, how):
    require_same(trained_slowly, job, how)
    require_same_metrics(trained_slowly, job, how)


def test_checkpoints_are_sharded_where_weights_are(trained):
    def files(name):
        return {path.name for path in (trained / name / "checkpoints" / "step-000004").iterdir()}

    plain = {"manifest.json", "state.json", "state.safetensors"}
    assert files("lora-plain") == plain == files("lora")
    shards = {f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)}
    assert files("lora-shard") == plain | shards
    for name in shards:
        path = trained / "lora-shard" / "checkpoints" / "step-000004" / name
        path.write_bytes(path.read_bytes()[:-1])
        assert checkpoint.damage(path.parent) == f"{name} has changed"
