"""Fashion-MNIST (Xiao, Rasul & Vollgraf, arXiv:1708.07747) from the files of a Debian package or of torchvision."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from normsurgeon.errors import DataError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLACES = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))
CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_PARTS = {"train": "train", "training": "train", "test": "t10k", "validation": "t10k", "val": "t10k"}


def fashion_mnist(split: str | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 28, 28) uint8 of 0 to 255, and labels (N,) of 0 to 9.

    split   ``train``: 60,000; ``test`` or ``validation``: 10,000; None: the test images, as of timm's data sets

    :raises DataError: when the files are nowhere, or damaged.
    :raises UsageError: another split.
    """
    part = _PARTS.get(split or "test")
    if part is None:
        raise UsageError(f"fashion-mnist has no split {split!r}; try train or test")
    return read_idx(_find(f"{part}-images-idx3-ubyte")), read_idx(_find(f"{part}-labels-idx1-ubyte")).astype(np.int64)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in a file of LeCun's IDX format of unsigned bytes, gzipped or not.

    :raises DataError: another kind of file, or one that was cut short.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); try installing it again") from error
    rank = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * rank], ">u4").astype(int)
    if not rank or len(shape) != rank or len(content) != 4 + 4 * rank + int(shape.prod()):
        raise DataError(f"{path} is truncated or no IDX file of bytes; try installing it again")
    return np.frombuffer(content[4 + 4 * rank :], np.uint8).reshape(shape)


def _find(name: str) -> Path:
    for folder in PLACES:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(
        f"Fashion-MNIST is in none of {', '.join(map(str, PLACES))}; try: apt install dataset-fashion-mnist, or "
        "torchvision.datasets.FashionMNIST('data', download=True)"
    )
