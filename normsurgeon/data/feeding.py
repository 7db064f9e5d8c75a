"""Training images, in an order that is a function of the seed, the epoch and the update alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from normsurgeon.calls import Call
from normsurgeon.data.augmentation import Augmentation
from normsurgeon.data.batches import check_finite, unpacked
from normsurgeon.data.seeding import SAMPLE, permutation, seed_everything
from normsurgeon.data.sources import ImageSource, nothing_readable
from normsurgeon.data.transforms import DataConfig, ToMode
from normsurgeon.distributed import ALONE, Shard
from normsurgeon.errors import DataError, UsageError

Batch = tuple[Tensor, Tensor | None, tuple[str, ...]]


def training_transform(config: DataConfig, augmentation: Augmentation, grey: bool = False) -> Any:
    """timm's training transform for a network's pre-processing; the plain one without ``augment``."""
    if not augmentation.augment:
        return config.transform()
    channels = config.input_size[0]
    hflip = augmentation.hflip if augmentation.hflip is not None else (0.0 if grey else 0.5)
    steps = create_transform(
        config.input_size,
        is_training=True,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=hflip,
        vflip=augmentation.vflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.aa,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        re_prob=augmentation.reprob,
    )
    config.transform()  # raises for channels that no image has
    return Compose([ToMode("L" if channels == 1 else "RGB"), steps])


class SourceSamples(Dataset[Any]):
    """A source's images under a random transform. For an image that cannot be read the next one stands in."""

    def __init__(self, source: ImageSource, transform: Any, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int | None, tuple[str, ...]]:
        epoch, index = key
        skipped: list[str] = []
        reason = ""
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            try:
                image, label = self.source[place]
            except DataError as error:
                skipped.append(self.source.name_of(place))
                reason = str(error)
                continue
            seed_everything(SAMPLE, self.seed, epoch, index)
            return self.transform(image), label, tuple(skipped)
        raise nothing_readable(self.source.name, len(self), reason)


class TensorSamples(Dataset[Any]):
    """The images of ready-made batches, one by one."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches: list[tuple[Any, Tensor | None]] = []
        for batch in batches:
            self.batches.append(unpacked(batch, sum(len(images) for images, _ in self.batches)))
        if any(isinstance(images, Call) for images, _ in self.batches):
            raise UsageError(
                "the batches hold dicts or tuples of a model's arguments, and training takes images; "
                "give batches of tensors (images (N, C, H, W), labels (N,) or None)"
            )
        if len({images.shape[1:] for images, _ in self.batches}) > 1:
            raise UsageError("the batches hold images of several sizes; training mixes them, and takes one size")
        if len({labels is None for _, labels in self.batches}) > 1:
            raise DataError("some batches have labels and others have none; try one data set at a time")
        self.places = [(b, row) for b, (images, _) in enumerate(self.batches) for row in range(len(images))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int | None, tuple[str, ...]]:
        batch, row = self.places[key[1]]
        images, labels = self.batches[batch]
        return images[row], None if labels is None else int(labels[row]), ()


class DatasetSamples(Dataset[Any]):
    """The items (image (C, H, W), label or None) of somebody's dataset, each drawn with its own seed."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int | None, tuple[str, ...]]:
        epoch, index = key
        seed_everything(SAMPLE, self.seed, epoch, index)
        item = self.dataset[index]
        image, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        if not isinstance(image, Tensor):
            raise UsageError(
                f"the data set gives a {type(image).__name__} as image {index}; give it a transform that makes tensors"
            )
        check_finite(image[None], index)
        return image, None if label is None else int(label), ()


def _collate(samples: list[Any]) -> Batch:
    images, labels, skipped = zip(*samples, strict=True)
    known = None if any(label is None for label in labels) else torch.tensor(labels, dtype=torch.int64)
    return torch.stack(images), known, tuple(name for names in skipped for name in names)


@dataclass(frozen=True)
class Feed:
    """The images of a run, update by update.

    batch_size   images an update, over all processes
    shard        which equal part of them this process takes
    pinned       whether batches are put where a GPU fetches them faster
    """

    samples: Any
    name: str
    labelled: bool
    batch_size: int
    seed: int
    shard: Shard = ALONE
    workers: int = 0
    pinned: bool = False

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.samples)

    @property
    def per_epoch(self) -> int:
        """Updates that one pass takes; what does not fill a batch waits for another pass, in another order."""
        return self.images // self.batch_size

    def keys(self, step: int) -> list[tuple[int, int]]:
        """(epoch, image) of each image of this process's part of update ``step``."""
        epoch, batch = divmod(step, self.per_epoch)
        order = permutation(self.images, self.seed, epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
        rank, size = self.shard.rank, self.batch_size // self.shard.world
        return [(epoch, int(index)) for index in order[rank * size : (rank + 1) * size]]

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """This process's parts of updates ``first`` to ``last``: (images, labels or None, names left out)."""
        return iter(
            DataLoader(
                self.samples,
                batch_sampler=_Steps(self, first, last),
                num_workers=self.workers,
                collate_fn=_collate,
                pin_memory=self.pinned,
                generator=torch.Generator(),  # else its seed is drawn from the random state
            )
        )


class _Steps:
    """The keys of one update after the other, the permutation of an epoch made once."""

    def __init__(self, feed: Feed, first: int, last: int) -> None:
        self.feed, self.first, self.last = feed, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.last):
            yield self.feed.keys(step)


def make_feed(
    data: Any,
    config: DataConfig,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    shard: Shard = ALONE,
    workers: int = 0,
    pinned: bool = False,
) -> Feed:
    """A feed of a source's images, or of ready-made batches.

    :raises DataError: nothing to train on, or a stream.
    :raises UsageError: a batch that the processes cannot share equally.
    """
    if isinstance(data, ImageSource):
        if data.streamed:
            raise DataError(
                f"{data.name} is a stream: its images have no numbers to shuffle; try a folder or a torch/… data set"
            )
        if not len(data):
            raise DataError(f"{data.name} has no images to train on; try another split")
        first = next(iter(data.samples()))[0]
        samples: Any = SourceSamples(data, training_transform(config, augmentation, first.mode == "L"), seed)
        name, labelled = data.name, data.labelled
    elif isinstance(data, Dataset):
        name = type(data).__name__
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise DataError(f"the data set {name} is a stream, and training shuffles; try one with a length")
        if not len(data):
            raise DataError(f"the data set {name} is empty; try another split")
        samples = DatasetSamples(data, seed)
        labelled = samples[0, 0][1] is not None
    else:
        samples = TensorSamples(data)
        name = "the batches"
        if not len(samples):
            raise DataError("there are no images to train on; the batches are empty (was an iterator used up before?)")
        labelled = samples.batches[0][1] is not None
    size, world = min(batch_size, len(samples)), shard.world
    if size % world:
        if size == batch_size:
            raise UsageError(
                f"batch_size={size} cannot be shared by {world} processes; try {size - size % world or world}"
            )
        size -= size % world
    if size < world:
        raise DataError(f"{name} has {len(samples)} images, too few for {world} processes")
    return Feed(samples, name, labelled, size, seed, shard, workers, pinned)
