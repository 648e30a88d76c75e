"""`tiltlm augment`: a file of preferences or demonstrations to a larger one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiltlm.augmentation import BackTranslation, augment
from tiltlm.augmentation.augment import AUGMENTATIONS, MARK, Augmentation, make_augmentation
from tiltlm.data.spec import Progress
from tiltlm.errors import InputError
from tiltlm.workflow.files import write_text
from tiltlm.workflow.inputs import LOADERS, read_completions, read_prompts

WITH_RATE = ("delete", "swap", "replace")


def augment_file(
    source: Path,
    out: Path,
    names: str,
    *,
    n: int,
    seed: int,
    rate: float,
    protect: str | None = None,
    there: str | None = None,
    back: str | None = None,
    temperature: float | None = None,
    progress: Progress | None = None,
) -> Mapping[str, int]:
    """Write the rows of `source` and new ones made of them.

    Args:
        names: augmentations, with commas between.
        rate: of the edits of words.
        protect: further words that edits leave alone, with commas between.
        there, back: translation models, for back-translation; `temperature` samples their output.

    Returns:
        How many rows each augmentation made.

    Raises:
        InputError: if the file, a name or a setting cannot be used.
    """
    if out.suffix != ".jsonl":
        raise InputError(f"out {str(out)!r} is not written as JSON lines; name it .jsonl")
    if out.exists():
        what = "the file that is read" if source.resolve() == out.resolve() else "there already"
        raise InputError(f"out {str(out)!r} is {what}; give another name, so that nothing is lost")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError(
            f"with is {names!r}; use {', '.join([*AUGMENTATIONS, BackTranslation.name])}, with commas between"
        )
    words = frozenset(word.strip().lower() for word in (protect or "").split(",") if word.strip())
    made: list[Augmentation] = []
    for name in wanted:
        if name == BackTranslation.name:
            made.append(_back_translation(there, back, temperature, progress))
        else:
            made.append(make_augmentation(name, **({"rate": rate, "protected": words} if name in WITH_RATE else {})))
    rows = augment(_read(source, wanted), made, n=n, seed=seed)
    write_text(out, "".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in rows))
    counts = Counter(row[MARK] for row in rows)
    return {name: counts[name] for name in wanted}


def _read(source: Path, wanted: list[str]) -> Any:
    """Rows with TRL's columns, or, for label-swap alone, those of a judge."""
    if wanted == ["label-swap"] and source.suffix in LOADERS:
        return read_prompts(str(source), "label")
    return read_completions(str(source))


def _back_translation(
    there: str | None, back: str | None, temperature: float | None, progress: Progress | None
) -> BackTranslation:
    if there is None or back is None:
        raise InputError("back-translation needs two models; give --there and --back, for instance two of Marian's")
    from tiltlm.lm.load import quieten
    from tiltlm.lm.translate import load_translator

    quieten()
    models = [load_translator(model, temperature=temperature) for model in (there, back)]
    return BackTranslation(*(replace(model, progress=progress) for model in models))
