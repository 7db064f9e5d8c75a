"""What lies in folders and is no image: pipes, sockets, devices, links, bombs; and batches that are not finite."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import timm
import torch
from conftest import put
from test_images import png

import normsurgeon as ns
from normsurgeon.data import images
from normsurgeon.data.batches import Batches, unpacked
from normsurgeon.data.images import read_image
from normsurgeon.data.sources import class_folders, open_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError
from normsurgeon.inference.predict import image_files, predict

SMALL = DataConfig(input_size=(3, 8, 8), crop_pct=1.0)
NOT_FINITE = r"^image 3 of the batches \(counted from 0\) holds values that are not finite; try leaving it out$"


def odd_files(folder: Path) -> list[str]:
    """A pipe, a socket, a device and links that lead nowhere, with the names of images."""
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "pipe.png")
    here = os.getcwd()
    try:
        os.chdir(folder)  # a socket's path has at most 107 characters
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("socket.png")
    finally:
        os.chdir(here)
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    return ["device.png", "loop.png", "nowhere.png", "pipe.png", "socket.png"]


def test_pipes_sockets_devices_and_dead_links_are_skipped_and_counted(tmp_path):
    odd = odd_files(tmp_path)
    put(tmp_path / "fine.png")
    batches = Batches(open_source(tmp_path), SMALL)
    assert sum(len(x) for x, _ in batches) == 1
    assert sorted(batches.skipped) == odd
    net = timm.create_model("test_resnet", num_classes=2)
    found = predict(net, tmp_path)
    assert sorted(os.path.basename(each.file) for each in found.skipped) == odd
    assert predict(net, image_files(tmp_path)) == found  # the command line asks for the files first
    reasons = {os.path.basename(each.file): each.reason for each in found.skipped}
    assert reasons["pipe.png"] == "is no regular file (a pipe, a socket, a device or a folder); try an image file"


def test_they_are_skipped_in_a_class_folder_too(tmp_path):
    odd = odd_files(tmp_path / "ape")
    put(tmp_path / "ape" / "fine.png")
    source, skipped = open_source(tmp_path), []
    assert [label for _, label in source.samples(skipped)] == [0]
    assert skipped == [f"ape/{name}" for name in odd]


@pytest.mark.parametrize("target", [".", "..", "/"], ids=["the root", "above it", "the root of all"])
@pytest.mark.parametrize("place", ["link", "ape/link"], ids=["as a class", "within a class"])
def test_a_link_up_to_the_class_folders_is_refused(tmp_path, place, target):
    root = tmp_path / "data"
    put(root / "ape" / "1.png")
    put(root / "bee" / "1.png")
    (root / place).symlink_to((root / target).resolve() if target != "/" else "/", target_is_directory=True)
    with pytest.raises(
        DataError, match=r"link is a link to /.*, which holds the class folders: their images would get"
    ):
        open_source(root)


@pytest.mark.parametrize("place", ["link", "ape/link"], ids=["as a class", "within a class"])
def test_a_link_into_another_class_is_refused(tmp_path, place):
    put(tmp_path / "ape" / "1.png")
    put(tmp_path / "bee" / "1.png")
    (tmp_path / place).symlink_to(tmp_path / "bee", target_is_directory=True)
    with pytest.raises(DataError, match=r"are one folder, whose images would get the labels \w+ and \w+; try removing"):
        open_source(tmp_path)


def test_predict_does_not_follow_links_up(tmp_path):
    put(tmp_path / "photos" / "1.png")
    put(tmp_path / "other" / "2.png")
    (tmp_path / "photos" / "up").symlink_to(tmp_path, target_is_directory=True)
    net = timm.create_model("test_resnet", num_classes=2)
    assert [os.path.basename(each.file) for each in predict(net, tmp_path / "photos")] == ["1.png"]


def test_class_folders_that_are_links_elsewhere_are_classes(tmp_path):
    put(tmp_path / "store" / "a" / "1.png")
    put(tmp_path / "store" / "b" / "1.png")
    (tmp_path / "data").mkdir()
    for name, target in (("ape", "b"), ("bee", "a")):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / target, target_is_directory=True)
    assert [label for _, label in open_source(tmp_path / "data")] == [0, 1]


def test_a_folder_that_two_links_of_one_class_lead_to_counts_once(tmp_path):
    put(tmp_path / "ape" / "deep" / "1.png")
    (tmp_path / "ape" / "again").symlink_to(tmp_path / "ape" / "deep", target_is_directory=True)
    assert len(open_source(tmp_path)) == 1


@pytest.mark.parametrize("target", ["cat", "gone"], ids=["to itself", "to nothing"])
def test_a_class_folder_that_leads_nowhere_is_refused_and_shifts_no_numbers(tmp_path, target):
    put(tmp_path / "ape" / "1.png")
    put(tmp_path / "dog" / "1.png")
    (tmp_path / "cat").symlink_to(tmp_path / target)
    for use in (open_source, class_folders):
        with pytest.raises(DataError, match=r"cat is a link that leads nowhere: were it a class folder, the classes"):
            use(tmp_path)


# Bombs


def bomb(path: Path, side: int, colour: int, bits: int) -> Path:
    """A PNG of zeros, written by hand row by row: kilobytes that become hundreds of megabytes."""
    packer, parts = zlib.compressobj(9), []
    row = bytes(1 + side * {0: 1, 2: 3, 4: 2, 6: 4}[colour] * bits // 8)
    for _ in range(side):
        parts.append(packer.compress(row))
    empty = png(torch.zeros(1, 1, dtype=torch.uint8).numpy(), colour, bits)
    header = side.to_bytes(4, "big") * 2 + bytes([bits, colour, 0, 0, 0])
    body = b""
    for kind, data in ((b"IHDR", header), (b"IDAT", b"".join([*parts, packer.flush()])), (b"IEND", b"")):
        body += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    path.write_bytes(empty[:8] + body)
    return path


def test_an_image_of_too_many_pixels_is_one_line_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    put(tmp_path / "large.png", size=(10, 10))
    put(tmp_path / "small.png", size=(9, 11))
    with pytest.raises(DataError, match=r"^\S+large\.png has more than 67 million pixels; try a smaller copy of it$"):
        read_image(tmp_path / "large.png")
    batches = Batches(open_source(tmp_path), SMALL)
    assert (sum(len(x) for x, _ in batches), batches.skipped) == (1, ["large.png"])


PEAK = """
import resource, sys
from normsurgeon.data.images import read_image
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try:
    DataConfig().transform()(read_image(sys.argv[1]))
    print("read")
except DataError as error:
    print(error)
print(peak() - before)
"""


@pytest.mark.system
@pytest.mark.parametrize(
    ("side", "colour", "bits", "line"),
    [
        (13_000, 0, 16, "has more than 67 million pixels; try a smaller copy of it"),
        (20_000, 2, 8, "has more than 67 million pixels; try a smaller copy of it"),  # Pillow's own limit
        (8192, 0, 16, "read"),
        (8192, 6, 8, "read"),
        (8192, 4, 16, "read"),
    ],
    ids=["16 bits", "above Pillow's limit", "the largest of 16 bits", "the largest RGBA", "the largest LA"],
)
def test_a_bomb_takes_less_than_640_mib_and_a_refused_one_nothing(tmp_path, side, colour, bits, line):
    file = bomb(tmp_path / "bomb.png", side, colour, bits)
    assert file.stat().st_size < 2_000_000
    done = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    said, taken = done.stdout.strip().rsplit("\n", 1)
    assert said.endswith(line)
    assert int(taken) < (640 if line == "read" else 64)
    assert done.stderr == ""


# Values that are not finite


def broken() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(16)]
    batches[1][1, 0, 0, 0] = torch.nan
    return batches


def test_an_image_that_is_not_finite_stops_calibration_and_reconstruction_and_changes_nothing():
    result = ns.convert(timm.create_model("test_resnet").eval(), to="gn", balance=False, verdict=False, check=False)
    before = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    for run in (ns.calibrate_, ns.reconstruct_):
        with pytest.raises(DataError, match=NOT_FINITE):
            run(result, broken())
    assert all(torch.equal(before[name], tensor) for name, tensor in result.model.state_dict().items())


def test_calibration_and_reconstruction_count_what_they_could_not_read(tmp_path):
    result = ns.convert(timm.create_model("test_resnet").eval(), to="gn", balance=False, verdict=False, check=False)
    for number in range(8):
        put(tmp_path / f"{number}.png", 30 * number, size=(40, 40))
    (tmp_path / "broken.png").write_bytes(b"no image")
    calibrated = ns.calibrate(result, tmp_path, balance=False).history[-1]
    assert (calibrated.matched_images, calibrated.skipped) == (8, 1)
    assert calibrated.summary.endswith("; images that could not be read: 1")
    fitted = ns.reconstruct(result, tmp_path, local_steps=0, steps=2, batch_size=4, held_out=0.3).history[-1]
    assert fitted.skipped == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_image_that_is_not_finite_stops_evaluation_and_analysis(value):
    net = timm.create_model("test_resnet").eval()
    batches = [torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)]
    batches[1][1, 2, 3, 4] = value
    for run in (ns.evaluate, ns.analyze):
        with pytest.raises(DataError, match=NOT_FINITE):
            run(net, batches)


def test_an_infinity_in_a_mask_is_none_in_an_image():
    batch = {"pixel_values": torch.zeros(2, 3), "mask": torch.full((2, 4), -torch.inf)}
    assert unpacked(batch)[1] is None
    batch["pixel_values"][1] = torch.nan
    with pytest.raises(DataError, match=r"^image 1 of the batches"):
        unpacked(batch)
