"""One reader: the value that a pixel must have for every kind of image, whichever command reads it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from normsurgeon.data.augmentation import Augmentation
from normsurgeon.data.batches import Batches
from normsurgeon.data.feeding import make_feed
from normsurgeon.data.images import plain_image, read_image
from normsurgeon.data.sources import open_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError
from normsurgeon.inference.predict import predict

tifffile = pytest.importorskip("tifffile")

HEIGHT, WIDTH = 6, 8
random = np.random.default_rng(0)
RGB = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = random.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
DEEP = random.integers(0, 1 << 16, (HEIGHT, WIDTH), dtype=np.uint16)
DEEP[0, :2] = 0, 65535
BITS = GREY > 127
INDICES = GREY % 4
PALETTE = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 255], [255, 255, 255]], np.uint8)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The formula of "over" on a white ground, rounded."""
    share = alpha.astype(float) / 255
    share = share[..., None] if colour.ndim == 3 else share
    return np.rint(share * colour + (1 - share) * 255)


def saved(image: Image.Image, ending: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, ending, **options)
    return file.getvalue()


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def png(values: np.ndarray, colour: int, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: of depths that Pillow does not write."""
    if bits == 1:
        rows = [b"\0" + np.packbits(row).tobytes() for row in values]
    else:
        rows = [b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in values]  # (W,) or (W, C)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def palette_image() -> Image.Image:
    image = Image.frombytes("P", (WIDTH, HEIGHT), INDICES.tobytes())
    image.putpalette(PALETTE.ravel().tolist())
    return image


def frames(ending: str) -> bytes:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    options = {"lossless": True} if ending == "WEBP" else {}
    return saved(first, ending, save_all=True, append_images=[second], **options)


def decoded(data: bytes, mode: str) -> np.ndarray:
    """Pillow's own values, for formats that lose some."""
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


RGBA = np.dstack([RGB, ALPHA])
CMYK = random.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
JPEG, GREY_JPEG = saved(Image.fromarray(RGB), "JPEG"), saved(Image.fromarray(GREY), "JPEG")
CMYK_JPEG = saved(Image.fromarray(CMYK, "CMYK"), "JPEG")
GIF = saved(palette_image(), "GIF", transparency=2)
FLOATS = random.random((HEIGHT, WIDTH)).astype(np.float32)
TWELVE = DEEP >> 4
IN_32 = DEEP.astype(np.uint32) << 16 | 0xFFFF

KINDS: dict[str, tuple[bytes, np.ndarray]] = {
    "1 bit, PNG": (png(BITS, 0, 1), BITS * 255),
    "1 bit, TIFF": (tiff(BITS, photometric="minisblack"), BITS * 255),
    "L, PNG": (saved(Image.fromarray(GREY), "PNG"), GREY),
    "L, grey JPEG": (GREY_JPEG, decoded(GREY_JPEG, "L")),
    "L, PGM": (b"P5 8 6 255\n" + GREY.tobytes(), GREY),
    "L, TIFF": (tiff(GREY), GREY),
    "L, TIFF, white is 0": (tiff(GREY, photometric="miniswhite"), 255 - GREY),
    "L with a transparent grey, PNG": (
        png(GREY, 0, 8, (b"tRNS", struct.pack(">H", int(GREY[1, 1])))),
        np.where(GREY[1, 1] == GREY, 255, GREY),
    ),
    "LA, PNG": (png(np.dstack([GREY, ALPHA]), 4, 8), on_white(GREY, ALPHA)),
    "P, PNG": (saved(palette_image(), "PNG"), PALETTE[INDICES]),
    "P, BMP": (saved(palette_image(), "BMP"), PALETTE[INDICES]),
    "P with one transparent colour, PNG": (
        saved(palette_image(), "PNG", transparency=2),
        np.where((INDICES == 2)[..., None], 255, PALETTE[INDICES]),
    ),
    "P with an alpha for each colour, PNG": (
        saved(palette_image(), "PNG", transparency=bytes([0, 128, 255, 7])),
        on_white(PALETTE[INDICES], np.array([0, 128, 255, 7])[INDICES]),
    ),
    "P with one transparent colour, GIF": (GIF, np.where((INDICES == 2)[..., None], 255, PALETTE[INDICES])),
    "RGB, PNG": (saved(Image.fromarray(RGB), "PNG"), RGB),
    "RGB, BMP": (saved(Image.fromarray(RGB), "BMP"), RGB),
    "RGB, PPM": (b"P6 8 6 255\n" + RGB.tobytes(), RGB),
    "RGB, TGA": (saved(Image.fromarray(RGB), "TGA"), RGB),
    "RGB, TIFF": (tiff(RGB, photometric="rgb"), RGB),
    "RGB with a transparent colour, PNG": (
        png(RGB, 2, 8, (b"tRNS", struct.pack(">HHH", *RGB[2, 3].tolist()))),
        np.where((RGB[2, 3] == RGB).all(-1)[..., None], 255, RGB),
    ),
    "RGBA, PNG": (saved(Image.fromarray(RGBA), "PNG"), on_white(RGB, ALPHA)),
    "RGBA, TIFF": (tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), on_white(RGB, ALPHA)),
    "RGBA, TGA": (saved(Image.fromarray(RGBA), "TGA"), on_white(RGB, ALPHA)),
    "RGBA, WebP without loss": (saved(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA)),
    "RGBA, ICO": (saved(Image.fromarray(RGBA), "ICO", sizes=[(WIDTH, HEIGHT)]), on_white(RGB, ALPHA)),
    "YCbCr, JPEG": (JPEG, decoded(JPEG, "RGB")),
    "CMYK, JPEG": (CMYK_JPEG, decoded(CMYK_JPEG, "RGB")),
    "CMYK, TIFF": (
        saved(Image.fromarray(CMYK, "CMYK"), "TIFF"),
        np.asarray(Image.fromarray(CMYK, "CMYK").convert("RGB")),
    ),
    "16 bits, PNG": (png(DEEP, 0, 16), DEEP >> 8),
    "16 bits with a transparent grey, PNG": (
        png(DEEP, 0, 16, (b"tRNS", struct.pack(">H", int(DEEP[2, 2])))),
        np.where(DEEP[2, 2] == DEEP, 255, DEEP >> 8),
    ),
    "16 bits RGB, PNG": (png((RGB.astype(int) * 256 + 77), 2, 16), RGB),
    "16 bits RGBA, PNG": (png((RGBA.astype(int) * 256 + 77), 6, 16), on_white(RGB, ALPHA)),
    "16 bits, little-endian TIFF": (tiff(DEEP, byteorder="<"), DEEP >> 8),
    "16 bits, big-endian TIFF": (tiff(DEEP, byteorder=">"), DEEP >> 8),
    "16 bits, TIFF, white is 0": (tiff(DEEP, photometric="miniswhite"), 255 - (DEEP >> 8)),
    "16 bits with a sign, TIFF": (tiff((DEEP >> 1).astype(np.int16)), DEEP >> 8),
    "16 bits RGB, TIFF": (tiff(RGB.astype(np.uint16) * 256 + 77, photometric="rgb"), RGB),
    "16 bits, PGM": (b"P5 8 6 65535\n" + DEEP.astype(">u2").tobytes(), DEEP >> 8),
    "12 bits, PGM": (
        b"P5 8 6 4095\n" + TWELVE.astype(">u2").tobytes(),
        np.rint(TWELVE / 4095 * 65535).astype(int) >> 8,
    ),
    "12 bits in 16 that say so, TIFF": (tiff(TWELVE, extratags=[(281, "H", 1, 4095, True)]), TWELVE >> 4),
    "32 bits, TIFF": (tiff(IN_32), DEEP >> 8),
    "32 bits with a sign, TIFF": (tiff((IN_32 >> 1).astype(np.int32)), DEEP >> 8),
    "8 bits in 32 that say so, TIFF": (tiff(GREY.astype(np.int32), extratags=[(281, "I", 1, 255, True)]), GREY),
    "32 bits float from 0 to 1, TIFF": (tiff(FLOATS), np.rint(FLOATS * 255)),
    "animated WebP, the first frame": (frames("WEBP"), RGB),
    "animated PNG, the first frame": (frames("PNG"), RGB),
    "animated GIF, the first frame": (
        saved(palette_image(), "GIF", save_all=True, append_images=[Image.new("P", (WIDTH, HEIGHT))]),
        PALETTE[INDICES],
    ),
    "TIFF of several pages, the first": (tiff(np.stack([RGB, 255 - RGB]), photometric="rgb"), RGB),
}


def grey_ones() -> set[str]:
    return {name for name, (_, values) in KINDS.items() if values.ndim == 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every kind as a file; a number in front keeps the order of the table."""
    root = tmp_path_factory.mktemp("kinds")
    for number, data in enumerate(data for data, _ in KINDS.values()):
        (root / f"{number}.png").write_bytes(data)  # read by its content, whatever its ending
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_pixel_has_the_value_of_the_table(kind, tmp_path):
    data, expected = KINDS[kind]
    (tmp_path / "image").write_bytes(data)
    image = read_image(tmp_path / "image")
    assert image.mode == ("L" if kind in grey_ones() else "RGB")
    values = np.asarray(image).astype(int)
    assert values.shape == expected.shape
    # Only shares of a colour are rounded, and a share of white with them.
    assert np.abs(values - expected).max() <= (1 if "alpha" in kind or "A, " in kind or "RGBA" in kind else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_image_is_turned_upright_by_its_exif_orientation(tmp_path, ending, orientation):
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:16, :32] = 255, 0, 0  # top left
    upright[32:, 32:] = 0, 0, 255  # bottom right
    stored = {  # EXIF 2.32, tag 0x0112: where the image's row 0 and column 0 lie
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    noted = Image.Exif()
    noted[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "image", ending, exif=noted)
    image = read_image(tmp_path / "image")
    assert np.abs(np.asarray(image).astype(int) - upright).mean() < 4
    assert np.array_equal(np.asarray(plain_image(image)), np.asarray(image))  # turned once, and not once more


def test_damaged_notes_of_the_camera_leave_an_image_as_it_is_stored(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "image", "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff nonsense")
    assert np.array_equal(np.asarray(read_image(tmp_path / "image")), RGB)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(np.array([[0.5, np.nan]], np.float32)), r"holds values that are not finite; try saving it as PNG$"),
        (tiff(np.array([[0.5, 200]], np.float32)), r"holds values from 0\.5 to 200, and is read from 0 to 1; try"),
        (tiff(np.array([[0.5, -1]], np.float32)), r"holds values from -1 to 0\.5, and is read from 0 to 1; try"),
        (tiff(np.array([[7, -1]], np.int32)), r"holds values from -1 to 7, and is read from 0 to 2\.14748e\+09; try"),
        (tiff(TWELVE), r"has 4095 as its largest value, where white is 65535: how many bits it uses is not known; try"),
        (tiff(GREY.astype(np.int32)), r"has \d+ as its largest value, where white is 2\.14748e\+09: how many bits"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", r"cannot be read \(not an image\)"),
    ],
    ids=["nan", "float above 1", "float below 0", "integer below 0", "12 bits in 16", "8 bits in 32", "a program"],
)
def test_pixels_without_a_rule_are_refused_in_one_line(tmp_path, data, message):
    (tmp_path / "image.tif").write_bytes(data)
    with pytest.raises(DataError, match=rf"^\S+image\.tif {message}") as caught:
        read_image(tmp_path / "image.tif")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_black_image_is_black_at_any_depth(tmp_path):
    (tmp_path / "image").write_bytes(tiff(np.zeros((2, 2), np.uint16)))
    assert np.asarray(read_image(tmp_path / "image")).max() == 0


# The same reader behind every command


class Seen(torch.nn.Module):
    """A classifier that keeps what it was given."""

    pretrained_cfg: ClassVar = {
        "input_size": (3, HEIGHT, WIDTH),
        "crop_pct": 1.0,
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
    }
    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return x.flatten(1)[:, :2]


def as_input(values: np.ndarray) -> torch.Tensor:
    colour = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    return torch.from_numpy(colour / 255).permute(2, 0, 1)


def test_predict_evaluate_and_training_see_the_same_pixels(folder):
    network, config = Seen(), DataConfig.of(Seen())
    predict(network, folder)
    source = open_source(folder)
    batches = torch.cat([images for images, _ in Batches(source, config)])
    feed = make_feed(source, config, Augmentation(augment=False), batch_size=1, seed=0)
    trained = torch.stack([feed.samples[0, number][0] for number in range(len(source))])
    expected = torch.stack([as_input(values) for _, values in KINDS.values()])
    assert len(source) == len(KINDS) >= 25
    for seen in (torch.cat(network.seen), batches, trained):
        assert seen.shape == expected.shape
        assert (seen - expected).abs().max() <= 1.01 / 255


def test_a_grey_network_gets_grey_images_at_their_values(tmp_path):
    (tmp_path / "1.png").write_bytes(KINDS["16 bits, PNG"][0])
    config = DataConfig((1, HEIGHT, WIDTH), (0.0,), (1.0,), crop_pct=1.0)
    ((images, _),) = Batches(open_source(tmp_path), config)
    assert torch.allclose(images[0, 0] * 255, torch.from_numpy((DEEP >> 8).astype(np.float32)), atol=1e-4)


def test_a_torchvision_folder_is_read_by_the_same_rules(tmp_path):
    (tmp_path / "ape").mkdir()
    (tmp_path / "ape" / "1.png").write_bytes(KINDS["16 bits, PNG"][0])
    image, label = open_source("torch/image_folder", root=tmp_path)[0]
    assert (image.mode, label) == ("L", 0)
    assert np.array_equal(np.asarray(image), DEEP >> 8)
