"""A run that was killed goes on to the very weights that it would have had."""

import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
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
from tiltlm.records import Prompts
from tiltlm.store import load_scored, save_scored

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


def answered(prompts, completions, answer, **_):
    return [float(letter in text) for letter, text in zip(answer, completions, strict=True)]


NOTHING = Prompts(torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool), ())


def about(**columns):
    return [{"prompt": text, "id": 1, **{k: v[n] for k, v in columns.items()}} for n, text in enumerate(PROMPTS)]


def rewarded(reward):
    return target().prior * tl.Reward(reward, beta=0.2)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    out = tmp_path_factory.mktemp("judged")
    train(out, about(answer=["a"] * len(PROMPTS)), on=rewarded(answered), steps=2)
    return out


class TestColumns:
    """Rewards read them, so a run with other values in them is another run."""

    @pytest.fixture
    def run(self, judged, tmp_path):
        return Path(shutil.copytree(judged, tmp_path / "run"))

    @pytest.mark.parametrize(
        ("rows", "column"),
        [
            (about(answer=["a"] * (len(PROMPTS) - 1) + ["b"]), "answer"),
            (about(answer=["a"] * len(PROMPTS), more=[0] * len(PROMPTS)), "more"),
            (about(answer=[["a"]] * len(PROMPTS), id=["1"] * len(PROMPTS)), "answer, id"),
        ],
    )
    def test_other_values_are_refused_by_their_columns_name(self, run, rows, column):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        says = f"of another run: its prompts have other values in the column {column}; resume with the same data, or choose"
        with pytest.raises(tl.InputError, match=says):
            train(run, rows, on=rewarded(answered), steps=2, resume=True)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    def test_a_mended_reward_of_the_same_name_goes_on(self, run):
        def mended(prompts, completions, answer, **_):
            return [float(letter in text) for letter, text in zip(answer, completions, strict=True)]

        mended.__name__ = answered.__name__
        train(run, about(answer=["a"] * len(PROMPTS)), on=rewarded(mended), steps=2, resume=True)

    def test_a_checkpoint_that_knows_no_columns_goes_on(self, run):
        file, listed = (state(run, 2).with_name(name) for name in ("state.json", "manifest.json"))
        values, manifest = json.loads(file.read_text()), json.loads(listed.read_text())
        del values["identity"]["columns"]
        file.write_text(json.dumps(values))
        manifest["sha256"]["state.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
        listed.write_text(json.dumps(manifest))
        train(run, about(answer=["b"] * len(PROMPTS)), on=rewarded(answered), steps=2, resume=True)

    def test_any_value_has_a_hash_that_another_process_finds_too(self, tmp_path):
        made = (
            "import datetime, numpy, torch; from PIL import Image; from tiltlm.records import Prompts; "
            "columns = {'a': (numpy.int64(4), b'x', datetime.date(2024, 1, 2), object()), 'b': ({1: 'a', 'k': {'x', 'y', 'z'}},), "
            "'c': (numpy.arange(5000), numpy.array(['x', None]), torch.arange(3), torch.ones(()).bfloat16()), "
            "'d': (Image.new('RGB', (2, 2)),)}; "
            "print(Prompts(torch.zeros(0, 0), torch.zeros(0, 0), (), columns).column_fingerprints())"
        )
        said = {
            subprocess.run(
                [sys.executable, "-c", made],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PYTHONHASHSEED": seed},
            ).stdout
            for seed in "12"
        }
        assert len(said) == 1

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (4, "4"),
            (4, np.int64(4)),
            ((1,), [1]),
            ({1: "a"}, {"1": "a"}),
            (np.arange(5000), np.where(np.arange(5000) == 2500, 0, np.arange(5000))),
            (torch.zeros(2), torch.zeros(2, dtype=torch.long)),
            ("a, b", "a,b"),
        ],
    )
    def test_and_another_one_for_another_value(self, one, other):
        hashes = [replace(NOTHING, columns={"a": (value,)}).column_fingerprints()["a"] for value in (one, other)]
        assert hashes[0] != hashes[1]
        assert replace(NOTHING, columns={"a": (one,)}).column_fingerprints()["a"] == hashes[0]


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
    with pytest.raises(SystemExit) as end, pytest.warns(tl.TiltWarning, match="the reward .* has changed since"):
        run_program()
    assert end.value.code == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "policy" / "adapter_model.safetensors").is_file()


class TestStoredDraws:
    """What a later command asks of stored draws, it has to ask with the values that the first one had."""

    ROWS = (
        {
            "prompt": "the film",
            "answer": np.int64(4),
            "when": datetime.date(2024, 1, 2),
            "raw": b"\x89",
            "of": (1, {1: "a"}),
        },
        {"prompt": "good", "answer": np.int64(5), "when": datetime.date(2024, 1, 3), "raw": b"", "of": (2, {2: "b"})},
    )

    def test_a_reward_sees_the_same_columns(self, tmp_path):
        seen = []

        def gold(completions, answer, when, raw, of, **_):
            seen.append(list(zip(answer, when, raw, of, strict=True)))
            return [float(number) for number in answer]

        whole = target().prior * tl.Reward(gold, beta=1.0)
        prompts = whole.prior.encode(self.ROWS)
        scored = whole.score(whole.prior.draw(prompts, 2, torch.Generator().manual_seed(0)))
        save_scored(scored, tmp_path, "key")
        again = load_scored(tmp_path, "key", prompts)
        whole.score(again.draws)
        assert seen[0] == seen[1]
        assert [[type(value) for value in row] for row in seen[0]] == [
            [type(value) for value in row] for row in seen[1]
        ]
        assert again.log_evidence.equal(scored.log_evidence)
        assert again.draws.texts == scored.draws.texts
        assert load_scored(tmp_path, "another", prompts) is None

    def test_draws_that_were_stored_with_their_prompts_are_still_read(self, tmp_path):
        whole = target()
        prompts = whole.prior.encode(self.ROWS)
        scored = whole.score(whole.prior.draw(prompts, 2, torch.Generator().manual_seed(0)))
        save_scored(scored, tmp_path, "key")
        file = tmp_path / "draws.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "prompts": ["x", "y"], "columns": {"answer": ["4", "5"]}})
        )
        assert load_scored(tmp_path, "key", prompts).draws.prompts is prompts
