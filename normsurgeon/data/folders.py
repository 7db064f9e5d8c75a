"""Folders on disk: which images are in them, each real folder once, and none under two classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from normsurgeon._util.one_line import one_line
from normsurgeon.errors import DataError

# What Pillow reads without plugins, in addition to what timm reads (three, unless the caller has registered more).
_MORE_ENDINGS = {".apng", ".avif", ".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".ppm"}
_MORE_ENDINGS |= {".tga", ".tif", ".tiff", ".webp"}


def image_endings() -> set[str]:
    """The endings of files that are taken for images, in small letters, with their dot."""
    return get_img_extensions(as_set=True) | _MORE_ENDINGS


def listing(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """The paths of a folder's images, and of its folders; hidden ones left out, in order.

    Pipes and devices with an image's ending are among the images, and so are links that lead nowhere: whoever reads
    them finds that they are none, and counts them.

    :raises DataError: a folder that cannot be listed.
    """
    endings = image_endings()
    try:
        with os.scandir(folder) as entries:
            seen = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: _order(e.name))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({one_line(error)}); try its permissions") from error
    folders = [entry.path for entry in seen if os.path.isdir(entry.path)]  # False, and no error, for a link to itself
    known = set(folders)
    images = [
        entry.path
        for entry in seen
        if entry.path not in known and (os.path.splitext(entry.name)[1].lower() in endings or leads_nowhere(entry.path))
    ]
    return images, folders


def leads_nowhere(path: str) -> bool:
    """Whether a path is a link to something that is not there, or to itself."""
    return os.path.islink(path) and not os.path.exists(path)


def images_below(folder: str | os.PathLike[str]) -> list[str]:
    """The paths of all images in a folder and in those within, in order; hidden ones and links back up left out."""
    return [path for _, _, images in _walk(os.fspath(folder), up=False) for path in images]


def images_of_classes(root: str | os.PathLike[str], folders: Sequence[str]) -> dict[str, list[str]]:
    """The images of each class folder, by its name.

    :raises DataError: a link by which images would belong to two classes: to the root or a folder above it, or into
        another class.
    """
    top = os.path.realpath(root)
    found: dict[str, list[str]] = {}
    owners: dict[str, tuple[str, str]] = {}
    for folder in folders:
        name = os.path.basename(folder)
        found[name] = []
        for path, real, images in _walk(folder, up=True):
            if _holds(real, top):
                raise DataError(
                    f"{path} is a link to {real}, which holds the class folders: their images would get the label "
                    f"{name}; try removing the link"
                )
            owner, first = owners.setdefault(real, (name, path))
            if owner != name:
                raise DataError(
                    f"{first} and {path} are one folder, whose images would get the labels {owner} and {name}; "
                    "try removing one of the links"
                )
            found[name] += images
    return found


def _holds(folder: str, other: str) -> bool:
    """Whether a real folder is another one or above it."""
    return (other + os.sep).startswith(folder.rstrip(os.sep) + os.sep)


def _walk(folder: str, up: bool) -> Iterator[tuple[str, str, list[str]]]:
    """Folders from the top down: (path, real path, its images), each real folder once, whatever links lead to it.

    up  whether to follow a link to a folder above the first one
    """
    left, top = [folder], os.path.realpath(folder)
    seen: set[str] = set()
    while left:
        path = left.pop()
        real = os.path.realpath(path)
        if real in seen or (not up and real != top and _holds(real, top)):
            continue
        seen.add(real)
        images, folders = listing(path)
        yield path, real, images
        left += reversed(folders)


def _order(name: str) -> tuple[list[int | str], str]:
    """timm's natural order (2 before 10), and a definite one where it ties (a, A)."""
    return natural_key(name), name
