"""Writing files: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from normsurgeon._util.parts import part_of, remove_stale_parts
from normsurgeon.errors import WriteError


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file in the same folder, flush it to disk, and rename it into place.

    Whatever happens, ``path`` holds either what it held or all of the new file.
    What killed processes have left of it is removed.

    :raises WriteError: if the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    check_writable(path)
    remove_stale_parts(path.parent, path.name)
    try:
        with part_of(path) as part:
            write(part)
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            part.chmod(0o666 & ~umask)  # some libraries write files that only their owner can read
            os.replace(part, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WriteError(f"cannot write {path}: {_reason(error)}; nothing was written") from error
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all.

    :raises WriteError: as ``write_atomically``.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode("utf-8", "replace"))

    write_atomically(path, write)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail before the work and not after it.

    :raises WriteError: if a file could not be written at ``path``.
    """
    path = Path(path)
    if path.is_dir():
        raise WriteError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise WriteError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise WriteError(f"cannot write {path}: permission denied")


def _reason(error: Exception) -> str:
    """The system's own words, without the libraries' wrapping."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split())
    number = re.search(r"os error (\d+)", text)  # safetensors: "I/O error: File too large (os error 27)"
    if number:
        return os.strerror(int(number[1]))
    if "inline_container" in text:  # torch.save: "[enforce fail at inline_container.cc:671] . unexpected pos …"
        return "the file could not be written to its end (is the disk full?)"
    return text


def _sync_folder(folder: Path) -> None:
    """Make the renaming last. The file is complete by now, and not every file system can do this."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
