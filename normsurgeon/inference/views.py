"""Whatever a caller hands in as data → batches, pre-processed as each of the models wants them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.checks import check_at_least
from normsurgeon.data.batches import Batches, unpacked
from normsurgeon.data.label_ways import Labels, check_way
from normsurgeon.data.labels import Head
from normsurgeon.data.sources import ImageSource, open_source, with_labels
from normsurgeon.data.transforms import DataConfig
from normsurgeon.distributed import ALONE, Shard, gather
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.run import head_classes

Data = str | os.PathLike[str] | ImageSource | Iterable[Any]

View = tuple[tuple[Tensor, ...], Tensor | None]
"""The same images once per pre-processing (one or two tensors (N, C, H, W)), and their labels (N,) or None."""


@dataclass
class Views:
    """Batches of ``View``; ``total`` images (None: not known), and the names of those that could not be read.

    numbered    starts again and gives each batch with the number of its first image: among all of the processes' images
    repeatable  whether going through a second time gives the same again
    failure     what is wrong with images of which this process, of several, could read none
    config      the first pre-processing, where it is known
    """

    numbered: Callable[[], Iterator[tuple[int, View]]]
    total: int | None
    name: str
    skipped: list[str] = field(default_factory=list)
    repeatable: bool = True
    failure: Callable[[], DataError | None] = lambda: None
    config: DataConfig | None = None

    def __iter__(self) -> Iterator[View]:
        return (view for _, view in self.numbered())


def open_views(
    data: Data,
    models: Sequence[nn.Module],
    batch_size: int = 32,
    max_images: int | None = None,
    workers: int = 0,
    classifiers: bool = True,
    shard: Shard = ALONE,
    whole: bool = False,
    labels: Labels = "by-name",
    multiple: int = 1,
) -> Views:
    """Batches for one model, or for a model and its baseline.

    data        a data spec (see :func:`~normsurgeon.data.sources.open_source`), an ImageSource, or batches
                ``(images (N, C, H, W), labels (N,) or None)`` that are pre-processed already
    max_images  only that many: of a source, spread evenly over it; of batches, the first ones
    classifiers whether a model without a classifier is an error; else the labels are taken as the folders give them
    labels      where class numbers are from (see :func:`~normsurgeon.data.labels.class_numbers`); ``none``: there are
                none, whatever the data has
    shard       which part of the images this process takes
    whole       whether the batches must be those of one process, each as a whole; else smaller ones may keep all busy
    multiple    every batch but the last has a multiple of so many images, whatever the batch size, as long as images of
                ready-made batches have one shape

    :raises DataError: no images, or labels that the head cannot have.
    :raises UsageError: batches that are none.
    """
    named = isinstance(data, (str, os.PathLike))
    if isinstance(data, (str, os.PathLike)):
        data = open_source(data)
    if isinstance(data, ImageSource):
        unnumbered = data.labelled and data.class_names is not None and data.head is None and labels != "none"
        head = _head(models, classifiers) if unnumbered or (named and classifiers) else None
        data = with_labels(data, head, labels)
        if not whole and shard.world > 1 and batch_size > 0:
            few = max_images if data.streamed else min(max_images or len(data), len(data))
            batch_size = batch_size if few is None else max(1, min(batch_size, -(-few // shard.world)))
        batches = Batches(
            data,
            *configs_of(models),
            batch_size=batch_size if batch_size < 1 else -(-batch_size // multiple) * multiple,
            max_images=max_images,
            workers=workers,
            shard=shard,
        )
        return Views(
            batches.numbered,
            batches.total,
            data.name,
            batches.skipped,
            failure=lambda: batches.failure,
            config=configs_of(models)[0],
        )
    check_way(labels)
    check_at_least(1, max_images=max_images)
    once = iter(data) is data
    return Views(
        lambda: _ready_made(data, max_images, shard, whole, labels != "none", multiple),
        None if shard.world > 1 else max_images,
        f"{type(data).__name__} of batches",
        repeatable=not once,
    )


def no_images(views: Views) -> DataError:
    """What all processes raise where none found an image: what one of them found wrong with its own, if anything."""
    known = [failure for failure in gather(views.failure()) if failure is not None]
    return known[0] if known else DataError(f"there are no images in {views.name}; are the batches a used-up iterator?")


def configs_of(models: Sequence[nn.Module]) -> list[DataConfig]:
    """One pre-processing for both models where they agree, or where only one of them carries any."""
    knowing = [model for model in models if getattr(model, "pretrained_cfg", None)] or list(models[:1])
    configs = [DataConfig.of(model) for model in knowing]
    return configs if len(set(configs)) > 1 else configs[:1]


def _head(models: Sequence[nn.Module], needed: bool) -> Head | None:
    try:
        return Head.of(head_classes(models[0], configs_of(models)[0]), models[0])
    except UsageError:
        if needed:
            raise
        return None


def _ready_made(
    batches: Iterable[Any], limit: int | None, shard: Shard, whole: bool, labelled: bool, multiple: int
) -> Iterator[tuple[int, View]]:
    """This process's part of the first ``limit`` images: a piece of each batch, or whole batches in turn."""
    first = 0
    for number, (images, labels) in enumerate(_in_multiples(_first_images(batches, limit, labelled), multiple)):
        count = len(images)
        begin, end = 0, count
        if shard.world > 1 and not whole:
            begin, end = (rank * count // shard.world for rank in (shard.rank, shard.rank + 1))
        if (shard.has(number) or not whole) and (end > begin or shard.world == 1):
            if labels is not None and len(labels) == count:  # else it is for whoever uses them to say so
                labels = labels[begin:end]
            yield first + begin, ((images[begin:end],), labels)
        first += count


def _first_images(batches: Iterable[Any], limit: int | None, labelled: bool) -> Iterator[tuple[Any, Tensor | None]]:
    """The batches up to the first ``limit`` images."""
    first = 0
    for batch in batches:
        images, labels = unpacked(batch, first)
        left = None if limit is None else limit - first
        yield images[:left], labels[:left] if labelled and labels is not None else None
        first += len(images)
        if limit is not None and first >= limit:
            return


def _in_multiples(batches: Iterable[tuple[Any, Tensor | None]], multiple: int) -> Iterator[tuple[Any, Tensor | None]]:
    """The same images in batches of a multiple of so many; what cannot be joined to what comes next is a batch."""
    images: Any = None
    labels: Tensor | None = None
    for more, theirs in batches:
        if multiple == 1 or not _joinable(more, theirs):
            if images is not None:
                yield images, labels
                images = labels = None
            yield more, theirs
            continue
        if images is None:
            images, labels = more, theirs
        elif _kind(images, labels) == _kind(more, theirs):
            images = torch.cat([images, more])
            labels = None if labels is None or theirs is None else torch.cat([labels, theirs])
        else:
            yield images, labels
            images, labels = more, theirs
        if whole := len(images) // multiple * multiple:
            yield images[:whole], None if labels is None else labels[:whole]
            rest = len(images) > whole
            images, labels = (images[whole:], None if labels is None else labels[whole:]) if rest else (None, None)
    if images is not None:
        yield images, labels


def _joinable(images: Any, labels: Tensor | None) -> bool:
    return isinstance(images, Tensor) and (labels is None or (labels.ndim == 1 and len(labels) == len(images)))


def _kind(images: Tensor, labels: Tensor | None) -> tuple[Any, ...]:
    return images.shape[1:], images.dtype, images.device, None if labels is None else (labels.dtype, labels.device)
