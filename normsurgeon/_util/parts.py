"""Files that are being written, each in a folder of its own: libraries may put more there than the file.

What a killed process has left can be told from what another one is writing: by a lock, which the system releases when a
process ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where what was left by others stays
    fcntl = None  # type: ignore[assignment]

ENDING = ".part"

_own: set[Path] = set()
_written: set[Path] = set()


@contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """Where to write a file that is then renamed to ``path``; what is still there at the end is removed."""
    while True:
        folder = path.with_name(f".{path.name}.{os.urandom(4).hex()}{ENDING}")
        _own.add(folder)  # before it is there: a signal may end the process at any moment
        folder.mkdir()
        with suppress(FileNotFoundError):  # removed as one that nobody holds
            handle = _hold(folder, os.O_RDONLY)
            if handle is not None:
                break
    try:
        part = folder / path.name
        yield part
        if not part.exists():  # it was renamed
            _written.add(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _own.discard(folder)
        unlock(handle)


def something_was_written() -> bool:
    """Whether this process has put a whole file where it belongs."""
    return bool(_written)


def remove_own_parts() -> None:
    """Remove what this process has begun to write: for a signal that ends it."""
    for folder in tuple(_own):
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_parts(folder: Path, name: str = "") -> None:
    """Remove what processes that are gone have left in a folder; only of the file ``name``, if it is given."""
    if fcntl is None:
        return
    begin = f".{name}." if name else "."
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(begin) and entry.name.endswith(ENDING):
                with suppress(OSError):
                    _remove_unless_held(entry.path)


def _remove_unless_held(part: str) -> None:
    handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(part, ignore_errors=True)
        os.unlink(part)  # where it is a file
    finally:
        os.close(handle)


def lock(path: Path) -> int | None:
    """Make a file and lock it until ``unlock`` or the end of this process; None if another holder has it.

    Where there are no locks (Windows, some network file systems) everybody gets it.

    :raises OSError: if the file cannot be made.
    """
    return _hold(path, os.O_RDWR | os.O_CREAT)


def unlock(handle: int) -> None:
    """Release what ``lock`` gave."""
    if handle >= 0:
        os.close(handle)


def _hold(path: Path, flags: int) -> int | None:
    if fcntl is None:
        return -1  # an open file could not be renamed
    while True:
        handle = os.open(path, flags, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            return handle
        with suppress(FileNotFoundError):  # its last holder may have removed it since it was opened
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)
