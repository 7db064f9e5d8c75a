"""Where samples come from: one small class for each kind of place, all of them numbered but the stream."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from normsurgeon._util.one_line import one_line
from normsurgeon.data.images import plain_image, read_image
from normsurgeon.errors import DataError

Sample = tuple[Image.Image, int | None]


@dataclass(frozen=True)
class Files:
    """Image files; ``labels`` may be None; ``root`` is what their names are relative to."""

    paths: list[str]
    labels: list[int] | None
    root: str | None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return read_image(self.paths[index]), self.labels[index] if self.labels is not None else None

    def name_of(self, index: int) -> str:
        """The file's path below ``root``."""
        path = self.paths[index]
        return os.path.relpath(path, self.root) if self.root else os.path.basename(path)


@dataclass(frozen=True)
class Arrays:
    """Grey images (N, H, W) uint8 in memory, with labels (N,)."""

    images_NHW: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.images_NHW)

    def __getitem__(self, index: int) -> Sample:
        return Image.fromarray(self.images_NHW[index]), int(self.labels[index])


@dataclass(frozen=True)
class Indexed:
    """A torchvision dataset of (PIL image, target), or a timm reader of (open file, target)."""

    name: str
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, target, *_ = self.dataset[index]
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{self.name}[{index}] cannot be read ({one_line(error)}); try another split") from error
        name = f"{self.name}[{index}]"
        if not isinstance(image, Image.Image):
            return read_image(image, name), _label(target, self.name)
        try:
            return plain_image(image), _label(target, self.name)
        except DataError as error:
            raise DataError(f"{name} {error}") from error


@dataclass(frozen=True)
class Stream:
    """One of timm's iterable datasets of (PIL image, target)."""

    name: str
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Sample]:
        for image, target, *_ in self.dataset:
            yield image, _label(target, self.name)


def _label(target: Any, name: str) -> int | None:
    if target is None or isinstance(target, bool):
        return None
    try:
        number = int(target)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} has targets like {str(target)[:40]!r}, which are no class numbers; try a classification data set"
        ) from error
    return number if number >= 0 else None  # -1 is timm's sign for no label
