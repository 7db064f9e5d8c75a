"""Training and held-out images: data that comes in splits, and a source that is cut in two by a seed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from normsurgeon.data.label_ways import Labels
from normsurgeon.data.labels import Head
from normsurgeon.data.sources import ImageSource, open_source, with_labels
from normsurgeon.errors import DataError

TRAIN, HELD_OUT = ("train", "training"), ("validation", "val", "valid", "test")


def open_split(spec: Any, classes: int | Head | None, training: bool, labels: Labels = "by-name") -> Any:
    """What a data spec stands for in training or in validation, numbered for a head; batches pass through.

    Of data that comes in splits, the training split or the held-out one: of digits and timm's datasets, and of a
    folder with folders called ``train`` and ``val`` (``validation``, ``valid``, ``test``).
    """
    if not isinstance(spec, (str, os.PathLike)):
        if isinstance(spec, Dataset) and not isinstance(spec, ImageSource):
            return spec if training else DataLoader(spec, batch_size=64)
        return with_labels(spec, classes, labels) if isinstance(spec, ImageSource) else list(spec)
    text = os.fspath(spec)
    splits = TRAIN if training else HELD_OUT
    if os.path.isdir(text):
        split = next((name for name in splits if os.path.isdir(os.path.join(text, name))), None)
        return open_source(spec, classes=classes, labels=labels, split=split)
    in_splits = spec != "demo"
    return open_source(spec, classes=classes, labels=labels, split=splits[0] if in_splits else None)


@dataclass(frozen=True)
class _Chosen:
    """Some samples of a reader, in the given order."""

    reader: Any
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return self.reader[self.numbers[index]]

    def name_of(self, index: int) -> str:
        """What the reader calls it."""
        name = getattr(self.reader, "name_of", None)
        return name(self.numbers[index]) if name else f"number {self.numbers[index]}"


def split_numbers(count: int, second: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """0 to ``count`` - 1 in two parts, in ascending order, the second of the given size: a function of the seed alone.

    >>> first, second = split_numbers(5, 2, seed=0)
    >>> len(first), len(second), sorted(first + second)
    (3, 2, [0, 1, 2, 3, 4])
    """
    order = np.random.default_rng(seed).permutation(count)
    return tuple(sorted(order[second:].tolist())), tuple(sorted(order[:second].tolist()))


def split_source(source: ImageSource, second: int, seed: int = 0) -> tuple[ImageSource, ImageSource]:
    """A source in two parts of which the second holds ``second`` images, chosen at random by the seed.

    :raises DataError: a stream, or a source that is too small.

    >>> from normsurgeon.data.sources import open_source
    >>> fit, judge = split_source(open_source("digits"), 200)
    >>> len(fit), len(judge)
    (1597, 200)
    """
    if source.streamed:
        raise DataError(f"{source.name} is a stream: its images have no numbers to choose by; try a folder")
    if not 0 < second < len(source):
        raise DataError(f"{source.name} has {len(source)} images, which cannot be cut into {second} and others")
    first_numbers, second_numbers = split_numbers(len(source), second, seed)
    return (
        replace(source, reader=_Chosen(source.reader, first_numbers)),
        replace(source, reader=_Chosen(source.reader, second_numbers)),
    )
