"""Several processes train as one does: the same draws, the same weights, the same files."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import train_in_processes
from conftest import REWARDS, settings, write
from test_fit import rows
from tiltlm.inference import checkpoint
from tiltlm.world import World, _join, entered

TESTS = Path(__file__).parent
HOW = ("plain", "shard")
REFUSED = {
    "fails_in_one": ("plain", "reward 'reward' raised ZeroDivisionError"),
    "differs": ("plain", "the processes differ: model is '.*' in process 0 and '.*' in process 1; give them the same"),
    "lags": ("shard", "shard is on, but the source Lagging keeps a copy of the weights"),
    "critic": ("shard", "shard is on, but a ModelCritic's weights cannot be divided; leave shard out"),
    "one_prompt": (
        "plain",
        "batch is 1, but there are 2 processes, each of which needs a prompt in every step; give more",
    ),
}
"""Runs that cannot be: how, and what every process says of it."""
QUICK, SLOW = ("lora",), ("llama", "full", "values", "kl", "kl_lora")
"""Jobs of the default tests, and of the slow ones."""
TOLERANCE = {"llama": 1e-6, "values": 1e-6}
"""Largest difference of a weight. Llama's norms and positions are in single precision, and so are value heads; GPT-2 is double."""


@contextmanager
def processes(count, *arguments, cwd=TESTS):
    """So many of these Python processes, as a launcher starts them; none outlives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    common |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            # a shell starts background jobs with SIGINT ignored, and children inherit that; the user at a terminal has it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
        for rank in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ended(started):
    """How each of them ended: (code, what it wrote, what it said on stderr)."""
    with ThreadPoolExecutor(len(started)) as pool:  # both at once, or one waits for somebody to read what it says
        said = list(pool.map(lambda process: process.communicate(timeout=400), started))
    return [(process.returncode, out, err) for process, (out, err) in zip(started, said, strict=True)]


def in_one_and_two(folder, jobs, more=()):
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
    with processes(2, TESTS / "train_in_processes.py", folder, *work, *more) as started:
        assert [code for code, _, _ in ended(started)] == [0, 0]
    for job in jobs:
        for how in HOW:
            one(folder, f"{job}-from-2-{how}", job, "resume")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    more = [f"{name}={name},{how}" for name, (how, _) in REFUSED.items()]
    return in_one_and_two(tmp_path_factory.mktemp("trained"), QUICK, more)


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
        assert_close(one["prior"], one["drawn"], rtol=0, atol=1e-12)
        # but FSDP2's hooks send a Llama through transformers' own pass, whose norms are in single precision
        assert_close(one["drawn"], expected["drawn"], rtol=0, atol=1e-5 if (job, how) == ("llama", "shard") else 0)
    assert (folder / f"{job}-from-1-{how}.0.interrupted").exists()
    assert (folder / f"{job}-from-2-{how}.1.interrupted").exists()  # by the main process, whose Ctrl-C it was


def require_same_metrics(folder, job, how):
    """One process logs each step once, and what it logs is of the whole batch."""
    expected = rows(folder / job)
    for name in (f"{job}-{how}", f"{job}-from-1-{how}", f"{job}-from-2-{how}"):
        found = rows(folder / name)
        assert [row["step"] for row in found] == [1, 2, 3, 4]
        for one, other in zip(map(flat, found), map(flat, expected), strict=True):
            calls = one.pop("/reward_calls/calls"), other.pop("/reward_calls/calls")
            assert calls in {(2, 1), (1, 1)}  # each process asks for its own completions
            assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


def flat(value, path=""):
    """Nested numbers by their path; all else by its hash, which is the same or not."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, one in inner for key, leaf in flat(one, f"{path}/{name}").items()}
    return {path: value if isinstance(value, int | float) else hash(value)}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("job", QUICK)
def test_two_processes_are_as_one(trained, job, how):
    require_same(trained, job, how)
    require_same_metrics(trained, job, how)


@pytest.mark.slow
@pytest.mark.parametrize("job", SLOW)
def test_two_processes_are_as_one_with_other_engines_and_models(tmp_path, job):
    in_one_and_two(tmp_path, [job])
    for how in HOW:
        require_same(tmp_path, job, how)
        require_same_metrics(tmp_path, job, how)


def test_checkpoints_are_sharded_where_weights_are(trained):
    def files(name):
        return {path.name for path in (trained / name / "checkpoints" / "step-000004").iterdir()}

    plain = {"manifest.json", "state.json", "state.safetensors"}
    assert files("lora-plain") == plain == files("lora")
    shards = {f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)}
    assert files("lora-shard") == plain | shards
    sizes = [(trained / "lora-shard" / "checkpoints" / "step-000004" / name).stat().st_size for name in shards]
    assert max(sizes) < 1.02 * min(sizes)
    path = trained / "lora-shard" / "checkpoints" / "step-000004" / min(shards)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert checkpoint.damage(path.parent) == f"{path.name} has changed"
    path.write_bytes(whole)


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_process_cannot_do_all_of_them_refuse(trained, name):
    """With one sentence; and they remain in step, for the runs behind it came to their ends."""
    said = [(trained / f"{name}.{rank}.refused").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert re.search(REFUSED[name][1], said[0]), said[0]


@pytest.fixture
def recipe(here, models):
    """A recipe whose temperature has to be planned first, and whose reward does something else in the second process."""
    (here / "rewards.py").write_text(REWARDS + IN_PROCESSES)
    changes = {"beta": None, "kl_budget": 0.5, "certify_every": 3, "shard": True, "reward": "rewards.py:fails_in_one"}
    return write(here / "recipe.yaml", settings(models, **changes))


IN_PROCESSES = """

import os
import signal

second = os.environ.get("RANK") == "1"
calls = 0


def fails_in_one(completions):
    global calls
    calls += 1
    return [1 / 0 if second and calls == 2 else 0.5 + len(c) / 100 for c in completions]


def waits_in_one(completions):
    global calls
    calls += 1
    if second and calls == 2:
        print("waiting", flush=True)
        signal.pause()
    return [0.5 + len(c) / 100 for c in completions]


def dies_in_one(completions):
    global calls
    calls += 1
    if second and calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.5 + len(c) / 100 for c in completions]
"""


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.slow
def test_the_command_ends_with_one_sentence_wherever_it_fails(here, recipe):
    with processes(2, "-m", "tiltlm", "train", "recipe.yaml", cwd=here) as started:
        main, other = ended(started)
    assert (main[0], other[0]) == (2, 2), main[2] + other[2]
    assert len(errors(main[2])) == 1
    assert "fails_in_one" in errors(main[2])[0]
    assert (other[1], errors(other[2])) == ("", [])
    assert not (here / "run" / "policy").exists()


@pytest.mark.slow
def test_ctrl_c_in_one_process_ends_all_and_a_run_can_go_on_in_one(here, recipe, cli):
    changes = ["--reward", "rewards.py:waits_in_one", "--checkpoint-every", "1"]
    with processes(2, "-m", "tiltlm", "train", "recipe.yaml", *changes, cwd=here) as started:
        assert started[1].stdout.readline() == "waiting\n"
        started[1].send_signal(signal.SIGINT)
        main, other = ended(started)
    assert (main[0], other[0]) == (130, 130), main[2] + other[2]
    assert main[2].strip().splitlines()[-1].startswith("interrupted; what the last checkpoint holds is safe")
    finished = cli("train", "recipe.yaml", *changes, "--resume")
    assert finished.code == 0, finished.err
    assert [row["step"] for row in rows(here / "run")] == [1, 2, 3]
    assert (here / "run" / "policy" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_process_that_is_killed_is_noticed_by_the_others(here, recipe):
    changes = ["--reward", "rewards.py:dies_in_one"]
    with processes(2, "-m", "tiltlm", "train", "recipe.yaml", *changes, cwd=here) as started:
        main, other = ended(started)
    assert other[0] == -signal.SIGKILL
    assert main[0] == 2, main[2]
    assert "another process has ended" in errors(main[2])[0]


@pytest.mark.slow
def test_accelerate_launches_it(here, recipe):
    command = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "tiltlm", "train", "recipe.yaml"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            *command,
            "--reward",
            "rewards.py:good",
            "--json",
            "last.json",
        ],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("policy: run/policy") == 1
    assert json.loads((here / "last.json").read_text())["last_step"]["step"] == 3


def test_other_commands_are_not_shared(here, recipe, refused, monkeypatch):
    with entered(World(0, 2)):
        assert "tiltlm certify runs in one process, and 2 were launched; only train is" in refused("certify", recipe)


def test_accelerate_on_a_cpu_starts_one_process_and_that_is_said(here, recipe, refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    _join.cache_clear()
    assert "accelerate launch --cpu has started one process only" in refused("train", recipe)
    _join.cache_clear()
