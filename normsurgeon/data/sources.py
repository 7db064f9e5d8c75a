"""Data specs → a source of samples: a folder, images that ship in a dependency, or a timm dataset."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder

from normsurgeon._util.one_line import one_line
from normsurgeon.data.demo_images import digits, photographs
from normsurgeon.data.fashion import CLASSES, fashion_mnist
from normsurgeon.data.folders import image_endings, images_of_classes, leads_nowhere, listing
from normsurgeon.data.images import read_image
from normsurgeon.data.label_ways import Labels, check_way
from normsurgeon.data.labels import Head, class_numbers
from normsurgeon.data.readers import Arrays, Files, Indexed, Sample, Stream
from normsurgeon.errors import DataError, UsageError

FORMS = (
    "a data set is a folder of class folders, a folder of images, demo, digits, "
    "fashion-mnist, or a timm dataset name such as torch/cifar10"
)

_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_SPLITS = {"train", "training", "val", "valid", "validation", "eval", "evaluation", "test"}


@dataclass(frozen=True, eq=False)
class ImageSource(Dataset[Sample]):
    """Images with labels, or without, in a fixed order.

    ``source[i]`` decodes one image by the rules of :func:`~normsurgeon.data.images.plain_image` (8 bits, L or RGB,
    upright; those of a stream are as its library gives them), and gives ``(image, label or None)``; it raises a
    DataError that names an image that cannot be decoded. Iterating leaves those out.

    name         as the user wrote it
    reader       where the samples come from (one of the small classes of ``readers``); its labels are places among the
                 class names
    labelled     whether the samples carry class numbers
    class_names  the folders' names, in the order of the folders; None where there are none
    own_order    whether that order is a published data set's own
    numbers      the class number of each of the names in the head of ``head`` classes; None: its place
    head         how many classes the head has that the labels are numbered for; None: not known
    """

    name: str
    reader: Any
    labelled: bool
    class_names: tuple[str, ...] | None = None
    own_order: bool = False
    numbers: tuple[int, ...] | None = None
    head: int | None = None

    @property
    def streamed(self) -> bool:
        """Whether samples come one after the other only: no length to rely on, and no ``source[i]``."""
        return not hasattr(self.reader, "__getitem__")

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Sample:
        if self.streamed:
            raise DataError(f"{self.name} is a stream: its samples have no numbers; try iterating over it")
        return self._numbered(self.reader[index])

    def _numbered(self, sample: Sample) -> Sample:
        image, place = sample
        return image, None if place is None or not self.labelled else self._number(place)

    def _number(self, place: int) -> int:
        return place if self.numbers is None else self.numbers[place]

    @property
    def known_labels(self) -> list[int] | None:
        """The labels, where they are known without reading images."""
        places = getattr(self.reader, "labels", None)
        return None if places is None or not self.labelled else [self._number(int(place)) for place in places]

    def __iter__(self) -> Iterator[Sample]:
        return self.samples()

    def samples(self, skipped: list[str] | None = None) -> Iterator[Sample]:
        """Every sample that can be decoded; the names of the others are added to ``skipped``.

        :raises DataError: when there are images and none of them can be decoded.
        """
        skipped = [] if skipped is None else skipped
        if self.streamed:
            yield from map(self._numbered, self.reader)
            return
        read, reason = 0, "it is empty"
        for index in range(len(self)):
            try:
                sample = self[index]
            except DataError as error:
                skipped.append(self.name_of(index))
                reason = str(error)
                continue
            read += 1
            yield sample
        if not read:
            raise nothing_readable(self.name, len(self), reason)

    def name_of(self, index: int) -> str:
        """What to call one sample: its file's path below the folder, or its number."""
        name = getattr(self.reader, "name_of", None)
        return name(index) if name else f"{self.name}[{index}]"


def open_source(
    spec: str | os.PathLike[str],
    *,
    classes: int | Head | None = None,
    labels: Labels = "by-name",
    split: str | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> ImageSource:
    """The images that a data spec stands for.

    spec      ``demo`` (photographs, no labels), ``digits``, ``fashion-mnist``, an existing folder of class folders,
              an existing folder of images (no labels), or a timm dataset name (``torch/cifar10``, ``hfds/…``, …).
              A folder that is called demo or digits is given as ``./demo``, or as a Path.
    classes   how many classes the network's head has, or a Head, which also knows their names: classes are numbered
              for it, see :func:`~normsurgeon.data.labels.class_numbers`
    labels    ``by-name``, ``by-position`` (whatever the network's classes are called), or ``none``
    split     ``train``, ``validation`` …: of a timm dataset (validation if not given), of the digits, or the
              sub-folder of that name
    root      where a timm dataset lies; for ``torch/…`` the default is ``./data``
    download  whether a timm dataset that is not there may be fetched

    :raises DataError: no such folder or dataset, nothing in it, or labels that the head cannot have.

    >>> source = open_source("digits")
    >>> len(source), source[0][0].size, source[0][1]
    (1797, (8, 8), 0)
    """
    return with_labels(_open(spec, split, root, download), classes, labels)


def with_labels(source: ImageSource, head: int | Head | None, labels: Labels) -> ImageSource:
    """The source with its classes numbered for a head, if they are not yet; without labels, if ``labels`` is ``none``.

    :raises DataError: classes that are not the head's.
    """
    check_way(labels)
    if labels == "none":
        return replace(source, labelled=False)
    if head is None or source.class_names is None or not source.labelled:
        return source
    classes = head if isinstance(head, int) else head.classes
    if source.head == classes and labels == "by-name":
        return source  # numbered already, perhaps in a way that the caller chose
    numbers = class_numbers(source.class_names, head, source.name, labels, source.own_order)
    return replace(source, numbers=tuple(numbers), head=classes)


def _open(
    spec: str | os.PathLike[str], split: str | None, root: str | os.PathLike[str] | None, download: bool
) -> ImageSource:
    """A source whose classes are numbered in their own order."""
    text = os.fspath(spec)
    if not text:  # a variable of a shell that was not set; as a path it would be the current folder
        raise DataError(f"there is no folder {text!r}; {FORMS}")
    if spec == "demo":
        paths = photographs()
        return ImageSource(text, Files([str(path) for path in paths], None, None), labelled=False)
    if spec == "digits":
        return ImageSource(text, Arrays(*digits(split)), True, tuple("0123456789"), own_order=True)
    if spec == "fashion-mnist":
        return ImageSource(text, Arrays(*fashion_mnist(split)), True, CLASSES, own_order=True)
    path = Path(text).expanduser()
    if path.is_dir():
        if split is not None and not (path / split).is_dir():
            raise UsageError(f"{text} has no folder {split}; leave out split={split!r}, or try one of its folders")
        return _open_folder(path / split if split else path, text)
    if path.exists():
        raise DataError(f"{text} is a file; try the folder that it is in: {FORMS}")
    if text.partition("/")[0].lower() in _PREFIXES and not isinstance(spec, os.PathLike):
        return _open_dataset(text, root, split or "validation", download)
    raise DataError(f"there is no folder {text}; {FORMS}")


def class_folders(folder: str | os.PathLike[str]) -> list[str]:
    """The names of a folder's sub-folders, in the order in which ``open_source`` numbers them.

    :raises DataError: no such folder, no folders in it, or folders that are splits.
    """
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder {folder}; give the folder that holds a folder for each class")
    loose, folders = listing(folder)
    _check_links(loose)
    names = [os.path.basename(path) for path in folders]
    if not names:
        raise DataError(f"{folder} holds no folders; give the folder that holds a folder for each class")
    if all(name.lower() in _SPLITS for name in names):
        raise DataError(f"the folders of {folder} are splits, not classes; try {os.path.join(folder, names[0])}")
    return names


def nothing_readable(name: str, count: int, reason: str) -> DataError:
    """The error for a source of ``count`` images of which none can be decoded; ``reason`` is the last's."""
    return DataError(f"none of the {count} images of {name} can be read; the last one: {reason}")


def _open_folder(path: Path, name: str) -> ImageSource:
    loose, folders = listing(path)
    class_names = [os.path.basename(folder) for folder in folders]
    found = images_of_classes(path, folders)
    if not any(found.values()):
        if not loose:
            raise DataError(f"{name} holds no images ({', '.join(sorted(image_endings()))}); {FORMS}")
        return ImageSource(name, Files(loose, None, str(path)), labelled=False)
    _check_links(loose)
    if loose:
        raise DataError(
            f"{name} holds both images ({os.path.basename(loose[0])}) and folders of images "
            f"({class_names[0]}); try moving the images into a class folder, or elsewhere"
        )
    if all(folder.lower() in _SPLITS for folder in class_names):
        best = max(class_names, key=lambda folder: ("train" not in folder.lower(), len(found[folder])))
        raise DataError(f"the folders of {name} are splits, not classes; try {os.path.join(name, best)}")
    # An empty folder keeps its number: the numbers of the others must not depend on which files have arrived.
    pairs = [(p, place) for place, folder in enumerate(class_names) for p in found[folder]]
    files = Files([p for p, _ in pairs], [place for _, place in pairs], str(path))
    return ImageSource(name, files, True, tuple(class_names))


def _check_links(loose: list[str]) -> None:
    """Whether none of what lies beside class folders is a link that should lead to another."""
    for path in filter(leads_nowhere, loose):
        raise DataError(
            f"{path} is a link that leads nowhere: were it a class folder, the classes after it would get wrong "
            "numbers; try repairing or removing it"
        )


def _open_dataset(name: str, root: str | os.PathLike[str] | None, split: str, download: bool) -> ImageSource:
    prefix = name.partition("/")[0].lower()
    where = os.fspath(root) if root is not None else ("data" if prefix == "torch" else None)
    try:
        with redirect_stdout(sys.stderr):  # readers print, and standard output belongs to --json
            dataset = create_dataset(name, root=where, split=split, download=download)
            if isinstance(dataset, DatasetFolder):
                dataset.loader = read_image  # its own clips 16 bits, and is silent about transparency
            reader = getattr(dataset, "reader", dataset)  # timm's own dataset reads the next image for a broken one
            if not hasattr(reader, "__getitem__"):
                return ImageSource(name, Stream(name, dataset), labelled=True)
            if not len(reader):
                raise DataError(f"{name} (split {split}) is empty; try another split")
            source = ImageSource(name, Indexed(name, reader), labelled=True)
            first = next(islice(source.samples(), 1))
    except DataError:
        raise
    except Exception as error:  # every library behind timm's readers has exceptions of its own
        place = f" in {where}" if where else ""
        way_on = "another split or root, download=True, or a folder of class folders"
        if isinstance(error, ImportError) and error.name:
            way_on = f"pip install {error.name}"
        raise DataError(
            f"the data set {name} (split {split}) could not be opened{place} ({one_line(error)}); try: {way_on}"
        ) from error
    names = getattr(dataset, "classes", None)
    names = tuple(", ".join(each) if isinstance(each, tuple) else str(each) for each in names) if names else None
    return ImageSource(name, source.reader, first[1] is not None, names, own_order=True)
