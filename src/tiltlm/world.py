"""The processes that train together, and what they say to each other.

Every process runs the same program on the same records. Only what costs much is divided between them: drawing, scoring, rewards
and the passes with gradient. What each makes of its share is exchanged, so that all of them hold the whole batch again and
whatever follows from it comes out the same everywhere. A process that was started by itself is a world of one, and pays nothing.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tiltlm.errors import InputError, TiltWarning

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they have started."""
PATIENCE = timedelta(days=1)
"""How long a process waits for another that is alive: a reward or a plan may take hours. One that has ended is noticed at once."""
BUCKET = 2**24
"""Numbers that are summed in one message; bounds the copy that is made for it."""


@dataclass(frozen=True)
class World:
    """Processes that train together; by default one, alone.

    Attributes:
        rank: the place of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this process's: neighbours, and in numbers that differ by one at most."""
        first, end = (-(-rank * count // self.size) for rank in (self.rank, self.rank + 1))
        return range(first, end)

    def exchange(self, value: T) -> list[T]:
        """The value of every process, in their order. All of them have to call this, as often as each other."""
        return [value]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def every(self, work: Callable[[], T]) -> list[T]:
        """What `work()` gives in every process, in their order. If it fails in one, it fails in all, with the same message.

        Raises:
            InputError, FloatingPointError, KeyboardInterrupt: as it was raised in any of the processes. Any other error is raised
                where it happened, and for the others an InputError says what it was.
        """
        if self.size == 1:
            return [work()]
        error: BaseException | None = None
        result: Any = None
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        found = self.exchange((result, None if error is None else _Failure.of(error)))
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                raise failure.here(rank)
        return [value for value, _ in found]

    def each(self, work: Callable[[], T]) -> T:
        """`work()` of this process; if it fails in one of them, it fails in all, as with `every`."""
        mine: list[T] = []
        self.every(lambda: mine.append(work()))
        return mine[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """`work()` in the main process, then in the others, which find on the disk what it left there."""
        mine = self.each(lambda: [work()] if self.main else [])
        return self.each(lambda: mine or [work()])[0]

    def of_main(self, value: T) -> T:
        """The main process's value, for what is not the same everywhere: the clock, for example."""
        return self.exchange(value)[0]

    def agree(self, values: Mapping[str, Any], remedy: str) -> None:
        """Refuse to go on if the processes do not hold the same values.

        Raises:
            InputError: naming the first value that differs.
        """
        theirs = self.exchange(dict(values))
        for name, first in theirs[0].items():
            for rank, other in enumerate(theirs):
                if other[name] != first:
                    raise InputError(
                        f"the processes differ: {name} is {first!r} in process 0 and {other[name]!r} in process {rank}; {remedy}"
                    )


ALONE = World()
_entered: ContextVar[World | None] = ContextVar("world", default=None)


@dataclass(frozen=True)
class _Failure:
    """An error that can be sent."""

    kind: str
    message: str

    @staticmethod
    def of(error: BaseException) -> _Failure:
        for kind in (InputError, FloatingPointError, KeyboardInterrupt):
            if isinstance(error, kind):
                return _Failure(kind.__name__, str(error))
        return _Failure("", f"{type(error).__name__}: {error}")

    def here(self, rank: int) -> BaseException:
        """The error to be raised in the other processes."""
        known = {kind.__name__: kind for kind in (InputError, FloatingPointError, KeyboardInterrupt)}
        if self.kind in known:
            return known[self.kind](self.message)
        return InputError(f"process {rank} failed ({self.message})")


@dataclass(frozen=True)
class Launched(World):
    """Processes that a launcher started: accelerate launch, torchrun or mpirun.

    Attributes:
        talk: torch's process group for values in main memory; None is the default one.
    """

    talk: Any = None

    def exchange(self, value: T) -> list[T]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _others_alive():
            dist.all_gather_object(found, value, group=self.talk)
        return found

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        import torch
        import torch.distributed as dist

        for some in _buckets(tensors):
            together = torch.cat([tensor.flatten() for tensor in some])
            with _others_alive():
                dist.all_reduce(together, group=self.talk if together.device.type == "cpu" else None)
            for tensor, part in zip(some, together.split([t.numel() for t in some]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that go in one message: of one kind and place, and not too many numbers."""
    some: list[Tensor] = []
    for tensor in tensors:
        alike = not some or (tensor.dtype, tensor.device) == (some[0].dtype, some[0].device)
        if some and (not alike or sum(t.numel() for t in some) + tensor.numel() > BUCKET):
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"another process has ended ({' '.join(str(error).split())[:120]}); see what it said, then go on with --resume"
        ) from error


def launched() -> bool:
    """Whether a launcher started several processes, of which this is one."""
    return any(int(os.environ.get(name) or 1) > 1 for name in SIZES)


def join() -> World:
    """The world that this process is in.

    Raises:
        InputError: where a launcher was asked for several processes and started only one.
    """
    return _entered.get() or _join()


def asked_to_shard() -> bool:
    """Whether the launcher was told to divide the weights: accelerate launch --use_fsdp."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1", "yes")


@contextmanager
def entered(world: World) -> Iterator[World]:
    """Let `join` give this world inside, for example in a test."""
    token = _entered.set(world)
    try:
        yield world
    finally:
        _entered.reset(token)


@functools.cache
def _join() -> World:
    if not launched():
        _require_started()
        return ALONE
    import atexit

    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    state = PartialState(cpu=forced or not torch.accelerator.is_available(), timeout=PATIENCE)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    talk = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
    world = Launched(state.process_index, state.num_processes, talk)
    if not world.main:  # what one process says is enough
        warnings.filterwarnings("ignore", category=TiltWarning)
    return world


def _require_started() -> None:
    """accelerate launch --cpu starts one process, whatever it was asked for, unless mpirun starts the others."""
    asked = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if asked and not any(name in os.environ for name in SIZES):
        raise InputError(
            "accelerate launch --cpu has started one process only, although it was asked for several; start them with "
            "torchrun --nproc_per_node N, with accelerate launch --multi_gpu (which also runs on CPUs), or through mpirun with "
            "--mpirun_hostfile"
        )


__all__ = ["ALONE", "Launched", "World", "asked_to_shard", "entered", "join", "launched"]
