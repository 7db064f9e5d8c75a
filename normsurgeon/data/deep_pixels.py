"""Grey images of more than 8 bits: scaled from the range that their file declares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normsurgeon.errors import DataError

Box = tuple[int, int, int, int]

_BITS, _PHOTOMETRIC, _MAX_VALUE, _SAMPLE_FORMAT = 258, 262, 281, 339  # of TIFF 6.0
_WHITE_IS_ZERO, _SIGNED = 0, 2


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of 16 or 32 bits, integer or float."""
    return image.mode == "F" or image.mode.startswith("I")


def deep_pixels(image: Image.Image, strips: Iterable[Box]) -> Image.Image:
    """A deep image as ``L``.

    Integers: ``256 * value // (white + 1)``, of 16 bits the upper eight, as Pillow reads 16-bit colour. White is what a
    TIFF declares (MaxSampleValue, BitsPerSample), else 65535. Floats: ``round(255 * value)``, of values from 0 to 1.

    :raises DataError: values below 0 or above white, or not finite; or integers of which none comes to a sixteenth of
        white: such an image has fewer bits than it says (12 in 16), and would be all but black.

    >>> deep_pixels(Image.fromarray(np.full((1, 1), 0x7FFF, np.uint16)), [(0, 0, 1, 1)]).getpixel((0, 0))
    127
    """
    floats = image.mode == "F"
    white = 1.0 if floats else _white(image)
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    key = image.info.get("transparency")
    plain, low, high = Image.new("L", image.size), np.inf, -np.inf
    for box in strips:
        values = _values(image.crop(box), unsigned=not floats and white == 2**32 - 1)
        if not np.isfinite(values).all():
            raise DataError("holds values that are not finite; try saving it as PNG")
        low, high = min(low, values.min()), max(high, values.max())
        if low < 0 or high > white:
            raise DataError(
                f"holds values from {low:g} to {high:g}, and is read from 0 to {white:g}; try saving it as PNG"
            )
        scaled = np.rint(255 * values) if floats else 256 * values // (int(white) + 1)
        scaled = 255 - scaled if inverted else scaled
        if key is not None and not floats:
            scaled[values == key] = 255
        plain.paste(Image.fromarray(scaled.astype(np.uint8)), box)
    if not floats and 0 < high < (white + 1) / 16:
        raise DataError(
            f"has {high:g} as its largest value, where white is {white:g}: how many bits it uses is not known; "
            "try scaling it, or saving it with 8 bits"
        )
    return plain


def _values(image: Image.Image, unsigned: bool) -> NDArray[Any]:
    values = np.asarray(image)
    if image.mode == "F":
        return values
    return (values.view(np.uint32) if unsigned else values).astype(np.int64)


def _white(image: Image.Image) -> int:
    """The integer that stands for white."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return 65535  # Pillow scales other formats to 16 bits
    bits, signed = _first(tags.get(_BITS, 16)), _first(tags.get(_SAMPLE_FORMAT, 1)) == _SIGNED
    most = 2 ** (bits - signed) - 1
    declared = _first(tags.get(_MAX_VALUE, most))
    return declared if 0 < declared <= most else most


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)
