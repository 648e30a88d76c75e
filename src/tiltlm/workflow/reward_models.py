"""Training and checking reward models from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltlm.errors import InputError
from tiltlm.lm.adapters import LoRA
from tiltlm.lm.trunk import Adaptation, TopLayers, load_trunk
from tiltlm.reward_models.calibration import Calibration, check_reward_model
from tiltlm.reward_models.data import Task, task_of
from tiltlm.reward_models.model import MODEL_FILE, RewardModel
from tiltlm.reward_models.train import Progress, train_reward_model
from tiltlm.reward_models.tune import Tuning
from tiltlm.workflow.files import require_writable_folder
from tiltlm.workflow.inputs import read_rows


def adaptation_of(lora_r: int, unfreeze: str | None) -> Adaptation:
    """What of the trunk is trained: `lora_r` for an adapter, `unfreeze` for layers from the top ("all" for everything)."""
    if lora_r and unfreeze is not None:
        raise InputError(f"lora-r is {lora_r} and unfreeze {unfreeze!r}; give one of them")
    if lora_r:
        return LoRA(r=lora_r)
    if unfreeze is None:
        return None
    if unfreeze != "all" and not unfreeze.isdigit():
        raise InputError(f"unfreeze is {unfreeze!r}; give a number of layers, or all")
    return TopLayers(None if unfreeze == "all" else int(unfreeze))


def tasks_of(files: Sequence[str], label_smoothing: float) -> dict[str, Task]:
    """Each file as a task; several are heads that share the trunk, called by the files' names."""
    tasks: dict[str, Task] = {}
    for file in files:
        name = Path(file).stem
        if name in tasks:
            raise InputError(
                f"data names {name!r} twice; each file is a head by the file's name, so give them different names"
            )
        tasks[name] = task_of(read_rows(file), label_smoothing=label_smoothing)
    return tasks


def train_from_files(
    files: Sequence[str],
    out: Path,
    model: str,
    settings: Mapping[str, Any],
    progress: Progress,
    *,
    replace: bool = False,
) -> RewardModel:
    """Train a reward model and save it.

    Args:
        settings: of `load_trunk` (max_tokens, pooling, dtype, device), of `Tuning`, and of `train_reward_model`.
        replace: a model that is in the folder already may go.

    Raises:
        InputError: if there is one and it may not.
    """
    require_writable_folder(out)
    if not (settings["resume"] or replace) and (out / MODEL_FILE).is_file():
        raise InputError(
            f"out {str(out)!r} holds a reward model already; choose another folder, --out, or --replace it"
        )
    left = dict(settings)
    tasks = tasks_of(files, left.pop("label_smoothing"))
    adaptation = adaptation_of(left.pop("lora_r"), left.pop("unfreeze"))
    trunk = load_trunk(model, **{name: left.pop(name) for name in ("max_tokens", "pooling", "dtype", "device")})
    tuning = Tuning(**{name: left.pop(name) for name in ("steps", "batch", "lr")})
    return train_reward_model(tasks, trunk, adaptation=adaptation, tuning=tuning, folder=out, progress=progress, **left)


def check_from_files(
    folder: Path, held_out: str, shifted: Sequence[str], task: str | None, progress: Progress
) -> list[tuple[Calibration, Calibration]]:
    """Calibration on held-out rows and on shifted ones; of each with the uncertainty, and by the means alone."""
    model = RewardModel.load(folder)
    head, found = model.head(task), []
    for file in (held_out, *shifted):
        rows = task_of(read_rows(file), head.kind, classes=head.classes)
        features = model.features_of(rows.answers, progress(Path(file).name, len(rows.answers) * len(model.trunks)))
        both = [
            check_reward_model(model, rows, task=task, plain=plain, name=Path(file).name, features=features)
            for plain in (False, True)
        ]
        found.append((both[0], both[1]))
    return found
