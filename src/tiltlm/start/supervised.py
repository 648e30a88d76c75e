"""`train_start`: from rows of sources and references to a folder with a model that transformers loads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from tiltlm.cache import cache_folder
from tiltlm.errors import InputError, TiltWarning
from tiltlm.lm.scratch.architecture import Size, make_captioner, make_translator
from tiltlm.lm.scratch.efficientnet_lite import image_processor, load_efficientnet_lite
from tiltlm.lm.scratch.pairs import Pairs, greedy, image_states, mixed_precision, read_image, token_loss
from tiltlm.lm.scratch.vocabulary import train_tokenizer
from tiltlm.start import training
from tiltlm.start.catalogue import Rows, Start, columns_of, find_start
from tiltlm.start.training import Schedule

FORMAT = 4
"""Part of the cache's key: raise it when the same settings make another model."""
FACTS = "start.json"
JUDGED = 400
"""Validation rows whose greedy texts are judged, and on which the validation loss is taken."""
IMAGE_SIZE, STAGES = 96, 5
"""Pixels and stages of the image encoder, the emoji scenes' own size: 6 × 6 patches of 112 channels."""
PERCENT = 100
NewBar = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Started:
    """A trained start.

    Attributes:
        folder: what `tiltlm.load` and transformers load.
        loss: validation loss, nats a token, without smoothing.
        metrics: of greedy texts on validation rows, by name.
        parameters: all, and those that were trained.
        steps, seconds: of the training; `best_step` is the one whose weights were kept.
        rows: of training and validation; `too_long` were left out.
    """

    folder: Path
    loss: float
    metrics: Mapping[str, float]
    parameters: int
    trained: int
    steps: int
    best_step: int
    seconds: float
    rows: tuple[int, int]
    too_long: int

    def __str__(self) -> str:
        size = f"{self.parameters / 1e6:.1f}M parameters"
        if self.trained != self.parameters:
            size += f", {self.trained / 1e6:.1f}M of them trained"
        figures = ", ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())
        return (
            f"{size}; {self.steps} steps in {self.seconds:.0f} s on {self.rows[0]} rows\n"
            f"validation: {self.loss:.3f} nats a token (step {self.best_step}); greedy: {figures}\n"
            f"folder: {self.folder}"
        )


def train_start(
    name: str | Start,
    train: Rows,
    validation: Rows,
    *,
    quick: bool = False,
    out: str | Path | None = None,
    progress: NewBar | None = None,
    **changes: Any,
) -> Started:
    """A small model from scratch, trained on the rows unless the cache has it, in an ordinary folder of transformers.

    A training that was interrupted goes on from its last validation; the folder appears when all of it is written.

    Args:
        name: "translation" or "captions".
        train, validation: rows with `prompt` (the source) or `image` (a picture's bytes or path), and `reference` (the target).
        quick: half a minute, to see that everything runs.
        out: also put the model into this folder, which must not hold anything yet.
        progress: `progress(what, count)` begins a bar and returns what moves it on.
        changes: fields of `Schedule` (seconds, steps, lr, seed, …), of `Size` (width, layers, …), or `vocabulary`.

    Raises:
        InputError: for rows or settings that cannot be used, or a folder that cannot be written.
    """
    start = _changed(find_start(name) if isinstance(name, str) else name, quick, changes)
    place = None if out is None else _free(Path(out))
    data = columns_of(start, train, "train"), columns_of(start, validation, "validation")
    key = _key(start, data)
    folder = cache_folder() / "starts" / f"{start.name}-{key}"
    with _alone(folder):
        if not (folder / FACTS).is_file():
            _make(start, data, folder, key, progress or (lambda what, count: lambda done: None))
    if place is not None:
        _appear(place, lambda unfinished: shutil.copytree(folder, unfinished, dirs_exist_ok=True))
        folder = place
    return read_start(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process a start: another that wants the same waits and finds it made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            warnings.warn(f"another process is training {folder.name}; waiting for it", TiltWarning, stacklevel=4)
            lock.acquire()
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def read_start(folder: Path) -> Started:
    """What is known of a start's folder."""
    facts = json.loads((folder / FACTS).read_text())
    known = {field.name for field in fields(Started)}
    values = {name: value for name, value in facts.items() if name in known}
    return Started(**{**values, "folder": folder, "rows": tuple(values["rows"])})


@dataclass(frozen=True, eq=False)
class _Bench:
    """A model on its way, with what it learns from."""

    model: Any
    tokenizer: Any
    processor: Any
    learn: Pairs
    judge: Pairs
    sources: Sequence[str]
    references: Sequence[str]
    too_long: int


def _make(start: Start, data: Any, folder: Path, key: str, progress: NewBar) -> None:
    """Train, judge and save."""
    work = folder.with_name(f".{folder.name}.work")
    bench = _bench(start, data, progress)
    schedule, model = start.schedule, bench.model
    batches = bench.judge.batches(schedule.batch_tokens)

    def validate() -> float:
        sums = [token_loss(model, bench.judge, rows) for rows in batches]
        return sum(float(loss) for loss, _ in sums) / sum(tokens for _, tokens in sums)

    def loss(rows: Sequence[int]) -> tuple[Tensor, int]:
        with mixed_precision(model.device) if schedule.bfloat16 else nullcontext():
            return token_loss(model, bench.learn, rows, schedule.smoothing)

    state = training.train(
        model,
        loss,
        lambda rng: bench.learn.batches(schedule.batch_tokens, rng),
        validate,
        schedule,
        folder=work,
        key=key,
        progress=_in_percent(progress(f"training ({start.name})", PERCENT)),
    )
    texts = greedy(
        model,
        bench.tokenizer,
        bench.judge,
        longest=start.longest_target,
        progress=progress("judging", len(bench.judge)),
    )
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    facts = {
        "start": start.name,
        "loss": state.best,
        "metrics": dict(start.metrics(texts, bench.references, bench.sources)),
        "parameters": sum(value.numel() for value in model.parameters()),
        "trained": trained,
        "steps": state.step,
        "best_step": state.best_step,
        "seconds": state.seconds,
        "rows": [len(bench.learn), len(bench.judge)],
        "too_long": bench.too_long,
        "settings": _settings(start),
        "curve": state.curve,
        "examples": [
            {"text": text, "reference": reference}
            for text, reference in list(zip(texts, bench.references, strict=True))[:10]
        ],
    }
    _appear(folder, lambda unfinished: _save(bench, facts, unfinished))
    shutil.rmtree(work, ignore_errors=True)


def _bench(start: Start, data: Any, progress: NewBar) -> _Bench:
    """Tokenizer, model and tokenised rows."""
    (sources, references), (judged, truths) = data
    judged, truths = judged[:JUDGED], truths[:JUDGED]
    reads_text = start.reads == "prompt"
    tokenizer = train_tokenizer([*sources, *references] if reads_text else references, start.vocabulary)
    seed = start.schedule.seed
    pad: Any = tokenizer.pad_token_id
    processor: Any = None
    encoder: Any = None
    if reads_text:
        model = make_translator(start.size, tokenizer, 2 * max(start.longest_source, start.longest_target), seed)
    else:
        processor, encoder = image_processor(IMAGE_SIZE), load_efficientnet_lite(IMAGE_SIZE, STAGES)
        model = make_captioner(start.size, encoder, tokenizer, start.longest_target, seed)
    bar = progress("reading", len(sources) + len(judged))
    limits = f"{start.longest_source} tokens of source or {start.longest_target} of target"
    parts, too_long = [], 0
    for some, texts in ((sources, references), (judged, truths)):
        targets = tokenizer(list(texts))["input_ids"]
        read = tokenizer(list(some))["input_ids"] if reads_text else None
        kept = [
            k
            for k, target in enumerate(targets)
            if len(target) <= start.longest_target and (read is None or len(read[k]) <= start.longest_source)
        ]
        too_long += len(targets) - len(kept)
        if not kept:
            raise InputError(f"every row is longer than {limits}; give shorter ones")
        states = (
            [read[k] for k in kept]
            if read is not None
            else image_states(encoder, processor, [some[k] for k in kept], bar)
        )
        parts.append((kept, Pairs(states, [targets[k] for k in kept], pad)))
    (_, learn), (kept, judge) = parts
    if too_long:
        warnings.warn(f"{too_long} rows are longer than {limits} and were left out", TiltWarning, stacklevel=4)
    texts = [judged[k] if reads_text else "" for k in kept]
    return _Bench(model, tokenizer, processor, learn, judge, texts, [truths[k] for k in kept], too_long)


def _save(bench: _Bench, facts: Mapping[str, Any], folder: Path) -> None:
    bench.model.save_pretrained(folder)
    bench.tokenizer.save_pretrained(folder)
    if bench.processor is not None:
        bench.processor.save_pretrained(folder)
    (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")


def _appear(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder under another name and rename it, so that a folder of its name is whole."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write(unfinished)
        os.rename(unfinished, folder)  # over an empty folder, too
    except OSError as error:
        if not (folder / FACTS).is_file():  # else another process was faster
            raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"{folder} cannot be written ({error.strerror or error}); make room, or set TILTLM_CACHE")


def _free(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out is {str(folder)!r}, where there is something already; give a new folder")
    return folder.absolute()


def _changed(start: Start, quick: bool, changes: Mapping[str, Any]) -> Start:
    """The start with its settings changed."""
    start = start.quick if quick else start
    schedule = {field.name for field in fields(Schedule)}
    size = {field.name for field in fields(Size)}
    wrong = next((name for name in changes if name not in schedule | size | {"vocabulary"}), None)
    if wrong is not None:
        raise InputError(
            f"setting {wrong!r} is none of a start's; it has {', '.join(sorted(schedule | size))}, vocabulary"
        )
    vocabulary = changes.get("vocabulary", start.vocabulary)
    if vocabulary < 300:
        raise InputError(f"vocabulary is {vocabulary}; it must be at least 300, for every byte is in it")
    return replace(
        start,
        schedule=replace(start.schedule, **{name: changes[name] for name in changes if name in schedule}),
        size=replace(start.size, **{name: changes[name] for name in changes if name in size}),
        vocabulary=vocabulary,
    )


def _settings(start: Start) -> dict[str, Any]:
    plain = ("name", "vocabulary", "longest_source", "longest_target")
    image = [] if start.reads == "prompt" else [IMAGE_SIZE, STAGES]
    return {
        **{name: getattr(start, name) for name in plain},
        "size": asdict(start.size),
        "schedule": asdict(start.schedule),
        "image": image,
    }


def _key(start: Start, data: Any) -> str:
    """What the model depends on: the rows' contents, the settings, the format, and torch's version."""
    known = [FORMAT, _settings(start), torch.__version__]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for sources, references in data:
        for source, reference in zip(sources, references, strict=True):
            digest.update(_content(source, start.reads == "image") + b"\0" + reference.encode() + b"\0")
        digest.update(b"\1")
    return digest.hexdigest()[:12]


def _content(source: Any, image: bool) -> bytes:
    """A source's content: a text, a picture's bytes or those of its file, or its pixels."""
    if image:
        picture = read_image(source, 0) if not isinstance(source, bytes) else source
        return picture if isinstance(picture, bytes) else picture.tobytes()
    return source.encode()


def _in_percent(bar: Callable[[int], None]) -> Callable[[float], None]:
    """A bar of whole steps, moved on by shares of the whole."""
    done = 0.0

    def move(share: float) -> None:
        nonlocal done
        before, done = int(done * PERCENT), done + share
        if int(done * PERCENT) > before:
            bar(int(done * PERCENT) - before)

    return move
