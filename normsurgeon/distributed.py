"""Several processes that do one job together, as ``torchrun`` and ``accelerate launch`` start them.

Every process calls the same functions with the same arguments, takes its ``Shard`` of the images, and ``gather``s what
the others found: plain sums, over gloo. A process that was started alone does none of this.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from normsurgeon._util.one_line import one_line
from normsurgeon.errors import NormSurgeonError, ProcessError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for the others: they may be busy with what only the first one does."""


class Shard(NamedTuple):
    """Which part of the work is a process's own: number ``rank`` of ``world``.

    >>> [number for number in range(7) if Shard(1, 3).has(number)]
    [1, 4]
    """

    rank: int = 0
    world: int = 1

    def has(self, number: int) -> bool:
        """Whether piece ``number`` of the work belongs to this process."""
        return number % self.world == self.rank


ALONE = Shard()

_alone: ContextVar[bool] = ContextVar("_alone", default=False)


def own_shard() -> Shard:
    """This process's share: of the process group where there is one, else as its launcher said, else everything."""
    if _alone.get():
        return ALONE
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return Shard(distributed.get_rank(), distributed.get_world_size())
    return _launched()


def _launched() -> Shard:
    """What a launcher wrote into the environment; its address is what makes it more than a leftover."""
    words = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(word.isdecimal() for word in words) or "MASTER_ADDR" not in os.environ:
        return ALONE
    rank, world = map(int, words)
    return Shard(rank, world) if world > 1 else ALONE


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return own_shard().rank == 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself: on all of the images, and without waiting for the others.

    For a training loop in which one process alone evaluates.

    >>> with alone():
    ...     own_shard()
    Shard(rank=0, world=1)
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def own_device(device: str | torch.device | None) -> str | torch.device | None:
    """``cuda`` without a number is, for one of several processes, the GPU of its own number on this machine.

    >>> own_device("cpu"), own_device(None)
    ('cpu', None)
    """
    local = os.environ.get("LOCAL_RANK", "")
    if str(device) == "cuda" and local.isdecimal() and own_shard().world > 1:
        return f"cuda:{local}"
    return device


def gather(value: T) -> list[T]:
    """What every process hands in, in the order of the processes. All of them must call this, inside ``together``.

    :raises NormSurgeonError: what another process failed with, or that one is gone.

    >>> gather("alone")
    ['alone']
    """
    return _exchange(value, None) if own_shard().world > 1 else [value]


def gather_merged(own: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """All processes' accumulators of these names, the same everywhere, those of one name merged.

    One name after the other, so that memory does not grow with the number of processes.
    """
    merged: dict[str, Any] = {}
    for name in names:
        for part in gather(own.get(name)):
            if name in merged and part is not None:
                merged[name].merge(part)
            elif part is not None:
                merged[name] = part
    return merged


def from_main_process(value: T | None) -> T:
    """What the first process hands in; the others' value is not looked at."""
    return gather(value if is_main_process() else None)[0]  # type: ignore[return-value]


@contextmanager
def together() -> Iterator[None]:
    """All processes get to the end of what is inside, or all of them raise: an error in one is raised in the others.

    A process that fails hands its error in where the others are, or will be, waiting to ``gather``.
    """
    if own_shard().world == 1:
        yield
        return
    try:
        yield
        _exchange(None, None)
    except Exception as error:
        if not error_is_shared(error):
            _share(error)
            with suppress(NormSurgeonError):
                _exchange(None, error)
        raise


def error_is_shared(error: BaseException) -> bool:
    """Whether the other processes raise this error, too, so that the first one's message is enough."""
    return getattr(error, "_shared", False)


def _share(error: BaseException) -> BaseException:
    error._shared = True  # type: ignore[attr-defined]
    return error


def _exchange(value: Any, error: Exception | None) -> list[Any]:
    """Everybody's values; an error in their place is raised."""
    import torch.distributed as dist

    shard = own_shard()
    failure = None
    if error is not None:
        known = type(error) if isinstance(error, NormSurgeonError) else None
        failure = known, str(error) if known else one_line(error, limit=10_000)
    found: list[Any] = [None] * shard.world
    try:
        dist.all_gather_object(found, (value, failure), group=_group())
    except RuntimeError as lost:
        reason = one_line(lost, kind=False)
        raise _share(
            ProcessError(f"the processes cannot reach one another ({reason}); if one has ended, its message says why")
        ) from lost
    for rank, (_, theirs) in enumerate(found):
        if theirs is not None:
            known, text = theirs
            raise _share(known(text) if known else ProcessError(f"process {rank} of {shard.world} failed: {text}"))
    return [value for value, _ in found]


def _group() -> Any:
    """A gloo group of all processes, whatever the default group's GPUs talk through."""
    import torch.distributed as dist

    if not dist.is_initialized():
        gpus = dist.is_nccl_available() and _has_gpus()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    return _patient_group(dist.group.WORLD)


def _has_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


@lru_cache(maxsize=1)
def _patient_group(world: Any) -> Any:
    import torch.distributed as dist

    atexit.register(_leave)
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _leave() -> None:
    """Let the groups go before Python ends: a group that outlives it aborts the process, one time in four."""
    import torch.distributed as dist

    _patient_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
