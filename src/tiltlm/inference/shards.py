"""Tensors of which each process has a share, on disk: a file a process, in the safetensors format of torch.distributed.checkpoint.

Which part of a tensor a file holds is in its header, so that any number of processes can read what any other number wrote, and
one process what many wrote. A file without such a header holds whole tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def is_shared(tensor: Tensor) -> bool:
    """Whether each process has a share of it (a DTensor)."""
    return hasattr(tensor, "placements")


def save_shares(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write each process's shares; all of them call this.

    Raises:
        OSError: in every process, if one cannot write.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _as_oserror():
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_shares(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors in a folder's safetensors files.

    Args:
        like: tensors whose shares this process wants, by name; all others are read as a whole.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader: Any = HuggingFaceStorageReader(str(folder))
    found = {
        name: torch.empty_like(like[name]) if name in like else torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
    }
    with _as_oserror(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled", category=UserWarning
        )  # as it is asked to be
        load(found, storage_reader=reader, no_dist=True)
    return found


@contextmanager
def _as_oserror() -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:  # it is no Exception, and holds those of all processes
        first = next(iter(error.failures.values()))[0]
        raise OSError(getattr(first, "errno", None), getattr(first, "strerror", None) or str(first)) from error
