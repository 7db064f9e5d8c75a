"""Fashion-MNIST is read from IDX files, wherever they lie; damaged files are one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from normsurgeon.data import fashion
from normsurgeon.data.sources import open_source
from normsurgeon.errors import DataError, UsageError


def idx(array: np.ndarray) -> bytes:
    """LeCun's format, written out: magic, rank, big-endian sizes, bytes."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("t10k", 3)):
        images = random.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
        np.save(tmp_path / f"{part}.npy", images)
    monkeypatch.setattr(fashion, "PLACES", (tmp_path / "nowhere", tmp_path))
    return tmp_path


def test_images_and_labels_come_in_their_splits(files: Path) -> None:
    train, test = open_source("fashion-mnist", split="train"), open_source("fashion-mnist")
    assert (len(train), len(test)) == (6, 3)
    image, label = train[4]
    assert (image.size, label, train.class_names[label]) == ((28, 28), 4, "coat")
    assert np.array_equal(np.asarray(image), np.load(files / "train.npy")[4])


def test_bad_files_are_errors_of_one_line(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="fashion-mnist has no split 'dev'; try train or test"):
        open_source("fashion-mnist", split="dev")
    path = files / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="labels-idx1-ubyte is truncated or no IDX file of bytes; try installing"):
        open_source("fashion-mnist")
    monkeypatch.setattr(fashion, "PLACES", (files / "nowhere",))
    with pytest.raises(DataError, match=r"Fashion-MNIST is in none of .*; try: apt install dataset-fashion-mnist"):
        open_source("fashion-mnist")
