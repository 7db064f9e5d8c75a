"""Images that ship inside a dependency: they need no network, and are the same on every machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from normsurgeon.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from normsurgeon.data.transforms import DataConfig

VIEWS = 12
"""Views of each photograph: the whole, its centre and its four corners, each also mirrored."""

UNLIKE_IMAGENET = ("hubble_deep_field", "retina")
"""Pictures of nothing that ImageNet has a class for: any network's answer to them is noise."""

INSTALL = 'pip install "normsurgeon[demo]"'

# The colour photographs that are files of the wheels. The rest of scikit-image's gallery is grey, drawn, a
# microscope slide, the same scene again (motorcycle_right.png), or fetched from the network on first use.
_PHOTOGRAPHS = {
    "skimage": (
        "data",
        (
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "hubble_deep_field.jpg",
            "motorcycle_left.png",
            "retina.jpg",
            "rocket.jpg",
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
_WHEELS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def photographs() -> list[Path]:
    """The paths of the photographs in scikit-image and scikit-learn, without importing either.

    :raises DataError: when one of the two is not installed, or no longer brings these files.
    """
    found = [
        folder / name
        for package, (inside, names) in _PHOTOGRAPHS.items()
        for folder in [_folder_of(package) / inside]
        for name in names
        if (folder / name).is_file()
    ]
    if not found:
        raise DataError(f"the installed scikit-image and scikit-learn bring no photographs; try: {INSTALL} --upgrade")
    return found


def _folder_of(package: str) -> Path:
    spec = find_spec(package)  # finds a package without running its code
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the demo images need {_WHEELS[package]}, which is not installed; try: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def digits(split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images (N, 8, 8) uint8 of 0 to 255, and labels (N,) of 0 to 9.

    split    None: all 1,797; ``test`` or ``validation``: every fifth one; ``train``: the others

    :raises DataError: when scikit-learn is not installed.
    :raises UsageError: another split.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the digits need scikit-learn, which is not installed; try: {INSTALL}") from error
    data = load_digits()
    images = (data.images * (255 / 16)).round().astype("uint8")  # they come in 17 levels, 0 to 16
    held_out = (data.target * 0).astype(bool)
    held_out[::5] = True
    if split in ("test", "validation"):
        return images[held_out], data.target[held_out]
    if split == "train":
        return images[~held_out], data.target[~held_out]
    if split is None:
        return images, data.target
    raise UsageError(f"digits has no split {split!r}; try train, test, or none for all of them")


def views(files: list[Path], config: DataConfig) -> Tensor:
    """The photographs as a batch (len(files) · VIEWS, 3, H, W), the whole picture first in each dozen."""
    import torch
    from PIL import Image, ImageOps

    transform = config.transform()
    made = []
    for file in files:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        for view in _crops(picture):
            made += [transform(view), transform(ImageOps.mirror(view))]
    return torch.stack(made)


def _crops(picture: Image) -> list[Image]:
    width, height = picture.size
    w, h = int(0.85 * width), int(0.85 * height)
    corners = [(0, 0), (width - w, 0), (0, height - h), (width - w, height - h), ((width - w) // 2, (height - h) // 2)]
    return [picture, *(picture.crop((x, y, x + w, y + h)) for x, y in corners)]
