"""User functions that raise, hang, crash, fork or eat memory: the run goes on, and nothing is left running."""

import asyncio
import gc
import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import tiltlm as tl
from conftest import make_model, make_tokenizer
from test_reward import draws
from tiltlm.evidence.running import Batched, Cached, Isolated, Retried, concurrently, counting, safely
from tiltlm.evidence.running.tally import SlowRewardWatch, Tally
from tiltlm.evidence.running.worker import MARK

FUNCTIONS = """
import ctypes, math, os, pathlib, signal, subprocess, sys, time

def length(completions):
    return [float(len(c)) for c in completions]

def answered(completions, answer, scale=2.0):
    return [scale * (a in c) for a, c in zip(answer, completions)]

def everything(**kwargs):
    return [float(len(kwargs))] * len(kwargs["completions"])

def where(completions):
    return [float(os.getpid())] * len(completions)

def meet(completions):
    here = pathlib.Path(__file__).parent
    (here / f"{os.getpid()}.pid").touch()
    while len(list(here.glob("*.pid"))) < 2:
        time.sleep(0.01)
    return where(completions)

def sleeps(completions):
    if "bad" in completions:
        time.sleep(3600)
    return length(completions)

def spins(completions):
    while "bad" in completions:
        pass
    return length(completions)

def slow(completions):
    time.sleep(0.25 * len(completions))
    return length(completions)

def raises(completions):
    if "bad" in completions:
        raise KeyError("no such word")
    return length(completions)

def together(completions):
    assert len(completions) == 1
    return length(completions)

def leaves(completions):
    if "bad" in completions:
        os._exit(3)
    return length(completions)

def exits(completions):
    if "bad" in completions:
        sys.exit("goodbye")
    return length(completions)

def crashes(completions):
    if "bad" in completions:
        ctypes.string_at(0)
    return length(completions)

def killed(completions):
    if "bad" in completions:
        os.kill(os.getpid(), signal.SIGKILL)
    return length(completions)

def eats(completions):
    if "bad" in completions:
        hoard = []
        while True:
            hoard.append(bytearray(1 << 24))
    return length(completions)

def forks(completions):
    if os.fork() == 0 and "bad" in completions:
        time.sleep(3600)
    return length(completions)

def breeds(completions):
    if "bad" in completions:
        plain = subprocess.Popen(["sleep", "3601"])
        gone = subprocess.Popen(["sleep", "3602"], start_new_session=True)
        orphan = "import subprocess; subprocess.Popen(['sleep', '3603'], start_new_session=True)"
        subprocess.run([sys.executable, "-S", "-c", orphan], check=True)
        time.sleep(3600)
    return length(completions)

def breeds_and_returns(completions):
    subprocess.Popen(["sleep", "3604"], start_new_session=True)
    return length(completions)

def breeds_and_dies(completions):
    if "bad" in completions:
        subprocess.Popen(["sleep", "3605"], start_new_session=True)
        os._exit(1)
    return length(completions)

def prints(completions):
    print("x" * 100_000)
    os.write(1, b"raw")
    os.write(2, b"raw")
    return length(completions)

def mutates(prompts, completions, answer):
    found = [float(len(a)) for a in answer]
    prompts.clear(), completions.append("more"), answer[0].append("more")
    return found

async def waits(completions):
    import asyncio
    await asyncio.sleep(0.01)
    return length(completions)

class Thing:
    def __float__(self):
        return 0.5

def numbers(completions):
    import decimal, fractions
    return [Thing(), decimal.Decimal("0.25"), fractions.Fraction(1, 8), True][: len(completions)]

def nothing(completions):
    return None

def short(completions):
    return [0.5]

def partly(completions):
    return [{"bad": None, "": math.nan, "fine": math.inf}.get(c, 1.0) for c in completions]

def large(completions):
    return [float(sum(map(len, completions)))] * len(completions)
"""


OURS = "TILTLM_TESTS_OF"


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """After every test: no child of this process, and nobody who carries a worker's mark and comes from here.

    What a test starts inherits `OURS`; another process of pytest-xdist, which may run this file too, has another value.
    """
    monkeypatch.setenv(OURS, str(os.getpid()))
    yield
    gc.collect()
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)  # a busy machine reaps late
    assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []
    assert marked() == []


def marked():
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            own = MARK in environment and environment.get(OURS) == str(os.getpid())
            if own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return lambda name: f"{path}:{name}"


@pytest.fixture
def isolated(source):
    """`Isolated` on a function of the file; closed at the end."""
    made = []

    def make(name, **settings):
        made.append(Isolated(source(name), **settings))
        return made[-1]

    yield make
    for fn in made:
        fn.close()


def judged(fn, on_error="drop", given=None):
    """Rewards of good, bad, "", fine; None where dropped."""
    likelihood = tl.Reward(fn, on_error=on_error).log_likelihood(draws() if given is None else given)
    return [v if k else None for v, k in zip(likelihood.log.tolist(), likelihood.kept.tolist(), strict=True)]


def length(completions):
    return [float(len(c)) for c in completions]


class TestIsolation:
    def test_the_same_values_as_in_this_process(self, isolated):
        assert judged(isolated("length", workers=2)) == judged(length) == [4, 3, 0, 4]

    def test_it_is_another_process_and_stays_the_same_one(self, isolated):
        fn = isolated("where")
        first, second = judged(fn), judged(fn)
        assert first == second
        assert first[0] != os.getpid()

    def test_a_batch_is_shared_out(self, isolated):
        assert len(set(judged(isolated("meet", workers=2, timeout=20)))) == 2

    def test_arguments_columns_defaults_and_name_are_the_functions_own(self, isolated):
        fn = isolated("answered")
        assert fn.__name__ == "answered"
        assert judged(fn, given=draws(columns={"answer": ("oo", "x")})) == [2, 0, 0, 0]
        with pytest.raises(tl.InputError, match="reward 'answered' asks for 'answer'"):
            judged(fn)
        assert judged(isolated("everything"), given=draws(columns={"answer": ("oo", "x")})) == [4] * 4

    def test_functions_that_pickle_finds(self, tmp_path, monkeypatch):
        (tmp_path / "a_module_of_rewards.py").write_text(FUNCTIONS)
        monkeypatch.syspath_prepend(tmp_path)
        import a_module_of_rewards  # pyright: ignore[reportMissingImports]

        with Isolated(a_module_of_rewards.length) as fn:
            assert judged(fn) == [4, 3, 0, 4]

    def test_called_as_a_function(self, isolated):
        assert isolated("length")(completions=["a", "bcd"]) == [1, 3]
        with pytest.raises(Exception, match=r"raised KeyError \('no such word'\)"):
            isolated("raises")(completions=["a", "bad"])

    @pytest.mark.parametrize(
        ("name", "says", "counted"),
        [
            ("raises", r"raised KeyError \('no such word'\) in functions.py, line \d+", {}),
            ("exits", r"raised SystemExit \(goodbye\) in functions.py, line \d+", {}),
            ("sleeps", "took more than 0.5 s", {"timed_out": 2}),
            ("spins", "took more than 0.5 s", {"timed_out": 2}),
            ("leaves", "ended its process with exit code 3", {"died": 2}),
            ("crashes", "ended its process by SIGSEGV", {"died": 2}),
            ("killed", "ended its process by SIGKILL, perhaps for want of memory", {"died": 2}),
            ("eats", "used up its memory of 200 MiB", {"died": 2}),
        ],
    )
    def test_only_the_completion_at_fault_is_lost(self, isolated, name, says, counted):
        slow = name in ("sleeps", "spins")
        fn = isolated(name, timeout=0.5 if slow else 20, memory=200 if name == "eats" else None)
        with counting() as tally:
            assert judged(fn) == [4, None, 0, 4]
        assert {what: tally.counts[what] for what in ("timed_out", "died") if tally.counts[what]} == counted
        assert tally.counts["failed"] == 1
        assert tally.counts["calls"] == 1 + 4
        with pytest.raises(
            tl.InputError, match=f"reward '{name}' {says} for completion 'bad'; mend the reward, or set"
        ):
            judged(fn, on_error="fail")

    def test_under_fail_nothing_more_is_asked(self, isolated):
        with counting() as tally, pytest.raises(tl.InputError, match="'bad'"):
            judged(Batched(isolated("raises"), 1), on_error="fail")
        assert tally.counts["calls"] == 2

    def test_too_slow_together_is_judged_one_by_one_and_said(self, isolated):
        with pytest.warns(
            tl.TiltWarning, match="'slow' took more than 0.6 s for 4 completions together.*set batch to fewer"
        ):
            assert judged(isolated("slow", timeout=0.6)) == [4, 3, 0, 4]
        assert judged(Batched(isolated("slow", timeout=0.6), 1)) == [4, 3, 0, 4]

    def test_raising_together_only_is_an_error(self, isolated):
        with pytest.raises(
            tl.InputError, match="raised AssertionError in .* for 4 completions together, though for none of"
        ):
            judged(isolated("together"))

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("nothing", "returned NoneType; return a list with one number a completion"),
            ("short", "returned 1 values for 4 completions; return one a completion"),
        ],
    )
    def test_not_one_value_a_completion(self, isolated, name, says):
        with pytest.raises(tl.InputError, match=f"reward '{name}' {says}"):
            judged(isolated(name))

    def test_values_that_are_no_numbers(self, isolated):
        assert judged(isolated("partly")) == [1, None, None, None]
        for text, says in (("bad", "is None"), ("", "is nan"), ("fine", "is inf")):
            with pytest.raises(tl.InputError, match=f"{says} for completion '{text}'"):
                judged(isolated("partly"), "fail", draws((text,), per_prompt=1))

    def test_numbers_of_any_kind(self, isolated):
        assert judged(isolated("numbers")) == [0.5, 0.25, 0.125, 1.0]

    def test_what_it_prints_does_not_corrupt_the_protocol(self, isolated, capfd):
        assert judged(isolated("prints")) == [4, 3, 0, 4]
        assert "x" * 100_000 in capfd.readouterr().out

    @pytest.mark.parametrize("workers", [0, 1])
    def test_mutated_arguments_stay_with_the_call(self, source, tmp_path, workers):
        given = draws(columns={"answer": (["a"], ["b", "c"])})
        if workers:
            fn = Isolated(source("mutates"))
        else:
            space = {}
            exec(FUNCTIONS, space)
            fn = space["mutates"]
        for _ in range(2):
            assert judged(fn, given=given) == [1, 1, 2, 2]
        assert given.prompts.columns == {"answer": (["a"], ["b", "c"])}
        assert given.texts == ("good", "bad", "", "fine")

    def test_more_than_a_pipe_holds(self, isolated):
        long = draws(("x" * 3_000_000, "y"), per_prompt=1)
        assert judged(isolated("large"), given=long) == [3_000_001] * 2

    def test_coroutines(self, isolated):
        assert judged(isolated("waits")) == [4, 3, 0, 4]


class TestNothingIsLeft:
    @pytest.mark.parametrize("name", ["breeds", "breeds_and_dies"])
    def test_children_of_a_call_that_is_killed_or_dies(self, isolated, name):
        fn = isolated(name, timeout=1.0)
        assert judged(fn) == [4, None, 0, 4]
        assert len(marked()) == 1  # the worker itself, a new one

    def test_children_of_a_call_that_returned_end_with_the_worker(self, isolated):
        fn = isolated("breeds_and_returns")
        assert judged(fn) == [4, 3, 0, 4]
        assert len(marked()) == 2
        fn.close()
        assert marked() == []

    def test_a_forked_child_does_not_answer_too(self, isolated):
        fn = isolated("forks", timeout=20)
        assert judged(fn) == [4, 3, 0, 4]
        assert judged(fn, given=draws(("a", "b"))) == [1, 1]

    def test_the_object_takes_its_workers_with_it(self, source):
        fn = Isolated(source("length"), workers=2)
        judged(fn)
        assert len(marked()) == 2
        del fn
        gc.collect()
        assert marked() == []

    def test_a_worker_that_was_killed_while_idle_is_replaced(self, isolated):
        fn = isolated("length")
        judged(fn)
        (worker,) = marked()
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # a signal is not there at once
        with counting() as tally:
            assert judged(fn) == [4, 3, 0, 4]
        assert not tally.counts["died"]

    def test_a_closed_one_starts_anew(self, isolated):
        fn = isolated("length")
        judged(fn)
        fn.close()
        assert marked() == []
        assert judged(fn) == [4, 3, 0, 4]

    @pytest.mark.parametrize("ending", ["exit", pytest.param("raise", marks=pytest.mark.slow), "kill", "interrupt"])
    def test_however_the_program_ends(self, source, tmp_path, ending):
        script = tmp_path / "script.py"
        script.write_text(
            "import os, sys, signal\n"
            "from tiltlm.evidence.running import Isolated\n"
            f"fn = Isolated({source('length')!r}, workers=1)\n"
            f"hangs = Isolated({source('breeds')!r}, workers=1)\n"
            "fn(completions=['a'])\n"
            "print('ready', flush=True)\n"
            "if sys.argv[1] == 'raise': 1 / 0\n"
            "if sys.argv[1] in ('kill', 'interrupt'): hangs(completions=['bad'])\n"
        )
        command = [sys.executable, str(script), ending]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **fresh()) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if ending in ("kill", "interrupt"):
                wait_until(lambda: len(marked()) >= 5)  # two workers and three sleepers
                process.send_signal(signal.SIGKILL if ending == "kill" else signal.SIGINT)
            process.communicate(timeout=30)
        wait_until(lambda: not marked())


def fresh():
    """A child as a terminal starts it: with SIGINT."""
    return {
        "text": True,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }


def wait_until(condition, seconds=20):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fn", "says"),
        [
            (lambda completions: [], "cannot be sent to a worker process .*Isolated\\('file.py:function'\\)"),
            ("good", "reward is 'good'; write it as file.py:function"),
            ("none.py:good", "there is no file 'none.py'"),
        ],
    )
    def test_functions_a_worker_cannot_find(self, fn, says):
        with pytest.raises(tl.InputError, match=says):
            Isolated(fn)

    def test_main(self, monkeypatch):
        def notebook(completions):
            return []

        notebook.__module__, notebook.__qualname__ = "__main__", "notebook"
        monkeypatch.setattr(sys.modules["__main__"], "notebook", notebook, raising=False)
        with pytest.raises(tl.InputError, match="'notebook' is defined in __main__.*put it into a file"):
            Isolated(notebook)

    @pytest.mark.parametrize(
        ("code", "says"),
        [
            ("1 / 0", "raised ZeroDivisionError on import \\(division by zero\\); mend it"),
            ("import os; os._exit(1)", "ended its process with exit code 1"),
            ("import time; time.sleep(3600)", "was not loaded within 1 s"),
            ("def god(completions): ...", "has no function 'good'; it has god"),
        ],
    )
    def test_files_that_do_not_load(self, tmp_path, code, says):
        path = tmp_path / "broken.py"
        path.write_text(code)
        with pytest.raises(tl.InputError, match=says):
            judged(Isolated(f"{path}:good", startup=1 if "sleep" in code else 60))

    @pytest.mark.parametrize("setting", [{"workers": 0}, {"timeout": 0}, {"memory": -1}, {"timeout": float("nan")}])
    def test_settings(self, setting):
        with pytest.raises(tl.InputError, match=next(iter(setting))):
            Isolated("x.py:y", **setting)

    def test_columns_that_cannot_be_sent(self, isolated):
        with pytest.raises(tl.InputError, match="columns .*cannot be sent"):
            judged(isolated("answered"), given=draws(columns={"answer": (lambda: 0, 1)}))


class TestBatchesAndCache:
    def test_batches(self):
        sizes = []

        def fn(completions):
            sizes.append(len(completions))
            return length(completions)

        assert judged(Batched(fn, 3)) == [4, 3, 0, 4]
        assert sizes == [3, 1]
        assert Batched(fn, 3).__name__ == "fn"

    def test_what_is_known_is_not_asked(self):
        asked = []

        def fn(completions, answer):
            asked.extend(zip(completions, answer, strict=True))
            return [float(a in c) for c, a in zip(completions, answer, strict=True)]

        kept = Cached(fn)
        for answer, new in ((("o", "e"), 4), (("o", "e"), 0), (("a", "e"), 2)):
            before = len(asked)
            with counting() as tally:
                given = draws(columns={"answer": answer, "unread": (object(), 0)})
                assert judged(kept, given=given) == [
                    float(a in c) for c, a in zip(given.texts, [answer[0]] * 2 + [answer[1]] * 2, strict=True)
                ]
            assert len(asked) - before == new
            assert tally.counts["cached"] == 4 - new

    def test_twice_in_a_batch_is_asked_once(self):
        with counting() as tally:
            assert judged(Cached(length), given=draws(("a", "bb", "a", "a"))) == [1, 2, 1, 1]
        assert tally.counts["completions"] == 2
        assert tally.counts["cached"] == 2

    def test_prompts_count_where_they_are_read(self):
        kept = Cached(lambda prompts, completions: [float(len(p)) for p in prompts])
        assert judged(kept, given=draws(("a",) * 4)) == [8, 8, 7, 7]

    def test_faults_are_not_kept(self):
        calls = []

        def fn(completions):
            calls.append(completions)
            return [None if c == "bad" else 1.0 for c in completions]

        kept = Cached(fn)
        assert judged(kept) == judged(kept) == [1, None, 1, 1]
        assert calls == [["good", "bad", "", "fine"], ["bad"]]

    def test_the_size_is_kept_to(self):
        kept = Cached(length, size=2)
        judged(kept)
        with counting() as tally:
            judged(kept, given=draws(("", "fine", "good", "bad")))
        assert tally.counts["cached"] == 2

    def test_a_resumed_run_does_not_pay_twice(self, tmp_path):
        for expected in (0, 4):
            kept = Cached(length, path=tmp_path / "new" / "rewards.sqlite")
            with counting() as tally:
                assert judged(kept) == [4, 3, 0, 4]
            assert tally.counts["cached"] == expected
            kept.close()
            assert judged(kept) == [4, 3, 0, 4]

    def test_other_code_has_other_values(self, tmp_path):
        file = tmp_path / "rewards.sqlite"
        for version, value in (("1", 0.25), ("2", 0.5), ("1", 0.25)):
            assert (
                judged(Cached(lambda completions, v=value: [v] * len(completions), path=file, version=version))
                == [value] * 4
            )

    def test_values_are_exact(self, tmp_path):
        values = [0.1 + 0.2, -1e-308, 5e-324, 1.7976931348623157e308]
        for _ in range(2):
            assert judged(Cached(lambda completions: values, path=tmp_path / "c", version="1")) == values

    def test_a_crash_in_a_transaction_leaves_a_whole_file(self, tmp_path):
        code = (
            "import os, sqlite3, sys\n"
            "from tiltlm.evidence.running import Cached\n"
            "def fn(completions):\n"
            "    if completions == ['c']: os.kill(os.getpid(), 9)\n"
            "    return [1.0] * len(completions)\n"
            f"kept = Cached(fn, path={str(tmp_path / 'c')!r}, version='1')\n"
            "kept(completions=['a', 'b']); kept(completions=['c'])\n"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
        with counting() as tally:
            assert Cached(length, path=tmp_path / "c", version="1")(completions=["a", "b", "ccc"]) == [1, 1, 3]
        assert tally.counts["cached"] == 2

    def test_a_file_that_is_none(self, tmp_path):
        (tmp_path / "c").write_text("something else, and long enough to have a header of its own" * 20)
        with pytest.raises(tl.InputError, match="cache .*c' cannot be used .*not a database.*; delete it, or choose"):
            judged(Cached(length, path=tmp_path / "c"))

    def test_a_file_that_breaks_costs_a_warning(self, tmp_path):
        kept = Cached(length, path=tmp_path / "c")
        judged(kept, given=draws(("a", "b")))
        with sqlite3.connect(tmp_path / "c") as other:
            other.execute("DROP TABLE rewards")
        with pytest.warns(tl.TiltWarning, match="cannot be used any more"):
            assert judged(kept) == [4, 3, 0, 4]
        assert judged(kept) == [4, 3, 0, 4]

    def test_a_function_that_cannot_be_told_from_others(self, tmp_path):
        bonus = 1.0

        def closure(completions):
            return [bonus] * len(completions)

        for fn in (partial(length), closure):
            with pytest.raises(tl.InputError, match="give version='…'"):
                Cached(fn, path=tmp_path / "c")

    def test_columns_that_are_no_keys(self):
        with pytest.raises(tl.InputError, match="cannot use its arguments answer, completions as a key"):
            judged(Cached(lambda completions, answer: [0.0] * 4), given=draws(columns={"answer": (object(), 1)}))


class Overloaded(ConnectionError):
    pass


class TestRetries:
    def failing(self, times, error):
        left = [times]

        def fn(completions):
            if left[0]:
                left[0] -= 1
                raise error
            return length(completions)

        return fn

    def retried(self, fn, times=3, **settings):
        self.pauses = []
        return Retried(fn, times, sleep=self.pauses.append, rng=torch.Generator().manual_seed(0), **settings)

    def test_until_it_works(self):
        fn = self.retried(self.failing(3, Overloaded("later")), first=1.0, longest=3.0)
        with counting() as tally:
            assert judged(fn, on_error="fail") == [4, 3, 0, 4]
        assert (tally.counts["calls"], tally.counts["retried"]) == (4, 12)
        again = torch.Generator().manual_seed(0)
        assert self.pauses == pytest.approx([m * float(torch.rand((), generator=again)) for m in (1, 2, 3)])

    def test_pauses_are_spread_over_their_interval(self):
        fn = self.retried(length, first=1.0, longest=4.0)
        pauses = torch.tensor([fn._pause(further=k) for k in (0, 1, 2, 5) for _ in range(2000)]).reshape(4, -1)
        most = torch.tensor([1.0, 2.0, 4.0, 4.0])
        torch.testing.assert_close(pauses.mean(1), most / 2, rtol=0.05, atol=0)
        assert (pauses.max(1).values <= most).all()
        assert (pauses.min(1).values < 0.01 * most).all()

    def test_other_errors_are_not_tried_again(self):
        fn = self.retried(self.failing(1, ValueError("wrong")))
        with counting() as tally, pytest.raises(tl.InputError, match="raised ValueError"):
            judged(fn, on_error="fail")
        assert tally.counts["retried"] == 0
        assert self.pauses == []
        with counting() as tally:
            assert judged(self.retried(self.failing(1, ValueError("x")), on=[ValueError])) == [4, 3, 0, 4]
        assert tally.counts["retried"] == 4

    def test_only_what_failed_is_asked_again(self):
        asked = []

        async def one(completion):
            asked.append(completion)
            if asked.count(completion) == 1 and completion == "bad":
                raise TimeoutError
            return 1.0

        assert judged(self.retried(concurrently(one))) == [1] * 4
        assert asked == ["good", "bad", "", "fine", "bad"]

    def test_of_a_worker(self, tmp_path):
        path = tmp_path / "flaky.py"
        path.write_text(
            "class RateLimitError(Exception): ...\nleft = 2\n"
            "def flaky(completions):\n    global left\n    left -= 1\n"
            "    if left >= 0: raise RateLimitError('slower')\n    return [1.0] * len(completions)\n"
        )
        with Isolated(f"{path}:flaky") as fn, counting() as tally:
            assert judged(self.retried(fn), on_error="fail") == [1] * 4
        assert (tally.counts["calls"], tally.counts["retried"]) == (3, 8)

    def test_giving_up_names_the_completion(self):
        fn = self.retried(self.failing(1000, Overloaded("later")), times=2)
        with pytest.raises(tl.InputError, match=r"raised Overloaded \(later\) in .* for completion 'good'"):
            judged(fn, on_error="fail")
        assert judged(fn) == [None] * 4


class TestCoroutines:
    def test_a_coroutine_function_is_a_reward(self):
        async def fn(completions):
            await asyncio.sleep(0.001)
            return length(completions)

        assert judged(fn) == judged(Batched(fn, 1)) == [4, 3, 0, 4]

    def test_where_a_loop_is_running_already(self):
        async def fn(completions):
            return length(completions)

        async def notebook():
            return judged(fn)

        assert asyncio.run(notebook()) == [4, 3, 0, 4]

    def test_leaving_the_program_ends_neither_the_loop_nor_the_run(self):
        """`sys.exit` raised inside an event loop ends the loop, and whoever waits for the coroutine would wait for ever."""

        async def fn(completions):
            if "bad" in completions:
                sys.exit("goodbye")
            return length(completions)

        async def one(completion):
            return (await fn([completion]))[0]

        for reward, says in (
            (fn, r"SystemExit \(goodbye\)"),
            (concurrently(one), r"RuntimeError \(sys.exit: goodbye\)"),
        ):
            assert judged(reward) == [4, None, 0, 4]
            with pytest.raises(tl.InputError, match=f"raised {says} for completion 'bad'"):
                judged(reward, "fail")

    def test_one_loop_for_all_batches(self):
        loops = []

        async def fn(completions):
            loops.append(asyncio.get_running_loop())
            return length(completions)

        judged(fn), judged(fn)
        assert loops[0] is loops[1]

    def test_one_coroutine_a_completion_with_bounded_concurrency(self):
        under_way, most = [0], [0]

        async def one(prompt, completion, answer):
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            await asyncio.sleep(0.005)
            under_way[0] -= 1
            if completion == "bad":
                raise RuntimeError("no")
            return float(len(prompt) + len(completion) + answer)

        fn = concurrently(one, limit=2)
        assert fn.__name__ == "one"
        given = draws(columns={"answer": (100, 200)})
        assert judged(fn, given=given) == [112, None, 207, 211]
        assert most == [2]
        with pytest.raises(tl.InputError, match=r"'one' raised RuntimeError \(no\) in .* for completion 'bad'"):
            judged(fn, "fail", given)

    def test_refusals(self):
        with pytest.raises(tl.InputError, match="no coroutine function"):
            concurrently(length)
        with pytest.raises(tl.InputError, match="limit is 0"):
            concurrently(TestCoroutines.test_refusals, limit=0)


class TestSlowRewards:
    def look(self, steps, reward, others):
        watch = SlowRewardWatch()
        for _ in range(steps):
            tally = Tally()
            tally.seconds.update(fast=0.1 * reward, slow=0.9 * reward)
            watch.look(tally, reward + others)

    def test_are_said_once(self):
        with pytest.warns(
            tl.TiltWarning, match="the reward took 75% of the time so far, most of it 'slow'.*reward_workers"
        ) as said:
            self.look(20, 3.0, 1.0)
        assert len(said) == 1

    def test_others_are_not(self):
        self.look(1, 4.0, 0.0)
        self.look(100, 0.9, 1.0)


def test_all_layers_together(source, tmp_path):
    fn = safely(source("sleeps"), workers=2, timeout=0.7, batch=2, retries=1, cache=tmp_path / "c", version="1")
    assert fn.__name__ == "sleeps"
    assert judged(fn) == [4, None, 0, 4]
    with counting() as tally:
        assert judged(fn) == [4, None, 0, 4]
    assert (tally.counts["cached"], tally.counts["timed_out"], tally.counts["failed"]) == (3, 1, 1)
    assert tally.seconds["sleeps"] > 0.7
    assert safely(length) is length


def test_an_isolated_function_can_be_pickled(isolated):
    with pickle.loads(pickle.dumps(isolated("length", timeout=3))) as again:
        assert again.settings["timeout"] == 3
        assert judged(again) == [4, 3, 0, 4]


class TestTraining:
    """A tiny Llama learns from a reward that hangs for some completions."""

    REWARD = """
import os, subprocess, time

def often(completions):
    for c in completions:
        if len(c) % 4 == 3:
            subprocess.Popen(["sleep", "3607"], start_new_session=True)
            time.sleep(3600)
    return [len(set(c)) % 8 / 8 for c in completions]

def once(completions):
    if any(completions):
        print("hanging", flush=True)
        time.sleep(3600)
    return [0.5] * len(completions)
"""

    def recipe(self, folder, name, **changes):
        make_model("llama").save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        (folder / "prompts.txt").write_text("the film\na quiet story\n")
        (folder / "reward.py").write_text(self.REWARD)
        settings = {
            "model": "model",
            "prompts": "prompts.txt",
            "reward": f"reward.py:{name}",
            "beta": 0.2,
            "max_new_tokens": 4,
            "steps": 2,
            "batch": 1,
            "group": 4,
            "lora_r": 2,
            "reward_timeout": 0.5,
            "reward_workers": 2,
            "on_error": "drop",
            "out": "run",
            **changes,
        }
        return [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]

    def test_it_goes_through_and_counts(self, tmp_path, monkeypatch, cli):
        monkeypatch.chdir(tmp_path)
        ended = cli("train", *self.recipe(tmp_path, "often"), "--reward-cache")
        assert ended.code == 0, ended.err
        assert marked() == []
        rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 2
        dropped = sum(row["dropped"] for row in rows)
        assert 0 < dropped < 8
        assert sum(row["reward_calls/failed"] for row in rows) == dropped
        assert sum(row["reward_calls/timed_out"] for row in rows) >= dropped
        assert sum(row["seconds_reward"] for row in rows) > 0.5
        assert all(row["seconds_reward"] <= row["seconds_draw"] for row in rows)
        with sqlite3.connect("run/rewards.sqlite") as cache:
            assert cache.execute("SELECT count(*) FROM rewards").fetchone()[0] == 8 - dropped

    @pytest.mark.slow  # TestNothingIsLeft interrupts a program that only calls the reward
    def test_ctrl_c_while_the_reward_hangs_leaves_nothing(self, tmp_path):
        flags = self.recipe(tmp_path, "once", reward_timeout=3600)
        command = [sys.executable, "-m", "tiltlm", "train", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=tmp_path, **pipes, **fresh()) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "hanging\n", process.stderr.read()
                assert marked()
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert marked() == []

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (["--reward", "none.py:good", "--reward-workers", "1"], "reward: there is no file 'none.py'"),
            (["--reward", "no_such.mod:good", "--reward-workers", "1"], "there is no module 'no_such.mod'"),
            (["--reward", "rewards.py:goood", "--reward-workers", "1"], "has no function 'goood'; it has good, odd"),
            (["--reward", "rewards.py:good", "--reward-timeout", "0"], "reward_timeout is 0"),
            (["--reward", "rewards.py:good", "--reward-batch", "0"], "reward_batch is 0"),
        ],
    )
    def test_refusals(self, refused, here, flags, says):
        assert says in refused("plan", "recipe.yaml", *flags)

    def test_the_same_plan_with_workers(self, cli, here):
        assert cli("plan", "recipe.yaml").code == 0
        plain = json.loads(Path("run/plan.json").read_text())
        flags = ["--out", "other", "--reward-workers", "2", "--reward-batch", "7", "--reward-cache"]
        assert cli("plan", "recipe.yaml", *flags).code == 0
        assert json.loads(Path("other/plan.json").read_text()) == plain
