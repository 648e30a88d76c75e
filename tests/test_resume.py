"""A run that was killed goes on to the very weights that it would have had."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import tiltlm as tl
from conftest import make_model, make_tokenizer
from kill_and_resume import EVERY, PROMPTS, STEPS, scenarios, shortness
from tiltlm.cli.main import run as run_program
from tiltlm.inference import checkpoint
from tiltlm.lm.load import load

SEED = 20240
NAMES = tuple(scenarios(1.0, SEED))


def rows(out):
    """The metrics without what a clock says."""
    timed = ("seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def same_tensors(a, b):
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Every scenario, run in one process of its own; the folder and how the runs ended."""
    folder = tmp_path_factory.mktemp("killed")
    alone = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TILTLM_CACHE": str(folder)}
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "kill_and_resume.py"), str(folder), str(SEED)],
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "disk full"])
def test_a_killed_run_ends_with_the_same_weights(killed, name):
    folder, ends = killed
    *kills, last = ends[name]
    if "moment" not in name:  # a moment may come after the end on a machine that has sped up
        assert all(end["killed"] for end in kills), kills
    assert last["code"] == 0, last
    last_one = f"checkpoints/step-{STEPS:06d}/state.safetensors"
    assert same_tensors(folder / "whole" / last_one, folder / name / last_one)
    adapter = "policy/adapter_model.safetensors"
    assert same_tensors(folder / "whole" / adapter, folder / name / adapter)


@pytest.mark.parametrize("name", NAMES)
def test_and_every_step_is_logged_once(killed, name):
    folder, _ = killed
    assert [row["step"] for row in rows(folder / name)] == list(range(1, STEPS + 1))
    assert rows(folder / name) == rows(folder / "whole")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_unfinished_is_left_behind(killed, name):
    folder, _ = killed
    names = sorted(path.name for path in (folder / name / "checkpoints").iterdir())
    assert names == [f"step-{STEPS - EVERY:06d}", f"step-{STEPS:06d}"]


def test_a_full_disk_is_a_clear_message_and_the_last_checkpoint_stays(killed):
    folder, ends = killed
    full, resumed = ends["disk full"]
    assert full["code"] == 2
    assert re.search(
        r"checkpoint .*step-000006 cannot be written \(.*too large.*\); the last good checkpoint is step 4",
        full["said"],
    )
    assert resumed["code"] == 0
    last_one = f"checkpoints/step-{STEPS:06d}/state.safetensors"
    assert same_tensors(folder / "whole" / last_one, folder / "disk full" / last_one)


# --- in this process ---

QUICK = {"steps": 6, "batch": 1, "lr": 1e-2, "checkpoint_every": 2}


def target(beta=0.2, seed=0, max_new_tokens=4):
    prior = load(make_model("llama", seed=seed), make_tokenizer()).prior(max_new_tokens=max_new_tokens)
    return prior * tl.Reward(shortness, beta=beta)


def train(out, prompts=PROMPTS, *, on=None, group=2, lora=None, **changes):
    settings = {"lora": lora or tl.LoRA(r=2), **QUICK, **changes}
    return tl.fit(on or target(), prompts, tl.RLOO(group=group), out=out, **settings)


def state(out, step):
    return out / "checkpoints" / f"step-{step:06d}" / "state.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    train(out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, with checkpoints 4 and 6, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(folder):
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def truncate(folder):
    os.truncate(folder / "state.safetensors", 100)


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def half_a_manifest(folder):
    os.truncate(folder / "manifest.json", 20)


def no_state(folder):
    (folder / "state.json").unlink()


def a_list(folder):
    (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize("damage", [flip, truncate, no_manifest, half_a_manifest, no_state, a_list])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, run, damage):
    damage(state(run, 6).parent)
    with pytest.warns(tl.TiltWarning, match=r"checkpoint .*step-000006 is damaged \(.*\); the one before it is used"):
        train(run, resume=True)
    assert same_tensors(state(run, 6), state(finished, 6))
    assert rows(run) == rows(finished)


def test_with_no_whole_checkpoint_left_training_starts_anew_and_says_so(finished, run):
    for step in (4, 6):
        flip(state(run, step).parent)
    with pytest.warns(tl.TiltWarning) as said:
        train(run, resume=True)
    first, second = [str(w.message) for w in said if issubclass(w.category, tl.TiltWarning)]
    assert "step-000006 is damaged (state.safetensors has changed); the one before it is used" in first
    assert re.search("step-000004 is damaged .*; there is none before it, so training starts anew", second)
    assert same_tensors(state(run, 6), state(finished, 6))
    assert rows(run) == rows(finished)


def test_a_finished_run_trains_no_further(run, finished):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    policy = train(run, resume=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    saved = load_file(state(finished, 6))
    for name, value in policy.named_parameters().items():
        assert torch.equal(value, saved[f"weight.{name}"])


def test_resuming_where_nothing_is_starts_anew(tmp_path, finished):
    train(tmp_path, resume=True)
    assert same_tensors(state(tmp_path, 6), state(finished, 6))


def test_what_was_logged_before_the_first_checkpoint_is_forgotten(tmp_path, finished):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    train(tmp_path)
    assert rows(tmp_path) == rows(finished)


def test_lost_metrics_do_not_stop_a_run(run):
    state(run, 6).parent.joinpath("manifest.json").unlink()
    (run / "metrics.jsonl").unlink()
    with pytest.warns(tl.TiltWarning):
        train(run, resume=True)
    assert [row["step"] for row in rows(run)] == [5, 6]


def test_an_earlier_run_is_not_overwritten(run):
    with pytest.raises(
        tl.InputError, match="holds checkpoints of an earlier run; go on with --resume, or choose another"
    ):
        train(run)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lr": 2e-2}, "its lr is 0.01, now it is 0.02"),
        ({"on": lambda: target(beta=0.3)}, "its beta is 0.2, now it is 0.3"),
        ({"on": lambda: target(seed=1)}, "its model is"),
        ({"on": lambda: target(max_new_tokens=5)}, "its law is"),
        ({"prompts": ["another"]}, "its prompts is"),
        ({"group": 3}, r"its engine is 'RLOO\(group=2.*', now it is 'RLOO\(group=3"),
        ({"seed": 1}, "its seed is 0, now it is 1"),
        ({"steps": 7}, "its steps is 6, now it is 7"),
        ({"batch": 2}, "its batch is 1, now it is 2"),
        ({"schedule": "cosine"}, "its schedule is 'linear', now it is 'cosine'"),
        ({"clip": 0.5}, "its clip is 1.0, now it is 0.5"),
        ({"lora": tl.LoRA(r=4)}, "its policy is .*r=2.*, now it is .*r=4"),
        ({"lora": tl.LoRA(r=2, alpha=1.0)}, "its policy is .*alpha=None.*, now it is .*alpha=1.0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_settings_are_refused_and_nothing_is_touched(run, changes, field):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    changes = {name: value() if name == "on" else value for name, value in changes.items()}
    with pytest.raises(tl.InputError, match=f"of another run: {field}.*; resume with the same settings, or choose"):
        train(run, resume=True, **changes)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_no_room_for_a_checkpoint_leaves_the_last_good_one(tmp_path, monkeypatch, finished, error):
    calls, save = [], checkpoint.save_file

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of it")
            raise error
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        tl.InputError, match=r"step-000004 cannot be written \(.*No space left.*\); the last good .* is step 2"
    ):
        train(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert checkpoint.damage(state(tmp_path, 2).parent) is None
    train(tmp_path, resume=True)
    assert same_tensors(state(tmp_path, 6), state(finished, 6))


def test_nothing_in_a_checkpoint_is_pickled(finished):
    files = {path.suffix for path in (finished / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}


REWARD = """
import signal

calls = 0

def shortness(completions):
    global calls
    calls += 1
    if calls == 4:  # three steps are done, and one checkpoint
        print("three steps", flush=True)
        signal.pause()
    return [-len(c) / 10 for c in completions]
"""


def test_ctrl_c_exits_with_130_and_a_run_that_can_go_on(tmp_path, monkeypatch):
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "waits.py").write_text(REWARD)
    recipe = ["--model", "model", "--prompts", "prompts.txt", "--reward", "waits.py:shortness", "--beta", "0.2"]
    recipe += ["--max-new-tokens", "4", "--steps", "6", "--checkpoint-every", "2", "--lora-r", "2", "--out", "run"]
    command = [sys.executable, "-m", "tiltlm", "train", *recipe]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell starts background jobs with SIGINT ignored, and children inherit that; the user at a terminal has it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == "three steps\n", process.stderr.read()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()  # a failure must not leave the test waiting for it
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1] == "interrupted; what the last checkpoint holds is safe: go on with --resume"
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.step == 2
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    (tmp_path / "waits.py").write_text(REWARD.replace("calls == 4", "False"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tiltlm", "train", *recipe, "--resume"])
    with pytest.raises(SystemExit) as end:
        run_program()
    assert end.value.code == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "policy" / "adapter_model.safetensors").is_file()
