"""Samples → batches of tensors, images that cannot be read left out and remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from normsurgeon._util.checks import check_at_least
from normsurgeon.calls import Call, as_call
from normsurgeon.data.sources import ImageSource, Sample, nothing_readable
from normsurgeon.data.transforms import DataConfig
from normsurgeon.distributed import ALONE, Shard
from normsurgeon.errors import DataError, UsageError


@dataclass(frozen=True)
class _Unreadable:
    name: str
    reason: str


class _Prepared(Dataset[Any]):
    """Samples of a source as (one tensor a transform, label), or as a note that the image cannot be read."""

    def __init__(self, source: ImageSource, transforms: list[Callable[[Image.Image], torch.Tensor]]):
        self.source = source
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.prepare(self.source[index])
        except DataError as error:
            return _Unreadable(self.source.name_of(index), str(error))

    def prepare(self, sample: Sample) -> Any:
        image, label = sample
        return [transform(image) for transform in self.transforms], label


class _PreparedStream(IterableDataset[Any]):
    def __init__(self, source: ImageSource, transforms: list[Any], limit: int | None, own: Callable[[int], bool]):
        self.source = source
        self.prepared = _Prepared(source, transforms)
        self.limit = limit
        self.own = own

    def __iter__(self) -> Iterator[Any]:
        for count, sample in enumerate(self.source):
            if count == self.limit:
                return
            if self.own(count):
                try:
                    yield self.prepared.prepare(sample)
                except DataError as error:  # a kind of pixel without a rule
                    yield _Unreadable(self.source.name_of(count), str(error))


def unpacked(batch: Any, first: int = 0) -> tuple[Any, torch.Tensor | None]:
    """A ready-made batch as (images (N, …), labels (N,) or None); images alone are a batch, too.

    first  the number of its first image, for messages

    In place of the images there may be what else the model takes, as a Call: of a tuple of tensors as positional, of a
    dict as keyword arguments. A dict alone is a batch, too; its ``labels`` are the labels.

    :raises UsageError: something else.
    :raises DataError: an image with values that are not finite: one makes a network's statistics nan. (Infinities among
        a Call's tensors are masks.)

    >>> unpacked([torch.zeros(2, 3), torch.tensor([0, 1])])[1].tolist()
    [0, 1]
    >>> unpacked({"pixel_values": torch.zeros(2, 3), "labels": torch.tensor([0, 1])})[0].shape
    (2, 3)
    """
    if isinstance(batch, Mapping):
        given = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch.get("labels")
        check_finite(given, first)
        return Call((), given), labels if isinstance(labels, torch.Tensor) and labels.ndim == 1 else None
    images, labels = (*batch, None)[:2] if isinstance(batch, (tuple, list)) else (batch, None)
    if isinstance(images, (tuple, Mapping)) and (labels is None or isinstance(labels, torch.Tensor)):
        check_finite(images, first)
        return as_call(images), labels
    known = labels is None or isinstance(labels, torch.Tensor)
    if not isinstance(images, torch.Tensor) or images.ndim < 2 or not known:
        raise UsageError(
            f"a batch is {type(batch).__name__} of {type(images).__name__} and {type(labels).__name__}; "
            "give batches of tensors (images (N, C, H, W), labels (N,) or None)"
        )
    check_finite(images, first)
    return images, labels


def check_finite(images: Any, first: int) -> None:
    """Whether every image is finite, of a tensor (N, …) or of what else a model takes; ``first`` is the first's number.

    :raises DataError: one is not.
    """
    if isinstance(images, (tuple, Mapping)):
        parts = images.values() if isinstance(images, Mapping) else images
        fine = [~part.isnan() for part in parts if isinstance(part, torch.Tensor) and part.ndim > 1]
    else:
        fine = [images.isfinite()]
    for part in fine:
        rows = part.flatten(1).all(dim=1)
        if not rows.all():
            number = first + int(rows.logical_not().nonzero()[0])
            raise DataError(
                f"image {number} of the batches (counted from 0) holds values that are not finite; try leaving it out"
            )


def _as_they_are(samples: list[Any]) -> list[Any]:
    return samples


class Batches:
    """A source's images as batches ``(images (N, C, H, W), labels (N,) int64 or None)``.

    source      what to read
    configs     one pre-processing, or several: ``views()`` then yields each image once per configuration
    batch_size  images a batch; fewer in the last one, and where images cannot be read
    max_images  take only that many, spread evenly over the source: its first ones are of its first classes
    workers     processes that decode; 0: this one
    shard       which of the batches to take: numbers ``rank``, ``rank + world``, … of those that one process makes

    ``skipped`` holds the names of the images that the last iteration could not read. ``failure`` is the error of a
    last iteration that found none: one of several processes leaves it to whoever knows what the others found.

    :raises DataError: while iterating alone, when there is no image that can be read.

    >>> from normsurgeon.data.sources import open_source
    >>> images, labels = next(iter(Batches(open_source("digits"), DataConfig((3, 32, 32)), batch_size=4)))
    >>> tuple(images.shape), labels.tolist()
    ((4, 3, 32, 32), [0, 1, 2, 3])
    """

    def __init__(
        self,
        source: ImageSource,
        *configs: DataConfig,
        batch_size: int = 32,
        max_images: int | None = None,
        workers: int = 0,
        shard: Shard = ALONE,
    ):
        check_at_least(1, batch_size=batch_size, max_images=max_images)
        check_at_least(0, workers=workers)
        self.source = source
        self.batch_size = batch_size
        self.max_images = max_images
        self.workers = workers
        self.shard = shard
        self.skipped: list[str] = []
        self.failure: DataError | None = None
        self._transforms = [config.transform() for config in configs or (DataConfig(),)]

    @property
    def total(self) -> int | None:
        """How many images will be tried, by this process; None for a stream of unknown length."""
        count = self._count
        return count if count is None or self.shard.world == 1 else sum(map(self._own, range(count)))

    @property
    def _count(self) -> int | None:
        """How many images all processes will try."""
        if self.source.streamed:
            return self.max_images
        count = len(self.source)
        return count if self.max_images is None else min(count, self.max_images)

    def _own(self, number: int) -> bool:
        """Whether this process's share has an image."""
        return self.shard.has(number // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for views, labels in self.views():
            yield views[0], labels

    def views(self) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        """Batches as ``(one tensor for each configuration, labels)``."""
        for _, view in self.numbered():
            yield view

    def numbered(self) -> Iterator[tuple[int, tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]]:
        """``views()``, each with the number of its first image among those of all processes, unreadable ones too."""
        self.skipped.clear()
        self.failure = None
        tried, reason, read = 0, "there is none", 0
        for batch, samples in enumerate(self._loader()):
            first = (batch * self.shard.world + self.shard.rank) * self.batch_size
            good = [sample for sample in samples if not isinstance(sample, _Unreadable)]
            bad = [sample for sample in samples if isinstance(sample, _Unreadable)]
            tried, read = tried + len(samples), read + len(good)
            self.skipped += [sample.name for sample in bad]
            reason = bad[-1].reason if bad else reason
            if good:
                views, labels = zip(*good, strict=True)
                stacked = tuple(torch.stack(view) for view in zip(*views, strict=True))
                unlabelled = any(label is None for label in labels)
                yield first, (stacked, None if unlabelled else torch.tensor(labels, dtype=torch.int64))
        if not read:
            tried = tried if self.shard.world == 1 else self._count or tried
            self.failure = nothing_readable(self.source.name, tried, reason)
            if self.shard.world == 1:
                raise self.failure

    def _loader(self) -> DataLoader[Any]:
        if self.source.streamed:
            stream = _PreparedStream(self.source, self._transforms, self.max_images, self._own)
            return DataLoader(stream, self.batch_size, collate_fn=_as_they_are, generator=torch.Generator())
        count, take = len(self.source), self._count or 0
        return DataLoader(
            _Prepared(self.source, self._transforms),
            self.batch_size,
            sampler=[number * count // take for number in range(take) if self._own(number)],
            num_workers=self.workers,
            collate_fn=_as_they_are,
            generator=torch.Generator(),  # else its seed is drawn from the caller's random state
        )
