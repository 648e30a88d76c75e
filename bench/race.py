"""The race to the posterior: all of our training engines beside TRL's RLOO and GRPO, on 20,000 samples each.

Same model, prompts, reward, batch and number of samples; full weights, single precision. The learning rate is tuned alike
for everybody: each of `--rates` on the same `--tuning` seeds, which are not counted, and the best goes on to the counted seeds.
What is measured at the end is the truth, by listing every completion.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from environments import PEERS
from harness import hardware
from race_task import BETA
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "race.json"
FIRST_TUNING_SEED = 1000
TARGETS_BETA = "the target's beta"
UNTUNED = 1e-3


@dataclass(frozen=True)
class Runner:
    """One way to spend the samples."""

    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    replay: int = 0
    group: int = 8
    theirs: bool = False
    seeded: bool = True
    tuned: bool = True


RUNNERS = {
    "TRL RLOO": Runner("rloo", theirs=True),
    "TRL GRPO": Runner("grpo", theirs=True),
    "exact gradient (no sampling)": Runner("exact-gradient", seeded=False, tuned=False),
    "RLOO": Runner("rloo"),
    "VarGrad": Runner("var-grad"),
    "VarGrad, replay": Runner("var-grad", replay=28, group=4),
    "VarGrad, replay, 2 updates": Runner("var-grad", {"updates": 2}, replay=28, group=4),
    "TrajectoryBalance, replay": Runner("trajectory-balance", replay=28, group=4),
    "PPO": Runner("ppo"),
    "GRPO": Runner("grpo"),
    "GRPO, TRL's coefficient": Runner("grpo", {"kl_coefficient": TARGETS_BETA}),
    "GRPO that reaches p*": Runner("grpo-tilt"),
    "Reinforce": Runner("reinforce"),
    "forward KL": Runner("f-divergence"),
    "forward KL, replay": Runner("f-divergence", replay=28, group=4),
    "PathConsistency, replay": Runner("path-consistency", replay=28, group=4),
    "online DPO": Runner("dpo"),
    "EM": Runner("em"),
    "SFT on the best of 8": Runner("sft"),
    "soft Q-learning, heads only": Runner("soft-q-learning"),
    "soft value regression, heads only": Runner("soft-value-regression"),
    "contrastive twist, heads only": Runner("contrastive-twist"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["reachable", "by-position"])
    parser.add_argument("--runners", nargs="+", default=list(RUNNERS), choices=list(RUNNERS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tuning", type=int, default=2, help="seeds, not counted, on which each rate is tried")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--trl-python", type=Path)
    parser.add_argument("--work", type=Path, help="folder that keeps the prior and every finished run, to go on from")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        build = f"from race_task import build; from pathlib import Path; build(Path({str(work / 'prior')!r}))"
        subprocess.run([sys.executable, "-c", build], check=True, cwd=HERE)
        race = _Race(work, options)
        found = json.loads(options.out.read_text())["targets"] if options.out.is_file() else {}
        for target in options.targets:
            found[target] = found.get(target, {}) | race.run(target)
            _write(options, found)
    show(found)


class _Race:
    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.prior, self.options = work, work / "prior", options
        self.idle: list[subprocess.Popen[str]] = []
        self.trl = options.trl_python or (
            PEERS["trl"].python() if any(RUNNERS[name].theirs for name in options.runners) else None
        )

    def run(self, target: str) -> dict[str, Any]:
        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            rates = {name: self.options.rates if RUNNERS[name].tuned else [UNTUNED] for name in self.options.runners}
            tuning = {
                (name, rate): [
                    pool.submit(self.one, target, name, rate, FIRST_TUNING_SEED + i) for i in range(self.options.tuning)
                ]
                for name in self.options.runners
                for rate in rates[name]
                if len(rates[name]) > 1
            }
            tuned = {key: mean(f.result()["to_posterior"] for f in futures) for key, futures in tuning.items()}
            best = {name: min(some, key=lambda r, n=name: tuned.get((n, r), 0.0)) for name, some in rates.items()}
            seeds = {name: self.options.seeds if RUNNERS[name].seeded else 1 for name in self.options.runners}
            counted = {
                name: [pool.submit(self.one, target, name, best[name], seed) for seed in range(seeds[name])]
                for name in self.options.runners
            }
            return {
                name: {
                    "rate": best[name],
                    "tuning": {str(rate): tuned[name, rate] for rate in rates[name] if (name, rate) in tuned},
                    "runs": [future.result() for future in futures],
                }
                for name, futures in counted.items()
            }

    def one(self, target: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        slug = "-".join(re.findall(r"[a-z0-9]+", name.lower()))
        kept = self.work / "runs" / f"{target}-{slug}-{rate:g}-{seed}-{self.options.samples}.json"
        if kept.is_file():
            return json.loads(kept.read_text())
        found = self._run(RUNNERS[name], target, rate, seed)
        print(f"{target}, {name}, lr {rate:g}, seed {seed}: {found['to_posterior']:.3f}", file=sys.stderr)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
        return found

    def _run(self, runner: Runner, target: str, rate: float, seed: int) -> dict[str, Any]:
        common = ["--target", target, "--samples", str(self.options.samples)]
        own = ["--engine", runner.engine, "--lr", str(rate), "--seed", str(seed), *common]
        ours = [str(self.prior)]
        if runner.theirs:
            with tempfile.TemporaryDirectory() as out:
                theirs = _call([self.trl, "race_trl.py", str(self.prior), out, *own])
                return self._ask([*ours, "--engine", "judge", "--judge", out, *common]) | theirs
        options = {key: BETA[target] if value == TARGETS_BETA else value for key, value in runner.options.items()}
        extra = ["--options", json.dumps(options), "--replay", str(runner.replay)]
        extra += ["--group", str(runner.group), "--engine-lr", str(10 * rate)]
        return self._ask([*ours, *own, *extra, *([] if seed >= FIRST_TUNING_SEED else ["--decode", "64"])])

    def _ask(self, flags: Sequence[str]) -> dict[str, Any]:
        """A job for one of our own processes, which know the truth already; one is started where none is free."""
        worker = self.idle.pop() if self.idle else _worker()
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(shlex.join(flags) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise SystemExit(f"race_tiltlm.py {shlex.join(flags)} failed; see above")
        self.idle.append(worker)
        return json.loads(line)


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


def _worker() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "race_tiltlm.py"],
        cwd=HERE,
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _call(command: Sequence[Any]) -> dict[str, Any]:
    done = subprocess.run(
        command, cwd=HERE, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _write(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    task = {"samples": options.samples, "rates": options.rates, "seeds": options.seeds, "hardware": hardware("cpu")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"task": task, "targets": found}, indent=1) + "\n")


def show(found: Mapping[str, Any]) -> None:
    """One table a target, the nearest to the posterior first."""
    for target, runners in found.items():
        table = Table(title=f"{target}: KL in nats, mean ± sd over seeds")
        for head in ("", "KL(q||p*)", "KL(p*||q)", "with SMC, at most", "lr", "seconds"):
            table.add_column(head, justify="left" if not head else "right")
        for name, entry in sorted(runners.items(), key=lambda item: _mean(item[1], "to_posterior")):
            cells = [_cell(entry, key) for key in ("to_posterior", "from_posterior", "smc_bound")]
            table.add_row(name, *cells, f"{entry['rate']:g}", f"{_mean(entry, 'seconds'):.0f}")
        Console().print(table)


def _mean(entry: Mapping[str, Any], key: str) -> float:
    return mean(run[key] for run in entry["runs"])


def _cell(entry: Mapping[str, Any], key: str) -> str:
    values = [run[key] for run in entry["runs"] if key in run]
    if not values:
        return "–"
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
