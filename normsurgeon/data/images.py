"""One reader for images, with one rule for each kind of pixel: eight bits, grey or RGB, upright."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from typing import IO

from PIL import Image

from normsurgeon._util.one_line import one_line
from normsurgeon.data.deep_pixels import deep_pixels, is_deep
from normsurgeon.errors import DataError

MAX_PIXELS = 1 << 26
"""The largest image that is read: with every conversion, 67 million pixels take less than 0.6 GB."""

STRIP = 1 << 20
"""Pixels that are converted together."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY = {"1", "L", "LA", "La"}
_WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_RUNS_A_PROGRAM = {"EPS"}  # Ghostscript, whatever the file's ending


def read_image(file: str | os.PathLike[str] | IO[bytes], name: str | None = None) -> Image.Image:
    """Decode an image file, fully: its first frame, as ``plain_image`` gives it.

    :raises DataError: one line with the file's name, for whatever is wrong with it: no regular file (a pipe, a
        device), no image, a damaged one, one of more than 67 million pixels, or pixels without a rule.
    """
    name = name or str(file)
    try:
        if isinstance(file, (str, os.PathLike)):
            if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait for its other end
                raise DataError("is no regular file (a pipe, a socket, a device or a folder); try an image file")
            with open(file, "rb") as stream:
                image = _decoded(stream)
        else:
            image = _decoded(file)
        turn = _turn(image)
        image = _eight_bits(image)  # frees the deeper one before it is turned: both would take too much memory
        return _turned(image, turn)
    except DataError as error:
        raise DataError(f"{name} {error}") from error.__cause__
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} {_TOO_LARGE}") from error
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything, struct.error included
        what = "not an image" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise DataError(f"{name} cannot be read ({what}); try opening it in a viewer") from error


def plain_image(image: Image.Image) -> Image.Image:
    """An image of any kind as ``L`` or ``RGB``, 8 bits, turned upright by its EXIF orientation.

    Grey kinds (1, L, LA, I, I;16, F) give ``L``, all others ``RGB``. What is transparent shows white. More than 8 bits
    are scaled from the range that the file declares, or that its container has (``deep_pixels``). CMYK, YCbCr and HSV
    are converted by Pillow's formulas; colour profiles are ignored. docs/data.md has the whole table.

    :raises DataError: pixels without a rule; the text has no name in front.

    >>> plain_image(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    return _turned(_eight_bits(image), _turn(image))


_TOO_LARGE = f"has more than {MAX_PIXELS // 10**6} million pixels; try a smaller copy of it"


def _decoded(stream: IO[bytes]) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow says of metadata has no name in it
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.preinit()  # the common formats; loading all of Pillow's takes a tenth of a second
        try:
            image = Image.open(stream, formats=_formats())
        except Image.UnidentifiedImageError:
            Image.init()
            image = Image.open(stream, formats=_formats())
        _check_size(image)
        image.load()
        _check_size(image)  # an icon's images have sizes of their own
    return image


def _formats() -> list[str]:
    return [name for name in Image.ID if name not in _RUNS_A_PROGRAM]


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(_TOO_LARGE)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _TURNS.get(image.getexif().get(_ORIENTATION))  # type: ignore[arg-type]
    except Exception:  # damaged notes, which are no reason to leave out an image
        return None


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {}  # the note of how to turn it, which no longer holds
    return turned


def _eight_bits(image: Image.Image) -> Image.Image:
    if is_deep(image):
        return deep_pixels(image, _strips(image))
    transparent = image.mode in _WITH_ALPHA or "transparency" in image.info
    mode = "L" if image.mode in _GREY else "RGB"
    if image.mode == mode and not transparent:
        return image
    convert: Callable[[Image.Image, str], Image.Image] = _on_white if transparent else _converted
    plain = Image.new(mode, image.size)
    for box in _strips(image):
        plain.paste(convert(image.crop(box), mode), box)
    return plain


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows from the top down: conversions of large images would take several times their memory."""
    rows = max(1, STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except ValueError as error:
        raise DataError(
            f"has the colour mode {image.mode}, of which Pillow makes no {mode}; try saving it as PNG"
        ) from error


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    with_alpha = _converted(image, "LA" if mode == "L" else "RGBA")
    white = Image.new(mode, image.size, "white")
    white.paste(with_alpha.convert(mode), mask=with_alpha.getchannel("A"))
    return white
