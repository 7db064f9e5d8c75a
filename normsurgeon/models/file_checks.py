"""Whether a file promises more than it holds: looked at before its tensors are used, and before torch reads it."""

from __future__ import annotations

import mmap
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from normsurgeon.errors import CheckpointError
from normsurgeon.printable import one_short_line

MAX_SAFETENSORS_HEADER = 3 * 2**23
"""Bytes: a header of ours with quotes escaped, and some hundred thousand tensors."""

# What torch's restricted unpickler lets a file call, and what grows: bytearray(10**10), and codecs that double what
# they are given, called on their own results. A bytes object is written with latin1.
_GROWING = re.compile(
    rb"\nbytearray\n|\nencode\n(?=.*(?:X....|U.)(?:hex|base.?64|quopri|quoted.?printable|quotetabs|uu)(?:.?codec)?[q\x85-\x87r.])",
    re.DOTALL | re.IGNORECASE,
)


def check_pickle(path: Path) -> None:
    """Nothing, where torch can read the file with no more memory than the file is large.

    :raises CheckpointError: an archive whose parts are larger than itself, or a pickle that calls for more.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                parts = archive.infolist()
                promised = sum(part.file_size for part in parts)
                if promised > size:
                    raise CheckpointError(f"{path} is an archive of {size} bytes that would unpack to {promised}")
                pickles = [archive.read(part) for part in parts if part.filename.endswith(".pkl")]
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} is truncated, or was not written by torch.save ({type(error).__name__})"
            ) from error
        growing = any(_GROWING.search(text) for text in pickles)
    else:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            growing = _GROWING.search(content) is not None
    if growing:
        raise CheckpointError(
            f"{path} holds a pickle that makes buffers larger than itself, and is not opened; "
            "try: save model.state_dict() alone, or use safetensors"
        )


def check_safetensors(path: Path) -> None:
    """Nothing, where the header is of a size that a header has.

    :raises CheckpointError: a larger one, which would be millions of tensors.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_SAFETENSORS_HEADER < length <= path.stat().st_size:
        raise CheckpointError(f"{path} has a header of {length} bytes, and at most {MAX_SAFETENSORS_HEADER} are read")


def check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Nothing, where every tensor is plain numbers that the file does hold.

    :raises CheckpointError: a sparse, quantized or valueless tensor; one with a stride of 0, which repeats a few
        numbers many times; or a memory that is larger than the file.
    """
    for key, tensor in state.items():
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{path}: {one_short_line(key, 60)} is not a plain tensor with values")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {one_short_line(key, 60)} has {tensor.numel()} numbers, and the file does not hold as many"
            )
    held, size = size_of(state), path.stat().st_size
    if held > size:
        raise CheckpointError(f"{path} has {size} bytes, and its tensors would take {held}")


def size_of(state: Mapping[str, Tensor]) -> int:
    """The bytes of the memory that tensors share."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    return sum(storages.values())
