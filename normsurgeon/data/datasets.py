"""A data set's training and held-out images: chosen by a fixed seed, pre-processed, held in memory if they fit."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normsurgeon.data.augmentation import Augmentation
from normsurgeon.data.feeding import training_transform
from normsurgeon.data.preprocessing import MAX_IMAGES, Preprocessing, fit
from normsurgeon.data.sources import ImageSource, open_source
from normsurgeon.data.splitting import open_split, split_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError, UsageError

HELD_OUT = 0.2
"""Share of a folder without splits that is only tested on."""
MAX_BYTES = 1 << 30
"""Images that take more than this as float32 are read again in every pass."""
TESTED_AT_ONCE = 250


@dataclass(frozen=True)
class DataSet:
    """Both splits of a data set, before any network is known.

    classes   how many there are; ``channels``: 1 for grey images, else 3
    """

    name: str
    train: ImageSource
    test: ImageSource
    classes: int
    channels: int

    def check_batch(self, batch_size: int) -> None:
        """:raises UsageError: if no batch can be filled: a smaller one would have another batch's learning rate."""
        if batch_size > len(self.train):
            raise UsageError(
                f"batch_size={batch_size} is more than the {len(self.train)} training images of {self.name}; "
                "try a smaller batch"
            )

    @property
    def chance(self) -> float | None:
        """The share of the commonest class among the test images: what is right without looking. None if only reading
        all of them would tell."""
        known = self.test.known_labels
        return max(Counter(known).values()) / len(known) if known else None

    def fingerprint(self) -> str:
        """The same for the same images by number, name and class names; contents are not read."""
        hashed = hashlib.sha256(repr((self.classes, self.channels, self.train.class_names)).encode())
        for source in (self.train, self.test):
            for index in range(len(source)):
                hashed.update(source.name_of(index).encode() + b"\0")
        return hashed.hexdigest()[:16]


@lru_cache(maxsize=8)
def open_data(name: str, train_images: int | None = None, test_images: int | None = None) -> DataSet:
    """The training and the test images of a data spec, at most that many of each, the same ones every time.

    Data that comes in splits gives its own; of a folder of class folders a fifth is held out.

    :raises DataError: if there is no such data, or the images have no labels.

    >>> data = open_data("digits", 100)
    >>> len(data.train), len(data.test), data.classes, data.channels
    (100, 360, 10, 1)
    """
    train = open_split(name, None, training=True)
    test = open_split(name, None, training=False)
    if not train.labelled:
        raise DataError(f"the images of {name} have no labels, and a study compares accuracies; try class folders")
    if train.streamed or test.streamed:
        raise DataError(f"{name} is a stream, and a study shuffles; try a folder, or a torch/… data set")
    same = len(train) == len(test) and all(train.name_of(i) == test.name_of(i) for i in (0, len(train) - 1))
    if os.path.isdir(name) and same:
        whole = open_source(name)
        train, test = split_source(whole, max(1, round(HELD_OUT * len(whole))), seed=0)
    if train.class_names and test.class_names and train.class_names != test.class_names:
        missing = sorted(set(train.class_names) ^ set(test.class_names))
        raise DataError(
            f"{name} has other classes to train on than to test on ({', '.join(missing[:5])} in one of them alone); "
            "give both the same class folders"
        )
    classes = len(train.class_names) if train.class_names else 1 + max(_labels(train))
    if train_images is not None and train_images < len(train):
        train = split_source(train, train_images, seed=1)[1]
    if test_images is not None and test_images < len(test):
        test = split_source(test, test_images, seed=2)[1]
    first, _ = next(train.samples())
    return DataSet(name, train, test, classes, 1 if first.mode == "L" else 3)


def _labels(source: ImageSource) -> Iterator[int]:
    known = source.known_labels
    return iter(known) if known is not None else (int(label or 0) for _, label in source.samples())


class _Lazy(Dataset[Any]):
    """Images that are read, transformed and pre-processed as they are needed."""

    def __init__(self, source: ImageSource, transform: Callable[[Any], Tensor], preprocessing: Preprocessing) -> None:
        self.source, self.transform, self.preprocessing = source, transform, preprocessing

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return self.preprocessing(self.transform(image)[None])[0], int(label or 0)


def prepare(data: DataSet, config: DataConfig, preprocessing: str, augmentation: Augmentation) -> tuple[Any, Any]:
    """Both splits, pre-processed as fitted on the training images: batches (images, labels) in memory, or a Dataset.

    config    of the network: its input size, interpolation and crop; ``preprocessing="model"`` takes its mean and std

    :raises UsageError: if the pre-processing cannot take these images (ZCA of large ones).
    :raises DataError: if an image cannot be read.
    """
    plain = replace(config, mean=(0.0,) * config.input_size[0], std=(1.0,) * config.input_size[0])
    fitted = _fitted(data, plain, (config.mean, config.std) if preprocessing == "model" else None, preprocessing)
    test = _whole(data.test, plain, fitted)
    test = DataLoader(test, batch_size=64) if isinstance(test, _Lazy) else test
    if not augmentation.augment:
        return _whole(data.train, plain, fitted), test
    return _Lazy(data.train, training_transform(plain, augmentation, grey=data.channels == 1), fitted), test


def _whole(source: ImageSource, config: DataConfig, fitted: Preprocessing) -> Any:
    """All images in memory if they fit; else a Dataset that reads them in every pass."""
    channels, height, width = config.input_size
    if 4 * channels * height * width * len(source) <= MAX_BYTES:
        return _held(source, config, fitted)
    return _Lazy(source, config.transform(), fitted)


@lru_cache(maxsize=4)
def _held(source: ImageSource, config: DataConfig, fitted: Preprocessing) -> list[tuple[Tensor, Tensor]]:
    transform, batches = config.transform(), []
    for first in range(0, len(source), TESTED_AT_ONCE):
        samples = [source[i] for i in range(first, min(first + TESTED_AT_ONCE, len(source)))]
        images = torch.stack([transform(image) for image, _ in samples])
        batches.append((fitted(images), torch.tensor([int(label or 0) for _, label in samples])))
    return batches


@lru_cache(maxsize=8)
def _fitted(data: DataSet, config: DataConfig, own: Any, name: str) -> Preprocessing:
    transform = config.transform()
    numbers = range(0, len(data.train), -(-len(data.train) // MAX_IMAGES))  # spread evenly over the split

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(numbers), TESTED_AT_ONCE):
            chosen = numbers[first : first + TESTED_AT_ONCE]
            yield torch.stack([transform(data.train[i][0]) for i in chosen])

    return fit(name, batches(), own=own)


def clear_caches() -> None:
    """Free the images in memory, and read folders again when they are next opened."""
    for cached in (open_data, _held, _fitted):
        cached.cache_clear()
