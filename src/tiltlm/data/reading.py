"""Reading tables: prepared sets, users' files and the hub's data sets, by one syntax and with one's own names of columns.

| source | what is read |
|---|---|
| `mine.jsonl`, `.json`, `.csv`, `.parquet` | a table |
| `mine.txt` | a prompt a line |
| `data:quiz`, `data:quiz/test` | a set that `tiltlm data` prepares; train by default |
| `hub:owner/name`, `hub:owner/name/test` | a data set of the hub |
| any of these and `[10:74]`, `[:64]`, `[-64:]` | some of the rows |

What a file says is what is read. A CSV has texts in all its columns: "NA" and "007" are answers, and an empty cell is an empty
text; who needs numbers makes them. In JSON a text that looks like a date is a text. Lines end at a line feed and nowhere else.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiltlm.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

SLICE = re.compile(r"(?P<body>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")
NAMED = re.compile(r"(?P<kind>data|hub):(?P<name>.+)")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
REFERENCES = ("reference", "references")
IMAGE = "image"


@dataclass(frozen=True)
class Address:
    """A source taken apart.

    Attributes:
        kind: file, data or hub.
        place: a path, a set's name or a hub id.
        split: of a set or hub id; None if the source names none.
        rows: which of them.
    """

    kind: str
    place: str
    split: str | None = None
    rows: slice = field(default_factory=lambda: slice(None))


def address(source: str | Path) -> Address:
    """Take a source apart; a path that is there as it stands is a file, whatever is in its name."""
    text, rows = str(source), slice(None)
    if Path(text).exists():
        return Address("file", text)
    match = SLICE.fullmatch(text)
    if match:
        start, stop = (int(end) if end else None for end in match.group("start", "stop"))
        text, rows = match["body"], slice(start, stop)
    named = NAMED.fullmatch(text)
    if named and named["kind"] == "data":
        name, _, split = named["name"].partition("/")
        return Address("data", name, split or None, rows)
    if named:
        parts = named["name"].split("/")
        return Address("hub", "/".join(parts[:2]), "/".join(parts[2:]) or None, rows)
    is_hub = HUB_ID.fullmatch(text) and Path(text).suffix not in (*LOADERS, ".txt") and not Path(text).exists()
    return Address("hub" if is_hub else "file", text, None, rows)


def read(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    split: str | None = None,
    need: Sequence[str] = ("prompt",),
    what: str = "data",
) -> Dataset:
    """A table by its source, with one's own names of columns.

    Args:
        source: see above.
        columns: our name of a column → the source's. What is not named stays as it is.
        split: of a prepared set or of the hub; or name it in the source. Files have none.
        need: columns that must be there, by our names.
        what: the source's role, for messages.

    Returns:
        The rows. Pictures in the column `image` are bytes, whether they were bytes or paths (relative to the file), and
        every one was decoded. References are looked at where `need` or `columns` names them.

    Raises:
        InputError: if there is nothing to read, a column is missing, a reference is missing, or a picture does not decode.
    """
    at = address(source)
    if split is not None and (at.kind == "file" or at.split not in (None, split)):
        reason = "is a file, which has none" if at.kind == "file" else f"names the split {at.split!r}"
        raise InputError(f"split is {split!r}, but {what} {str(source)!r} {reason}; leave one of them out")
    rows = _rows(at, split or at.split, what)
    rows = _mapped(rows, columns or {}, str(source))
    missing = next((name for name in need if name not in rows.column_names), None)
    if missing is not None:
        raise InputError(
            f"column is {missing!r}, but {source} has the columns {', '.join(rows.column_names)}; name the one with the {missing}s"
        )
    chosen = range(len(rows))[at.rows]
    if not len(chosen):
        raise InputError(f"{what} {str(source)!r} has no rows; give at least one of the {len(rows)} that there are")
    rows = rows.select(chosen) if len(chosen) < len(rows) else rows
    asked = {*need, *(columns or {})}
    _check_references(rows, [name for name in REFERENCES if name in asked], str(source), chosen.start)
    folder = Path(at.place).parent if at.kind == "file" else Path()
    return _with_images(rows, folder, str(source), chosen.start)


def read_lines(path: Path, what: str = "prompts") -> list[str]:
    """The lines of a text file, without empty ones at its end. A line ends at a line feed; other breaks are in the text.

    Raises:
        InputError: if it is missing, empty or not UTF-8.
    """
    _require_file(path, what)
    lines = _lines(_text(path, what))
    if not any(line.strip() for line in lines):
        raise InputError(f"{what} {str(path)!r} is empty; write one prompt a line")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def table(path: Path, what: str = "prompts") -> Dataset:
    """All rows of a table in a file.

    Raises:
        InputError: if it is missing, empty, of an unknown kind or does not parse.
    """
    _require_file(path, what)
    if path.suffix not in LOADERS:
        raise InputError(f"{what} {str(path)!r} is a {path.suffix or 'nameless'} file; use {KINDS}")
    if not path.stat().st_size:
        raise InputError(f"{what} {str(path)!r} is empty; give at least one row")
    _quieten()
    try:
        rows = LOADERS[path.suffix](path, what)
    except InputError:
        raise
    except Exception as error:  # datasets and pyarrow wrap parser errors in many types
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(
            f"{what} {str(path)!r} cannot be read as {path.suffix[1:]} ({reason[:200]}); mend it"
        ) from error
    if not len(rows):
        raise InputError(f"{what} {str(path)!r} has no rows; give at least one")
    return rows


def _text(path: Path, what: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {str(path)!r} is not UTF-8 text ({error.reason}); convert it") from error


def _lines(text: str) -> list[str]:
    return [line.removesuffix("\r") for line in text.split("\n")]


def _csv(path: Path, what: str) -> Dataset:
    """All columns as texts, as they stand."""
    import datasets
    import pyarrow
    from pyarrow import csv

    data = _text(path, what).encode()
    wide: dict[str, Any] = {"parse_options": csv.ParseOptions(newlines_in_values=True)}
    wide |= {"read_options": csv.ReadOptions(block_size=len(data) + 1)}  # no row may be longer than a block
    names = csv.open_csv(io.BytesIO(data), **wide).schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{what} {str(path)!r} has the column {twice!r} twice; rename one of them")
    kinds: Any = dict.fromkeys(names, pyarrow.string())
    texts = csv.ConvertOptions(column_types=kinds, strings_can_be_null=False)
    return datasets.Dataset(csv.read_csv(io.BytesIO(data), convert_options=texts, **wide))


def _json(path: Path, what: str) -> Dataset:
    """An object a line, or a list of objects, or (in .json) one object."""
    from datasets import Dataset

    text = _text(path, what)
    rows = _whole_json(text, path, what)
    rows = _json_lines(text, path, what) if rows is None else rows
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Dataset.from_dict(columns, on_mixed_types="use_json")  # which keeps values of several types as they are


def _whole_json(text: str, path: Path, what: str) -> list[dict[str, Any]] | None:
    """The rows of a file that is one JSON value; None where it is to be read line by line."""
    is_list = text.lstrip().startswith("[")
    if not is_list and path.suffix != ".json":
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if not is_list:
            return None
        raise InputError(
            f"line {error.lineno} of {what} {str(path)!r} is not JSON ({error.msg}); write a list of objects, or mend it"
        ) from error
    rows = found if is_list else [found]
    for number, row in enumerate(rows, 1):
        _require_object(row, f"item {number} of {what} {str(path)!r}")
    return rows


def _json_lines(text: str, path: Path, what: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"line {number} of {what} {str(path)!r} is not JSON ({error.msg}); write an object a line, or mend it"
            ) from error
        _require_object(row, f"line {number} of {what} {str(path)!r}")
        rows.append(row)
    return rows


def _require_object(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where} is {row!r:.60}; write an object with the columns' names")


def _parquet(path: Path, what: str) -> Dataset:
    import datasets

    return datasets.load_dataset("parquet", data_files=str(path), split="train")


LOADERS: Mapping[str, Callable[[Path, str], Dataset]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""(file, its role) -> its rows, by the kinds of tables that files hold."""
KINDS = ", ".join([".txt", *LOADERS])


def _rows(at: Address, split: str | None, what: str) -> Dataset:
    from datasets import Dataset

    if at.kind == "data":
        return _of_set(at.place, split or "train")
    if at.kind == "hub":
        return _of_hub(at.place, split or "train", what)
    path = Path(at.place)
    if path.suffix == ".txt":
        return Dataset.from_dict({"prompt": read_lines(path, what)})
    return table(path, what)


def _of_set(name: str, split: str) -> Dataset:
    from tiltlm.data.preparation import load

    splits = load(name)
    if split not in splits:
        raise InputError(
            f"split is {split!r}, but data set {name!r} has {', '.join(map(str, splits))}; write data:{name}/train"
        )
    return splits[split]


def _of_hub(name: str, split: str, what: str) -> Dataset:
    import datasets

    _quieten()
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets and the hub's client have many types
        reason = " ".join(str(error).split())
        raise InputError(
            f"{what} 'hub:{name}/{split}' cannot be read ({reason[:200]}); give a hub id that has this split and the network, or a "
            f"{KINDS} file"
        ) from error


def _quieten() -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is said here, once


def _require_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise InputError(
            f"{what} {str(path)!r}: there is no such file; give a {KINDS} file, data:NAME or hub:OWNER/NAME"
        )


def _mapped(rows: Dataset, columns: Mapping[str, str], source: str) -> Dataset:
    import datasets

    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            raise InputError(
                f"columns maps {ours!r} to {theirs!r}, but {source} has the columns {', '.join(rows.column_names)}; name one of them"
            )
    kept = {name: name for name in rows.column_names if name not in columns}
    wanted = kept | dict(columns)
    if wanted == kept:
        return rows
    there = _columns(rows)
    features = datasets.Features({ours: rows.features[theirs] for ours, theirs in wanted.items()})
    return _of_columns({ours: there[theirs] for ours, theirs in wanted.items()}, features)


def _columns(rows: Dataset) -> dict[str, Any]:
    """Arrow's columns, in the order of the rows."""
    whole = rows.flatten_indices() if rows._indices is not None else rows
    return {name: whole.data.column(name) for name in whole.column_names}


def _of_columns(columns: Mapping[str, Any], features: Any) -> Dataset:
    import datasets
    import pyarrow

    return datasets.Dataset(pyarrow.table(dict(columns)).replace_schema_metadata(features.arrow_schema.metadata))


def _check_references(rows: Dataset, columns: Sequence[str], source: str, first: int) -> None:
    for column in columns:
        for number, value in enumerate(rows[column], first + 1):
            items = value if isinstance(value, list) else [value]
            if not items or any(item is None or not str(item).strip() for item in items):
                raise InputError(
                    f"row {number} of {source} has no {column} ({value!r}); give one, or leave the row out"
                )


def _with_images(rows: Dataset, folder: Path, source: str, first: int) -> Dataset:
    """The same rows with pictures as bytes, each decoded once to see that it can be."""
    if IMAGE not in rows.column_names:
        return rows
    import datasets
    import pyarrow

    if isinstance(rows.features[IMAGE], datasets.Image):
        rows = rows.cast_column(IMAGE, datasets.Image(decode=False))
    pictures = [_image(value, folder, number, source) for number, value in enumerate(rows[IMAGE], first + 1)]
    features = datasets.Features({**rows.features, IMAGE: datasets.Value("binary")})
    return _of_columns({**_columns(rows), IMAGE: pyarrow.array(pictures, pyarrow.binary())}, features)


def _image(value: Any, folder: Path, number: int, source: str) -> bytes:
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, dict):  # datasets' own way, of bytes or a path
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        path = folder / value
        if not path.is_file():
            raise InputError(
                f"row {number} of {source} has the image {value!r}, and there is no file {str(path)!r}; give its path"
            )
        name, value = value, path.read_bytes()
    else:
        name = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    if not isinstance(value, bytes):
        raise InputError(f"row {number} of {source} has the image {name:.60}; give a path or the bytes of a picture")
    try:
        with Image.open(io.BytesIO(value)) as opened:
            opened.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"row {number} of {source} has an image that does not decode ({name:.60}); mend it or leave it out"
        ) from error
    return value
