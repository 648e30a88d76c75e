"""Labels needed to learn a reward: BALD, double Thompson sampling and margin against random, on film reviews.

A prompt has eight reviews as its completions; a question is about a good one and a bad one of them, and the good one wins (with
--noise, by Bradley–Terry at that temperature). The reward is a Bayesian logistic head on MiniLM's features (Laplace, prior
precision by its evidence at every refit). It is judged on reviews of other films by the share of all good–bad pairs that it
orders rightly. Asking and answering goes through `tiltlm.labels`, as it would with a person.

    python bench/active_learning.py --out bench/results/active_learning.json
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import torch
from film_features import films
from torch import Tensor

from tiltlm.labels import Candidates, Oracle, Session, active_learning
from tiltlm.labels.acquisition import ACQUISITIONS
from tiltlm.reward_models.glm import Logistic, Mode, mode, spread

GROUP, HELD_OUT = 8, 600
PRECISIONS = tuple(10.0**e for e in (-3, -2.5, -2, -1.5, -1, -0.5, 0))
COLOURS = {"bald": "#2a66a5", "double-thompson": "#d65f1e", "margin": "#3d8b57", "random": "#86909a"}


@dataclass(frozen=True)
class Head:
    """Laplace's approximation of Bayesian logistic regression on feature differences, at the prior precision of most evidence."""

    mode: Mode

    @classmethod
    def best(cls, x: Tensor) -> "Head":
        """`x` holds winner minus loser in each row; without rows, the widest precision but one."""
        one = torch.ones(len(x), dtype=x.dtype)
        modes = (mode(x, Logistic(one, 0 * one), spread(p, x.shape[1], bias=False)) for p in PRECISIONS)
        return cls(max(modes, key=lambda found: found.log_evidence))

    @property
    def mean(self) -> Tensor:
        return self.mode.weights[0]

    def members(self, features: Tensor, k: int, rng: torch.Generator) -> Tensor:
        """Rewards [k, B] under `k` draws of the weights."""
        noise = torch.randn(len(self.mean), k, generator=rng, dtype=self.mean.dtype)
        weights = self.mean[:, None] + torch.linalg.solve_triangular(self.mode.factor.T, noise, upper=True)
        return weights.T @ features.T


def principal(features: Tensor, components: int) -> Tensor:
    """The features, centred, along their leading principal components; labels play no part in it."""
    centred = features - features.mean(0)
    if not components:
        return centred
    return centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -components:]


def accuracy(head: Head, features: Tensor, labels: Tensor) -> float:
    """Share of all (positive, negative) pairs that the mean reward orders rightly."""
    reward = features @ head.mean
    gap = reward[labels][:, None] - reward[~labels][None, :]
    return float((gap > 0).double().mean() + (gap == 0).double().mean() / 2)


@dataclass(frozen=True)
class Task:
    """One split: candidates with their features, and held-out reviews."""

    candidates: Candidates
    features: Tensor
    positive: Tensor
    held_out: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, features: Tensor, labels: Tensor, seed: int) -> "Task":
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        test, pool = order[:HELD_OUT], order[HELD_OUT:]
        pool = pool[: len(pool) // GROUP * GROUP]
        owner = torch.arange(len(pool)) // GROUP
        good = labels[pool]
        i, j = torch.triu_indices(GROUP, GROUP, 1)
        pairs = torch.cat([torch.stack([i, j], -1) + GROUP * group for group in range(int(owner[-1]) + 1)])
        pairs = pairs[good[pairs[:, 0]] != good[pairs[:, 1]]]
        prompts = tuple(f"Review film {number}." for number in range(int(owner[-1]) + 1))
        candidates = Candidates(prompts, tuple(f"review {int(row)}" for row in pool), owner, pairs)
        return cls(candidates, features[pool], good, (features[test], labels[test]))

    def oracle(self, session: Session, noise: float, seed: int) -> Oracle:
        rewards = dict(zip(self.candidates.completions, self.positive.double().tolist(), strict=True))
        return Oracle(
            session, lambda completions: [rewards[text] for text in completions], temperature=noise, seed=seed
        )

    def head(self, comparisons: Tensor) -> Head:
        return Head.best(self.features[comparisons[:, 0]] - self.features[comparisons[:, 1]])


def curve(task: Task, rule: str, seed: int, settings: argparse.Namespace) -> list[float]:
    """Held-out accuracy after each batch of labels."""
    found: list[float] = []

    def learner(candidates: Candidates, comparisons: Tensor, rng: torch.Generator) -> Tensor:
        head = task.head(comparisons)
        if len(comparisons) > len(found) * settings.batch:
            found.append(accuracy(head, *task.held_out))
        return head.members(task.features, settings.members, rng)

    with tempfile.TemporaryDirectory() as folder:
        session = Session.create(Path(folder) / "session", task.candidates, seed=seed)
        oracle = task.oracle(session, settings.noise, seed)
        by = ACQUISITIONS[rule]
        for question in active_learning(session, learner, by=by, questions=settings.labels, batch=settings.batch):
            session.answer(question, oracle(question))
            done = len(session.answers)
            if done % settings.batch == 0 and (not by.least_members or done == settings.labels):
                found.append(accuracy(task.head(session.comparisons), *task.held_out))
    return found


def full_accuracy(task: Task, noise: float, seed: int, most: int = 6000) -> float:
    """Accuracy after all candidate pairs are labelled (at most `most` of them)."""
    generator = torch.Generator().manual_seed(seed)
    pairs = task.candidates.pairs[torch.randperm(len(task.candidates), generator=generator)[:most]]
    first = task.positive[pairs[:, 0]]
    if noise:
        wrong = torch.rand(len(pairs), generator=generator) > 1 / (1 + math.exp(-1 / noise))
        first = first ^ wrong
    return accuracy(task.head(torch.where(first[:, None], pairs, pairs.flip(-1))), *task.held_out)


def needed(accuracies: list[float], goal: float, batch: int) -> int | None:
    """Labels after which the accuracy is at the goal and stays there for the next batch too."""
    for place in range(len(accuracies)):
        if all(value >= goal for value in accuracies[place : place + 2]):
            return (place + 1) * batch
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reviews", type=int, default=3000)
    parser.add_argument("--labels", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rules", default=",".join(COLOURS), help="with commas between; random has to be among them")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--components", type=int, default=48, help="principal components of the features; 0 keeps them all"
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, help="temperature of the answers, in units of good minus bad"
    )
    parser.add_argument("--share", type=float, default=0.95, help="of the full data's accuracy")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tiltlm-films")
    parser.add_argument("--out", type=Path, default=Path("bench/results/active_learning.json"))
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    features, labels = films(settings.reviews, settings.cache)
    features, begin = principal(features.double(), settings.components), time.perf_counter()
    curves: dict[str, list[list[float]]] = {rule: [] for rule in settings.rules.split(",")}
    full = []
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        task = Task.make(features, labels, seed)
        full.append(full_accuracy(task, settings.noise, seed))
        for rule, found in curves.items():
            found.append(curve(task, rule, seed, settings))
            print(f"seed {seed} {rule}: {found[-1][-1]:.3f} of {full[-1]:.3f}", file=sys.stderr, flush=True)
    goals = [settings.share * value for value in full]
    labels_needed = {
        rule: [needed(one, goal, settings.batch) for one, goal in zip(found, goals, strict=True)]
        for rule, found in curves.items()
    }
    result = {
        "settings": {
            name: str(v) if isinstance(v, Path) else v for name, v in vars(settings).items() if name != "cache"
        },
        "full_accuracy": full,
        "labels_needed": labels_needed,
        "over_random": over_random(curves),
        "accuracy": curves,
        "seconds": time.perf_counter() - begin,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(result, indent=1))
    figure(curves, goals, settings.batch).write_html(settings.out.with_suffix(".html"), include_plotlyjs="cdn")
    print(f"full data {statistics.mean(full):.3f}, goal {statistics.mean(goals):.3f}")
    for rule, found in labels_needed.items():
        reached = [value for value in found if value is not None]
        mean = f"{statistics.mean(reached):.0f}" if len(reached) == len(found) else "not always"
        last = [one[-1] for one in curves[rule]]
        gain, error = over_random(curves)[rule]
        print(f"{rule:16} {mean:>10} labels {found}, at the end {statistics.mean(last):.3f}, ", end="")
        print(f"over random {gain:+.4f} ± {error:.4f}")


def over_random(curves: dict[str, list[list[float]]]) -> dict[str, tuple[float, float]]:
    """Accuracy over random's on the same split, averaged over the whole curve: mean over the seeds, and its standard error."""
    found = {}
    for rule, own in curves.items():
        gains = [statistics.mean(a) - statistics.mean(b) for a, b in zip(own, curves["random"], strict=True)]
        found[rule] = (statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5)
    return found


def figure(curves: dict[str, list[list[float]]], goals: list[float], batch: int) -> go.Figure:
    """Mean accuracy over labels, with a band of one standard error."""
    picture = go.Figure()
    for rule, found in curves.items():
        values = torch.tensor(found)
        mean, error = values.mean(0), values.std(0) / len(found) ** 0.5
        x = [batch * (place + 1) for place in range(values.shape[1])]
        band = [*(mean + error).tolist(), *(mean - error).flip(0).tolist()]
        outline = {"x": [*x, *reversed(x)], "y": band, "fill": "toself", "opacity": 0.15, "line": {"width": 0}}
        picture.add_trace(go.Scatter(**outline, fillcolor=COLOURS[rule], hoverinfo="skip", showlegend=False))
        picture.add_trace(go.Scatter(x=x, y=mean.tolist(), name=rule, line={"color": COLOURS[rule]}))
    picture.add_hline(statistics.mean(goals), line_dash="dot", annotation_text="goal")
    picture.update_layout(
        template="plotly_white", xaxis_title="labels", yaxis_title="held-out pairs in the right order"
    )
    return picture


if __name__ == "__main__":
    main()
