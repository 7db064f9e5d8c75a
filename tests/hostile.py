"""What hostile files are made of, and a watch over what reading them does."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from normsurgeon.errors import NormSurgeonError

STEERING = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *map(chr, range(0x202A, 0x202F))}
"""Characters that no line of ours may hold; line breaks are counted where lines are split."""

_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.",
    "urllib.",
    "shutil.",
    "os.remove",
)
_watching = False
_seen: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    own = event.startswith(("shutil.", "os.remove")) and ".part" in repr(arguments)  # what save clears behind itself
    if _watching and event.startswith(_FORBIDDEN) and not own:
        _seen.append(f"{event} {arguments!r:.100}")


sys.addaudithook(_hook)


class Trap:
    """An object whose pickle runs a command that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@contextmanager
def watched(seconds: float = 5) -> Iterator[list[NormSurgeonError]]:
    """Whatever is done inside raises nothing but one of our lines, starts nothing, and is done in time."""
    global _watching
    caught: list[NormSurgeonError] = []
    _seen.clear()
    began = time.process_time()
    _watching = True
    try:
        yield caught
    except NormSurgeonError as error:
        caught.append(error)
    finally:
        _watching = False
    assert time.process_time() - began < seconds
    assert _seen == []
    for error in caught:
        line = str(error)
        assert len(line) <= 300, line
        assert not STEERING & set(line), line


def header_in(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["normsurgeon"])
    return header


def put_header(path: Path, header: Any) -> Path:
    """Write the header of a .safetensors file anew, with the tensors as they are."""
    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({key: tensor.clone() for key, tensor in state.items()}, path, metadata={"normsurgeon": text})
    return path


def with_pickle(content: bytes, change: Any) -> bytes:
    """What ``torch.save`` wrote, with another pickle inside and checksums that fit it."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        for part in old.infolist():
            text = old.read(part)
            new.writestr(part.filename, change(text) if part.filename.endswith("data.pkl") else text)
    return written.getvalue()
