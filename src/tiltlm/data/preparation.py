"""From a set's files to splits on disk with a card; whole or not at all, and the same bytes again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiltlm import data
from tiltlm.cache import cache_folder
from tiltlm.data.catalogue import find_set
from tiltlm.data.spec import SPLITS, DataSet, Progress, Row, Tally, no_progress
from tiltlm.data.split import leaks, split_of
from tiltlm.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

CARD = "card.json"
IMPORT = re.compile(r"^from tiltlm\.data\.(\w+) import", re.MULTILINE)


def prepare(name: str, *, progress: Progress | None = None) -> Path:
    """The folder of a prepared set; prepared now if it is not there yet.

    In it are a `datasets.DatasetDict` (`datasets.load_from_disk` reads it), `card.json`, and the card to read, `README.md`.

    Raises:
        InputError: if there is no such set, or its package is missing and cannot be fetched.
    """
    spec, report = find_set(name), progress or no_progress
    files = _fetch(spec, report)
    folder, versions = _place(name, spec)
    if (folder / CARD).is_file():
        return folder
    tally = Tally()
    rows = spec.rows(files, tally, report)
    if not rows:
        raise InputError(
            f"data set {name!r} has no usable rows in {', '.join(versions)}; install another version of it"
        )
    splits = _divide(spec, rows, report)
    found = leaks(splits, spec.content)
    if found.total:
        raise AssertionError(f"data set {name!r} has the same content in two splits: {found}")
    card = _card(name, spec, splits, tally, versions)
    _write(folder, splits, card)
    return folder


def prepared(name: str) -> Path | None:
    """The folder of a set that is prepared already; None if it is not, and nothing is fetched.

    Raises:
        InputError: if there is no such set.
    """
    spec = find_set(name)
    if any(source.find() is None for source in spec.sources):
        return None
    folder, _ = _place(name, spec)
    return folder if (folder / CARD).is_file() else None


def _place(name: str, spec: DataSet) -> tuple[Path, dict[str, str]]:
    versions = {source.name: source.version() for source in spec.sources}
    return cache_folder() / "data" / f"{name}-{_key(name, versions)}", versions


def load(name: str, *, progress: Progress | None = None) -> DatasetDict:
    """A prepared set: `train`, `validation` and `test`.

    Raises:
        InputError: as `prepare`.
    """
    import datasets

    loaded = datasets.load_from_disk(str(prepare(name, progress=progress)))
    assert isinstance(loaded, datasets.DatasetDict)
    return loaded


def card(name: str, *, progress: Progress | None = None) -> dict[str, Any]:
    """What is known of a prepared set: sources and versions, licence, sizes, columns, the split, what was dropped, leaks.

    Raises:
        InputError: as `prepare`.
    """
    return json.loads((prepare(name, progress=progress) / CARD).read_text())


def _fetch(spec: DataSet, progress: Progress) -> dict[str, Path]:
    missing = [source for source in spec.sources if source.find() is None]
    done = progress("fetching", len(missing)) if missing else None
    files = {}
    for source in spec.sources:
        files[source.name] = source.fetch()
        if done is not None and source in missing:
            done(1)
    return files


def _key(name: str, versions: Mapping[str, str]) -> str:
    """Changes with the source and with the code that makes the rows, so that what is in the cache is what this version would make."""
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode())
    for file in sorted(code_of(name)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def code_of(name: str) -> set[Path]:
    """The files of this package that a set is made by: its own, this one, and what they import of the package."""
    root = Path(data.__path__[0])
    found: set[Path] = set()
    ahead = [root / "sets" / f"{name.replace('-', '_')}.py", Path(__file__)]
    while ahead:
        file = ahead.pop()
        if file not in found and file.name != "catalogue.py":  # it names all sets
            found.add(file)
            ahead += [root / f"{module}.py" for module in IMPORT.findall(file.read_text(encoding="utf-8"))]
    return found


def _divide(spec: DataSet, rows: Sequence[Row], progress: Progress) -> DatasetDict:
    """Rows by split, in the order of their hashes, so that the first of them are a sample like any other."""
    from datasets import Dataset, DatasetDict

    parts: dict[str, list[tuple[str, Row]]] = {name: [] for name in SPLITS}
    for row, key in zip(rows, spec.groups(rows, progress), strict=True):
        parts[split_of(key, spec.shares)].append((_order(row), row))
    splits = {}
    for name, found in parts.items():
        ordered = [row for _, row in sorted(found, key=lambda item: item[0])]
        made = Dataset.from_dict({column: [row[column] for row in ordered] for column in spec.columns})
        made._fingerprint = fingerprint(made)
        splits[name] = made
    return DatasetDict(splits)


def _order(row: Row) -> str:
    digest = hashlib.sha256()
    for column in sorted(row):
        digest.update(row[column] if isinstance(row[column], bytes) else str(row[column]).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def fingerprint(dataset: Dataset) -> str:
    """A hash of columns and contents, the same wherever and whenever they were made."""
    digest = hashlib.sha256(repr(sorted(dataset.column_names)).encode())
    for row in dataset:
        digest.update(_order(dict(row)).encode())
    return digest.hexdigest()[:16]


def _card(name: str, spec: DataSet, splits: DatasetDict, tally: Tally, versions: Mapping[str, str]) -> dict[str, Any]:
    found = leaks(splits, spec.content)
    return {
        "name": name,
        "task": spec.task,
        "what": spec.what,
        "licence": spec.licence,
        "sources": dict(versions),
        "rows": {split: len(part) for split, part in splits.items()},
        "columns": dict(spec.columns),
        "split": spec.split,
        "dropped": dict(sorted(tally.dropped.items())),
        "leaks": {"exact": dict(found.exact), "normalised": dict(found.normalised)},
        "fingerprints": {split: part._fingerprint for split, part in splits.items()},
    }


def card_text(card: Mapping[str, Any]) -> str:
    """A card in Markdown."""
    sources = ", ".join(f"{source} ({version})" for source, version in card["sources"].items())
    lines = [
        f"# {card['name']}",
        "",
        card["what"],
        "",
        f"- Task: {card['task']}",
        f"- Source: {sources}",
        f"- Licence: {card['licence']}",
        f"- Rows: {', '.join(f'{split} {count}' for split, count in card['rows'].items())}",
        f"- Split: {card['split']}",
        f"- In more than one split: {', '.join(f'{n} by {column}' for column, n in card['leaks']['normalised'].items())}",
        f"- Dropped: {', '.join(f'{count} {reason}' for reason, count in card['dropped'].items()) or 'nothing'}",
        "",
        "| column | holds |",
        "|---|---|",
        *(f"| {column} | {what} |" for column, what in card["columns"].items()),
    ]
    return "\n".join(lines) + "\n"


def _write(folder: Path, splits: DatasetDict, card: Mapping[str, Any]) -> None:
    """The folder appears when all of it is written; a preparation that is killed leaves only a hidden one, removed next time."""
    import datasets

    folder.parent.mkdir(parents=True, exist_ok=True)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{card['name']}-") as name:
            unfinished = Path(name) / "whole"
            splits.save_to_disk(str(unfinished), num_shards=dict.fromkeys(SPLITS, 1))
            (unfinished / "README.md").write_text(card_text(card), encoding="utf-8")
            (unfinished / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")
            try:
                os.rename(unfinished, folder)
            except OSError:  # another process was faster, or what is there is not whole
                if not (folder / CARD).is_file():
                    shutil.rmtree(folder)
                    os.rename(unfinished, folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); make room, or set TILTLM_CACHE") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
