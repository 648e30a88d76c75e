"""`tiltlm data`: what sets there are, rows of one, and files of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiltlm.data.catalogue import all_sets
from tiltlm.data.preparation import CARD, load, prepare
from tiltlm.data.reading import IMAGE
from tiltlm.data.spec import Progress
from tiltlm.errors import InputError
from tiltlm.workflow.files import require_writable_folder, unwritable, write_text


def listed() -> list[dict[str, Any]]:
    """Every set: name, task, licence, whether its files are here, what installs them, and how many rows where it is prepared."""
    found = []
    for name, spec in all_sets().items():
        missing = [source for source in spec.sources if source.find() is None]
        row = {"name": name, "task": spec.task, "what": spec.what, "licence": spec.licence, "installed": not missing}
        found.append(
            row | {"install": [source.how for source in missing], "rows": _rows(name) if not missing else None}
        )
    return found


def _rows(name: str) -> int | None:
    """How many rows a set that was prepared has; None where none is."""
    from tiltlm.data.preparation import prepared

    folder = prepared(name)
    return None if folder is None else sum(json.loads((folder / CARD).read_text())["rows"].values())


def export(name: str, folder: Path, progress: Progress | None = None) -> list[Path]:
    """Write the splits of a set as JSON lines, which recipes take as `prompts`; pictures are files beside them.

    Returns:
        The .jsonl files.

    Raises:
        InputError: if there is no such set, or the folder cannot be written.
    """
    require_writable_folder(folder)
    written = []
    for split, rows in load(name, progress=progress).items():
        lines = []
        for number, row in enumerate(rows):
            values = dict(row)
            if isinstance(values.get(IMAGE), bytes):
                values[IMAGE] = _picture(folder, f"images/{split}-{number:05}.png", values[IMAGE])
            lines.append(f"{json.dumps(values, ensure_ascii=False)}\n")
        file = folder / f"{split}.jsonl"
        write_text(file, "".join(lines))
        written.append(file)
    write_text(folder / "README.md", (prepare(name) / "README.md").read_text(encoding="utf-8"))
    return written


def _picture(folder: Path, name: str, png: bytes) -> str:
    try:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png)
    except OSError as error:
        raise unwritable(folder / name, error) from error
    return name


def shown(name: str, split: str, count: int, progress: Progress | None = None) -> list[Mapping[str, Any]]:
    """The first rows of a split, pictures as their sizes in bytes.

    Raises:
        InputError: if there is no such set or split.
    """
    splits = load(name, progress=progress)
    if split not in list(splits):
        raise InputError(f"split is {split!r}; data set {name!r} has {', '.join(map(str, splits))}")
    rows = splits[split].select(range(min(count, len(splits[split]))))
    return [{k: f"{len(v)} bytes" if isinstance(v, bytes) else v for k, v in dict(row).items()} for row in rows]
