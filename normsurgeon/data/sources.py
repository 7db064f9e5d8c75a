"""Data specs → a source of samples: a folder, images that ship in a dependency, or a timm dataset."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from normsurgeon._util.one_line import one_line
from normsurgeon.data.demo_images import digits, photographs
from normsurgeon.data.fashion import CLASSES, fashion_mnist
from normsurgeon.data.labels import labels_of_folders
from normsurgeon.data.readers import Arrays, Files, Indexed, Sample, Stream
from normsurgeon.errors import DataError, UsageError

FORMS = (
    "a data set is a folder of class folders, a folder of images, demo, digits, "
    "fashion-mnist, or a timm dataset name such as torch/cifar10"
)

_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_SPLITS = {"train", "training", "val", "valid", "validation", "eval", "evaluation", "test"}
# What Pillow reads without plugins, in addition to what timm reads (three, unless the caller has registered more).
_MORE_ENDINGS = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".pbm", ".pgm", ".ppm", ".tif", ".tiff"}
_MORE_ENDINGS |= {".webp"}


@dataclass(frozen=True, eq=False)
class ImageSource(Dataset[Sample]):
    """Images with labels, or without, in a fixed order.

    ``source[i]`` decodes one image, in its file's own mode (RGB, L, P, …), and gives ``(image, label or
    None)``; it raises a DataError that names an image that cannot be decoded. Iterating leaves those out.

    name         as the user wrote it
    reader       where the samples come from (one of the small classes below)
    labelled     whether the samples carry class numbers
    class_names  the folders' names, in the order of the folders; None where there are none
    """

    name: str
    reader: Any
    labelled: bool
    class_names: tuple[str, ...] | None = None

    @property
    def streamed(self) -> bool:
        """Whether samples come one after the other only: no length to rely on, and no ``source[i]``."""
        return not hasattr(self.reader, "__getitem__")

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Sample:
        if self.streamed:
            raise DataError(f"{self.name} is a stream: its samples have no numbers; try iterating over it")
        return self.reader[index]

    def __iter__(self) -> Iterator[Sample]:
        return self.samples()

    def samples(self, skipped: list[str] | None = None) -> Iterator[Sample]:
        """Every sample that can be decoded; the names of the others are added to ``skipped``.

        :raises DataError: when there are images and none of them can be decoded.
        """
        skipped = [] if skipped is None else skipped
        if self.streamed:
            yield from self.reader
            return
        read, reason = 0, "it is empty"
        for index in range(len(self)):
            try:
                sample = self.reader[index]
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
    classes: int | None = None,
    split: str | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> ImageSource:
    """The images that a data spec stands for.

    spec      ``demo`` (photographs, no labels), ``digits``, ``fashion-mnist``, an existing folder of class folders,
              an existing folder of images (no labels), or a timm dataset name (``torch/cifar10``, ``hfds/…``, …).
              A folder that is called demo or digits is given as ``./demo``, or as a Path.
    classes   how many classes the network's head has; class folders are numbered to fit it, see
              :func:`~normsurgeon.data.labels.labels_of_folders`
    split     ``train``, ``validation`` …: of a timm dataset (validation if not given), of the digits, or the
              sub-folder of that name
    root      where a timm dataset lies; for ``torch/…`` the default is ``./data``
    download  whether a timm dataset that is not there may be fetched

    :raises DataError: no such folder or dataset, nothing in it, or labels that the head cannot have.

    >>> source = open_source("digits")
    >>> len(source), source[0][0].size, source[0][1]
    (1797, (8, 8), 0)
    """
    text = os.fspath(spec)
    if spec == "demo":
        paths = photographs()
        return ImageSource(text, Files([str(path) for path in paths], None, None), labelled=False)
    if spec == "digits":
        return ImageSource(text, Arrays(*digits(split)), True, tuple("0123456789"))
    if spec == "fashion-mnist":
        return ImageSource(text, Arrays(*fashion_mnist(split)), True, CLASSES)
    path = Path(text).expanduser()
    if path.is_dir():
        if split is not None and not (path / split).is_dir():
            raise UsageError(f"{text} has no folder {split}; leave out split={split!r}, or try one of its folders")
        return _open_folder(path / split if split else path, text, classes)
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
    names = [os.path.basename(path) for path in _listing(folder)[1]]
    if not names:
        raise DataError(f"{folder} holds no folders; give the folder that holds a folder for each class")
    if all(name.lower() in _SPLITS for name in names):
        raise DataError(f"the folders of {folder} are splits, not classes; try {os.path.join(folder, names[0])}")
    return names


def nothing_readable(name: str, count: int, reason: str) -> DataError:
    """The error for a source of ``count`` images of which none can be decoded; ``reason`` is the last's."""
    return DataError(f"none of the {count} images of {name} can be read; the last one: {reason}")


def _open_folder(path: Path, name: str, classes: int | None) -> ImageSource:
    loose, folders = _listing(path)
    inside = {os.path.basename(folder): images_below(folder) for folder in folders}
    class_names = list(inside)
    if not any(inside.values()):
        if not loose:
            raise DataError(f"{name} holds no images ({', '.join(sorted(_endings()))}); {FORMS}")
        return ImageSource(name, Files(loose, None, str(path)), labelled=False)
    if loose:
        raise DataError(
            f"{name} holds both images ({os.path.basename(loose[0])}) and folders of images "
            f"({class_names[0]}); try moving the images into a class folder, or elsewhere"
        )
    if all(folder.lower() in _SPLITS for folder in class_names):
        best = max(class_names, key=lambda folder: ("train" not in folder.lower(), len(inside[folder])))
        raise DataError(f"the folders of {name} are splits, not classes; try {os.path.join(name, best)}")
    # An empty folder keeps its number: the numbers of the others must not depend on which files have arrived.
    numbers = labels_of_folders(class_names, classes, name)
    pairs = [(p, number) for folder, number in zip(class_names, numbers, strict=True) for p in inside[folder]]
    files = Files([p for p, _ in pairs], [number for _, number in pairs], str(path))
    return ImageSource(name, files, True, tuple(class_names))


def _open_dataset(name: str, root: str | os.PathLike[str] | None, split: str, download: bool) -> ImageSource:
    prefix = name.partition("/")[0].lower()
    where = os.fspath(root) if root is not None else ("data" if prefix == "torch" else None)
    try:
        with redirect_stdout(sys.stderr):  # readers print, and standard output belongs to --json
            dataset = create_dataset(name, root=where, split=split, download=download)
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
    return ImageSource(name, source.reader, first[1] is not None, tuple(map(str, names)) if names else None)


def _order(name: str) -> tuple[list[int | str], str]:
    """timm's natural order (2 before 10), and a definite one where it ties (a, A)."""
    return natural_key(name), name


def _endings() -> set[str]:
    return get_img_extensions(as_set=True) | _MORE_ENDINGS


def _listing(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """The paths of a folder's images, and of its folders; hidden ones left out, in order."""
    endings = _endings()
    try:
        with os.scandir(folder) as entries:
            seen = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: _order(e.name))
            folders = [entry.path for entry in seen if entry.is_dir()]
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({one_line(error)}); try its permissions") from error
    images = [e.path for e in seen if os.path.splitext(e.name)[1].lower() in endings and e.path not in folders]
    return images, folders


def images_below(folder: str, above: tuple[str, ...] = ()) -> list[str]:
    """The paths of all images in a folder and in the folders within; hidden ones left out, in order."""
    real = os.path.realpath(folder)
    if real in above:  # a link back up
        return []
    images, folders = _listing(folder)
    return images + [path for inner in folders for path in images_below(inner, (*above, real))]
