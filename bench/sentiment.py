"""Over-optimisation of a sentiment reward that was learned from few labels, with and without its uncertainty.

    python bench/sentiment.py --work FOLDER                      # both parts, and the table
    python bench/sentiment.py --work FOLDER --parts train --train-seeds 2
    python bench/sentiment.py --work FOLDER --parts              # only the table and the picture, of what is finished

A seed is another set of labelled reviews, so another proxy; in training it is another run as well. The targets share the 32 members of
each proxy. "tilt" needs no training: prior draws predict the optimum at every temperature (`tl.plan(..., gold=...)`), and best-of-n.
"train" lets RLOO walk away from the prior at a low temperature, and judges each step's own draws. What is finished is in the folder.
"""

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from sentiment_task import TOKENS, Task

import tiltlm as tl
from tiltlm.diagnostics.frontier import PriorSample
from tiltlm.evidence.members import Members, PriorRewards
from tiltlm.records import Draws, Scored
from tiltlm.target import Target

RESULT = Path(__file__).resolve().parent / "results" / "sentiment.json"
MEMBERS = 32
TARGETS: dict[str, Callable[[PriorRewards], Any]] = {
    "mean": tl.LogPool,
    "mean - sd": lambda members: tl.LowerConfidenceBound(members, k=1.0),
    "mean - 2 sd": lambda members: tl.LowerConfidenceBound(members, k=2.0),
    "worst of 32": tl.WorstOfEnsemble,
}
COLOURS = {"mean": "#d65f1e", "mean - sd": "#2a66a5", "mean - 2 sd": "#3d8b57", "worst of 32": "#86909a"}
ROOTS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Distances sqrt(KL) at which the targets are compared."""
TRAINED = 8
"""Prompts that policies are trained on: all of them in every step, so that its means are of the same prompts."""
GROUP, TILT, RATE = 4, 4.0, 2e-3
"""Draws a prompt and step; spreads of the reward per beta; learning rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps draws, features and finished runs")
    parser.add_argument("--parts", nargs="*", default=["tilt", "train"], choices=["tilt", "train"])
    parser.add_argument("--labels", type=int, default=32, help="labelled reviews that a proxy learns from")
    parser.add_argument("--samples", type=int, default=256, help="prior draws a prompt")
    parser.add_argument("--seeds", type=int, default=10, help="proxies that are tilted, from 0 on")
    parser.add_argument("--train-seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--train-targets", nargs="*", default=["mean", "mean - sd"], choices=list(TARGETS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(options.work)
    if "tilt" in options.parts:
        for seed in range(options.seeds):
            tilted(task, options.labels, options.samples, seed)
    if "train" in options.parts:
        for seed in options.train_seeds:
            for name in options.train_targets:
                trained(task, options.labels, options.steps, name, seed)
    collect(options)


# --- without training ---


def tilted(task: Task, labels: int, samples: int, seed: int) -> None:
    """Gold over KL for every target, from the prior's draws."""
    kept = task.work / "runs" / f"tilt-{labels}-{samples}-{seed}.json"
    if kept.is_file():
        return
    draws, features, gold = task.judged_draws(samples)
    rewards = task.members(labels, seed, MEMBERS)(features)
    members = Members(tuple(_known(draws, row) for row in rewards))
    prior_rewards = PriorRewards.of(members, draws)
    held_out = tl.Reward(_known(draws, gold), name="gold")
    found = {}
    for name, make in TARGETS.items():
        evidence = make(prior_rewards)
        likelihood = evidence.log_likelihood(draws)
        scored = Scored(draws, draws.log_q, likelihood.log, likelihood.rewards, beta=evidence.beta)
        found[name] = tl.plan(Target(_Unused(), evidence), draws.prompts, scored=scored, gold=held_out).gold.as_dict()
    mean = torch.stack([rewards[:, row].mean(0) for row in by_prompt(draws)])
    truth = torch.stack([gold[row] for row in by_prompt(draws)])
    facts = {"seed": seed, "labels": labels, "correlation": correlation(mean, truth), "targets": found}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(facts))
    print(f"tilt, seed {seed}: correlation with gold {facts['correlation']:.2f}", file=sys.stderr, flush=True)


class _Unused:
    """The draws are there and scored already, so nobody asks this prior."""

    def encode(self, prompts: Any) -> Any:
        return prompts


def by_prompt(draws: Draws) -> list[torch.Tensor]:
    return [(draws.prompt_index == p).nonzero().flatten() for p in range(len(draws.prompts))]


def correlation(proxy: torch.Tensor, gold: torch.Tensor) -> float:
    """Within prompts, their mean."""
    return float(
        torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(proxy, gold, strict=True)]).mean()
    )


def _known(draws: Draws, values: torch.Tensor) -> Callable[..., list[float]]:
    """A reward function that looks up what is known of these draws."""
    prompts = [draws.prompts.texts[p] for p in draws.prompt_index.tolist()]
    table = dict(zip(zip(prompts, draws.texts, strict=True), values.tolist(), strict=True))

    def known(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [table[pair] for pair in zip(prompts, completions, strict=True)]

    return known


# --- with training ---


def trained(task: Task, labels: int, steps: int, name: str, seed: int) -> None:
    """One policy; its metrics at every step."""
    slug = name.replace(" ", "")
    kept = task.work / "runs" / f"train-{labels}-{steps}-{slug}-{seed}.json"
    if kept.is_file():
        return
    prior, texts = task.prior, task.prompts[:TRAINED]
    some = replace(task.draws(64), sampler="")
    some = some.of(list(range(TRAINED)))
    members = Members(task.proxy(labels, seed).functions(MEMBERS, seed=seed))
    evidence = TARGETS[name](PriorRewards.of(members, some))
    likelihood = evidence.log_likelihood(some)
    beta = PriorSample.of(Scored(some, some.log_q, likelihood.log, beta=evidence.beta), evidence.beta).spread / TILT
    folder = task.work / "policies" / f"{labels}-{steps}-{slug}-{seed}"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", tl.TiltWarning)
        tl.fit(
            prior * evidence.at(beta),
            texts,
            tl.RLOO(group=GROUP),
            lora=tl.LoRA(16, targets=("v_proj", "down_proj")),
            steps=steps,
            batch=TRAINED,
            lr=RATE,
            schedule="constant",
            seed=seed,
            gold=task.gold,
            out=folder,
            resume=True,
        )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    columns = ("step", "reward", "kl_prior", "kl_prior_stderr", "gold", "gold_stderr", "seconds", "alarm")
    history = [
        {key: row.get(key) for key in columns} | {"proxy": row["reward/reward_mean"], "sd": row["reward/reward_sd"]}
        for row in rows
    ]
    alarms = [str(warning.message) for warning in told if "hacking" in str(warning.message)]
    facts = {"seed": seed, "labels": labels, "target": name, "beta": beta, "history": history, "alarms": alarms}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(facts))


# --- the table and the picture ---


def collect(options: argparse.Namespace) -> None:
    """Everything that is finished: tables, the result file, the picture."""
    runs = options.work / "runs"
    tilts = [
        json.loads(f.read_text())
        for seed in range(options.seeds)
        if (f := runs / f"tilt-{options.labels}-{options.samples}-{seed}.json").is_file()
    ]
    trainings = [json.loads(f.read_text()) for f in sorted(runs.glob(f"train-{options.labels}-{options.steps}-*.json"))]
    task = {"labels": options.labels, "samples": options.samples, "tokens": TOKENS, "members": MEMBERS}
    task |= {"prompts": TRAINED, "group": GROUP, "tilt": TILT, "lr": RATE, "steps": options.steps}
    found = {"task": task, "gold_accuracy": Task(options.work).gold_accuracy()}
    found |= {"tilt": tilt_summary(tilts), "train": [train_summary(run) for run in trainings]}
    found |= {"train_pairs": train_pairs(trainings), "runs": trainings}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "runs"}, indent=1))
    figure(tilts, trainings).write_html(options.out.with_suffix(".html"), include_plotlyjs="cdn")


def gains(tilt: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    """sqrt(KL) of the points that can be trusted, and gold's gain over the prior there; 0 at 0."""
    target = tilt["targets"][name]
    points = [p for p in target["points"] if p["reliable"]]
    roots = [math.sqrt(max(0.0, p["kl"]["value"])) for p in points]
    return [0.0, *roots], [0.0, *(p["gold"]["value"] - target["prior"]["value"] for p in points)]


def gain_at(tilt: dict[str, Any], name: str, root: float) -> float:
    xs, ys = gains(tilt, name)
    return float(np.interp(root, xs, ys)) if root <= xs[-1] else math.nan


def mean_error(values: Sequence[float]) -> dict[str, Any]:
    """Over seeds: mean, standard error, how many."""
    some = [value for value in values if math.isfinite(value)]
    error = statistics.stdev(some) / math.sqrt(len(some)) if len(some) > 1 else math.nan
    return {"mean": statistics.mean(some) if some else math.nan, "stderr": error, "n": len(some)}


def tilt_summary(tilts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Gold's gain at each distance, at its peak, and by best-of-n; and the same less the mean reward's, paired by seed."""
    if not tilts:
        return {}
    found: dict[str, Any] = {"correlation": mean_error([tilt["correlation"] for tilt in tilts])}
    for name in TARGETS:
        own: dict[str, Any] = {}
        for root in ROOTS:
            both = [(gain_at(t, name, root), gain_at(t, "mean", root)) for t in tilts]
            own[f"{root}"] = {
                "gain": mean_error([a for a, _ in both]),
                "over_mean": mean_error([a - b for a, b in both]),
            }
        peaks = [(max(gains(t, name)[1]), max(gains(t, "mean")[1])) for t in tilts]
        own["peak"] = {"gain": mean_error([a for a, _ in peaks]), "over_mean": mean_error([a - b for a, b in peaks])}
        for place, point in enumerate(tilts[0]["targets"][name]["best_of_n"]):
            both = [(best_gain(t, name, place), best_gain(t, "mean", place)) for t in tilts]
            kl = statistics.mean(t["targets"][name]["best_of_n"][place]["kl"] for t in tilts)
            own[f"best of {point['n']}"] = {
                "kl": kl,
                "gain": mean_error([a for a, _ in both]),
                "over_mean": mean_error([a - b for a, b in both]),
            }
        found[name] = own
    return found


def best_gain(tilt: dict[str, Any], name: str, place: int) -> float:
    target = tilt["targets"][name]
    return target["best_of_n"][place]["gold"]["value"] - target["prior"]["value"]


def train_summary(run: dict[str, Any]) -> dict[str, Any]:
    """Gold at the beginning, at its peak, and at the end (means over five steps), with the fitted curve and the alarm."""
    rows = run["history"]
    blocks = [rows[i : i + 5] for i in range(0, len(rows) - 4, 5)]
    means = [
        {key: statistics.mean(row[key] for row in block) for key in ("gold", "proxy", "sd", "kl_prior")}
        | {
            "gold_stderr": math.sqrt(sum(row["gold_stderr"] ** 2 for row in block)) / len(block),
            "last": block[-1]["step"],
        }
        for block in blocks
    ]
    away = [block for block in means if block["kl_prior"] > 0]
    first = means[0]
    curve = None
    if len(away) >= 5:
        columns = [[block[key] for block in away] for key in ("kl_prior", "gold", "gold_stderr")]
        curve = tl.fit_overoptimisation(*columns).as_dict()
    alarm = next((row["alarm"] for row in rows if row["alarm"]), None)
    return {
        "target": run["target"],
        "seed": run["seed"],
        "beta": run["beta"],
        "first": first,
        "peak": max(means, key=lambda block: block["gold"]),
        "last": means[-1],
        "curve": curve,
        "alarm": alarm and alarm["sentence"],
    }


def train_pairs(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds: KL, proxy and gold of the last ten steps and gold of the best five, and the same less the mean reward's of that seed."""

    def facts(run: dict[str, Any]) -> dict[str, float]:
        rows = run["history"]
        blocks = [statistics.mean(row["gold"] for row in rows[i : i + 5]) for i in range(0, len(rows) - 4, 5)]
        late = {key: statistics.mean(row[key] for row in rows[-10:]) for key in ("kl_prior", "proxy", "gold")}
        return late | {"peak": max(blocks), "fall": max(blocks) - blocks[-1]}

    own = {(run["target"], run["seed"]): facts(run) for run in runs}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(run["target"] for run in runs):
        seeds = [seed for target, seed in own if target == name]
        found[name] = {}
        for key in ("kl_prior", "proxy", "gold", "peak", "fall"):
            pairs = [own[name, seed][key] - own["mean", seed][key] for seed in seeds if ("mean", seed) in own]
            found[name][key] = {
                "value": mean_error([own[name, seed][key] for seed in seeds]),
                "over_mean": mean_error(pairs),
            }
    return found


def figure(tilts: Sequence[dict[str, Any]], trainings: Sequence[dict[str, Any]]) -> go.Figure:
    """Gold over sqrt(KL): predicted with a band of one standard error over seeds, and every trained run's blocks."""
    picture = go.Figure()
    xs = np.linspace(0, 2, 41)
    for name, colour in COLOURS.items():
        cells = [mean_error([gain_at(t, name, float(x)) for t in tilts]) for x in xs] if tilts else []
        whole = [
            (float(x), c["mean"], c["stderr"]) for x, c in zip(xs, cells, strict=False) if c["n"] == len(tilts) > 1
        ]
        if whole:
            band = [m + e for _, m, e in whole] + [m - e for _, m, e in reversed(whole)]
            x = [x for x, _, _ in whole]
            picture.add_scatter(
                x=[*x, *reversed(x)],
                y=band,
                fill="toself",
                fillcolor=colour,
                opacity=0.15,
                line_width=0,
                showlegend=False,
            )
            picture.add_scatter(x=x, y=[m for _, m, _ in whole], name=f"{name}, predicted", line_color=colour)
    for run in trainings:
        rows = run["history"]
        blocks = [rows[i : i + 5] for i in range(0, len(rows) - 4, 5)]
        x = [math.sqrt(max(0.0, statistics.mean(r["kl_prior"] for r in block))) for block in blocks]
        start = statistics.mean(r["gold"] for r in blocks[0])
        y = [statistics.mean(r["gold"] for r in block) - start for block in blocks]
        dash = {"color": COLOURS[run["target"]], "dash": "dot"}
        label = f"{run['target']}, trained, seed {run['seed']}"
        picture.add_scatter(x=x, y=y, name=label, mode="lines+markers", line=dash)
    picture.update_layout(template="plotly_white", xaxis_title="√KL to the prior, √nats", yaxis_title="gold's gain")
    return picture


if __name__ == "__main__":
    main()
