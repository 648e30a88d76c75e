"""The race to the posterior: all of our training engines beside TRL's RLOO and GRPO, on 20,000 samples each.

Same model, prompts, reward, batch and number of samples; full weights, single precision. The learning rate is tuned alike
for everybody: each of `--rates` once, on a seed that is not counted, and the best goes on to the counted seeds. What is
measured at the end is the truth, by listing every completion.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from rloo_step import hardware, trl_environment

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "race.json"
TUNING_SEED = 1000


@dataclass(frozen=True)
class Runner:
    """One way to spend the samples."""

    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    replay: int = 0
    group: int = 8
    theirs: bool = False
    seeded: bool = True


RUNNERS = {
    "TRL RLOO": Runner("rloo", theirs=True),
    "TRL GRPO": Runner("grpo", theirs=True),
    "exact gradient (no sampling)": Runner("exact-gradient", seeded=False),
    "RLOO": Runner("rloo"),
    "VarGrad": Runner("var-grad"),
    "VarGrad, replay": Runner("var-grad", replay=28, group=4),
    "TrajectoryBalance, replay": Runner("trajectory-balance", replay=28, group=4),
    "PPO": Runner("ppo"),
    "GRPO": Runner("grpo"),
    "GRPO that reaches p*": Runner("grpo-tilt"),
    "Reinforce": Runner("reinforce"),
    "forward KL": Runner("f-divergence"),
    "forward KL, replay": Runner("f-divergence", replay=28, group=4),
    "PathConsistency, replay": Runner("path-consistency", replay=28, group=4),
    "online DPO": Runner("dpo"),
    "EM": Runner("em"),
    "SFT on the best of 8": Runner("sft"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["reachable", "by-position"])
    parser.add_argument("--runners", nargs="+", default=list(RUNNERS), choices=list(RUNNERS))
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--trl-python", type=Path)
    parser.add_argument("--prior", type=Path, help="folder for the prior, kept; a temporary one by default")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        prior = options.prior or Path(scratch) / "prior"
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"from race_task import build; from pathlib import Path; build(Path({str(prior)!r}))",
            ],
            check=True,
            cwd=HERE,
        )
        race = _Race(prior, Path(scratch), options)
        found = json.loads(options.out.read_text())["targets"] if options.out.is_file() else {}
        for target in options.targets:
            found[target] = found.get(target, {}) | race.run(target)
            _write(options, found)
    show(found)


class _Race:
    def __init__(self, prior: Path, scratch: Path, options: argparse.Namespace) -> None:
        self.prior, self.scratch, self.options = prior, scratch, options
        self.trl = options.trl_python or (
            trl_environment() if any(RUNNERS[name].theirs for name in options.runners) else None
        )

    def run(self, target: str) -> dict[str, Any]:
        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            tuned = {
                (name, rate): pool.submit(self.one, target, name, rate, TUNING_SEED)
                for name in self.options.runners
                for rate in self.options.rates
            }
            best = {
                name: min(self.options.rates, key=lambda r, n=name: tuned[n, r].result()["to_posterior"])
                for name in self.options.runners
            }
            seeds = {name: self.options.seeds if RUNNERS[name].seeded else 1 for name in self.options.runners}
            counted = {
                name: [pool.submit(self.one, target, name, best[name], seed) for seed in range(seeds[name])]
                for name in self.options.runners
            }
            return {
                name: {
                    "rate": best[name],
                    "tuning": {str(rate): tuned[name, rate].result()["to_posterior"] for rate in self.options.rates},
                    "runs": [future.result() for future in futures],
                }
                for name, futures in counted.items()
            }

    def one(self, target: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        runner = RUNNERS[name]
        common = ["--target", target, "--samples", str(self.options.samples)]
        own = ["--engine", runner.engine, "--lr", str(rate), "--seed", str(seed), *common]
        if runner.theirs:
            out = self.scratch / f"{target}-{runner.engine}-{rate}-{seed}"
            facts = self._call(self.trl, "race_trl.py", [str(self.prior), str(out), *own])
            return facts | self._call(
                sys.executable, "race_tiltlm.py", [str(self.prior), "--engine", "judge", "--judge", str(out), *common]
            )
        extra = ["--options", json.dumps(dict(runner.options)), "--replay", str(runner.replay), "--decode", "64"]
        extra += ["--group", str(runner.group)]
        found = self._call(sys.executable, "race_tiltlm.py", [str(self.prior), *own, *extra])
        print(f"{target}, {name}, lr {rate:g}, seed {seed}: {found['to_posterior']:.3f}", file=sys.stderr)
        return found

    def _call(self, python: Any, script: str, flags: Sequence[str]) -> dict[str, Any]:
        done = subprocess.run(
            [python, HERE / script, *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{script} {' '.join(flags)} failed:\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])


def _write(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    task = {"samples": options.samples, "rates": options.rates, "seeds": options.seeds, "hardware": hardware()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"task": task, "targets": found}, indent=1) + "\n")


def show(found: Mapping[str, Any]) -> None:
    """One table a target, the nearest to the posterior first."""
    for target, runners in found.items():
        table = Table(title=f"{target}: KL in nats after 20,000 samples, mean ± sd over seeds")
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
