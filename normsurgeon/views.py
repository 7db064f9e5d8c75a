"""Whatever a caller hands in as data → batches, pre-processed as each of the models wants them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from normsurgeon.data.batches import Batches, unpacked
from normsurgeon.data.preprocessing import DataConfig
from normsurgeon.data.sources import ImageSource, open_source
from normsurgeon.errors import UsageError
from normsurgeon.inference import head_classes

Data = str | os.PathLike[str] | ImageSource | Iterable[Any]

View = tuple[tuple[Tensor, ...], Tensor | None]
"""The same images once per pre-processing (one or two tensors (N, C, H, W)), and their labels (N,) or None."""


@dataclass
class Views:
    """Batches of ``View``; ``total`` images (None: not known), and the names of those that could not be read.

    ``repeatable`` says whether going through a second time gives the same again.
    """

    batches: Iterable[View]
    total: int | None
    name: str
    skipped: list[str] = field(default_factory=list)
    repeatable: bool = True

    def __iter__(self) -> Iterator[View]:
        return iter(self.batches)


class _Repeated:
    """Calls a function for a new iterator each time."""

    def __init__(self, make: Any):
        self.make = make

    def __iter__(self) -> Iterator[View]:
        return iter(self.make())


def open_views(
    data: Data,
    models: Sequence[nn.Module],
    batch_size: int = 32,
    max_images: int | None = None,
    workers: int = 0,
    classifiers: bool = True,
) -> Views:
    """Batches for one model, or for a model and its baseline.

    data        a data spec (see :func:`~normsurgeon.data.sources.open_source`), an ImageSource, or batches
                ``(images (N, C, H, W), labels (N,) or None)`` that are pre-processed already
    max_images  only so many: of a source, spread evenly over it; of batches, the first ones
    classifiers whether a model without a classifier is an error; else the labels are taken as the folders give them

    :raises DataError: no images, or labels that the head cannot have.
    :raises UsageError: batches that are none.
    """
    if isinstance(data, (str, os.PathLike)):
        data = open_source(data, classes=_classes(models, classifiers))
    if isinstance(data, ImageSource):
        batches = Batches(data, *configs_of(models), batch_size=batch_size, max_images=max_images, workers=workers)
        return Views(_Repeated(batches.views), batches.total, data.name, batches.skipped)
    if max_images is not None and max_images < 1:
        raise UsageError(f"max_images={max_images} must be at least 1, or None for all images")
    once = iter(data) is data
    ready = _Repeated(lambda: _ready_made(data, max_images))
    return Views(ready, max_images, f"{type(data).__name__} of batches", repeatable=not once)


def configs_of(models: Sequence[nn.Module]) -> list[DataConfig]:
    """One pre-processing for both models where they agree, or where only one of them carries any."""
    knowing = [model for model in models if getattr(model, "pretrained_cfg", None)] or list(models[:1])
    configs = [DataConfig.of(model) for model in knowing]
    return configs if len(set(configs)) > 1 else configs[:1]


def _classes(models: Sequence[nn.Module], needed: bool) -> int | None:
    try:
        return head_classes(models[0], configs_of(models)[0])
    except UsageError:
        if needed:
            raise
        return None


def _ready_made(batches: Iterable[Any], limit: int | None) -> Iterator[View]:
    left = limit
    for batch in batches:
        images, labels = unpacked(batch)
        images, labels = images[:left], labels[:left] if labels is not None else None
        yield (images,), labels
        if left is not None:
            left -= len(images)
            if left <= 0:
                return
