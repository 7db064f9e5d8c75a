"""Whatever the bytes of an image and whatever lies in a folder: an image, or one line; no other error, no hang."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_images import KINDS

from normsurgeon.data.batches import Batches
from normsurgeon.data.images import MAX_PIXELS, read_image
from normsurgeon.data.sources import open_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError, NormSurgeonError

SECONDS, GIBIBYTE, LONGEST = 5, 1 << 30, 300
FILES = [data for data, _ in KINDS.values()]
SMALL = DataConfig(input_size=(3, 8, 8), crop_pct=1.0)


@st.composite
def damaged(draw) -> bytes:
    """A file of one of the kinds with bytes changed, cut off, put in, or taken from another kind; or no image."""
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        change = draw(st.sampled_from(["set", "cut", "put in", "other", "number"]))
        if change == "set" and place < len(data):
            data[place] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[place:]
        elif change == "put in":
            data[place:place] = draw(st.binary(max_size=16))
        elif change == "number":  # sizes, counts and offsets are numbers of four bytes
            data[place : place + 4] = draw(st.integers(0, 2**32 - 1)).to_bytes(
                4, draw(st.sampled_from(["big", "little"]))
            )
        else:
            data[place:] = draw(st.sampled_from(FILES))[place:]
    return bytes(data)


def check_read(data: bytes) -> None:
    """A file of these bytes is read by the rules, or refused in one line."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")  # nor a warning with no name in it
        path = Path(folder, "image.png")
        path.write_bytes(data)
        begin = time.process_time()
        image, said = None, ""
        try:
            image = read_image(path)
        except DataError as error:
            said = str(error)
        if image is None:
            assert said.startswith(str(path))
            assert len(said.removeprefix(str(path))) <= LONGEST
            assert "\n" not in said
        else:
            assert image.mode in ("L", "RGB")
            assert image.width * image.height <= MAX_PIXELS
            assert np.asarray(image).dtype == np.uint8
        assert time.process_time() - begin < SECONDS


def entries(depth: int):
    """What is in a folder: a file's bytes, a pipe, a link to a name, or a folder."""
    names = st.sampled_from(
        ["a", "b", "train", "1.png", "2.JPG", "x.tif", "y.gif", "n01440764", ".hidden", "notes.txt"]
    )
    files = st.one_of(damaged(), st.sampled_from(FILES), st.just("pipe"))
    links = st.tuples(st.sampled_from([".", "..", "a", "../a", "gone", "1.png", "/dev/zero", "/dev/null"]))
    below = st.one_of(files, links, entries(depth - 1)) if depth else st.one_of(files, links)
    return st.dictionaries(names, below, max_size=4)


def make(folder: Path, found: dict) -> None:
    for name, what in found.items():
        if isinstance(what, dict):
            (folder / name).mkdir()
            make(folder / name, what)
        elif isinstance(what, tuple):
            (folder / name).symlink_to(what[0])
        elif what == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).write_bytes(what)


def check_folder(found: dict) -> None:
    """Every image of a folder is read or counted, or the folder is refused in one line."""
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top, "above", "data")  # so that links up stay within
        folder.mkdir(parents=True)
        make(folder, found)
        begin, said = time.process_time(), ""
        try:
            source = open_source(folder, classes=2)
            batches = Batches(source, SMALL)
            read = sum(len(x) for x, _ in batches)
            assert read + len(batches.skipped) == len(source)
            assert all(label in (None, 0, 1) for _, label in source)
        except NormSurgeonError as error:
            said = str(error)
        assert "\n" not in said
        assert time.process_time() - begin < SECONDS


@contextmanager
def at_most_a_gibibyte() -> Iterator[None]:
    """The process's peak inside, over what it takes before: other tests of the same process have taken more."""
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    yield
    assert peak() - before < GIBIBYTE


def peak() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=80, **SETTINGS)
@given(damaged())
def test_any_bytes_are_an_image_or_one_line(data):
    with at_most_a_gibibyte():
        check_read(data)


@settings(max_examples=30, **SETTINGS)
@given(entries(2))
def test_any_folder_is_read_or_refused_in_one_line(found):
    with at_most_a_gibibyte():
        check_folder(found)


@pytest.mark.slow
@settings(max_examples=8000, **SETTINGS)
@given(damaged())
def test_thousands_of_files(data):
    with at_most_a_gibibyte():
        check_read(data)


@pytest.mark.slow
@settings(max_examples=2000, **SETTINGS)
@given(entries(2))
def test_thousands_of_folders(found):
    with at_most_a_gibibyte():
        check_folder(found)
