"""Batches: every image once, what cannot be read left out, the caller's random state left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import put
from hypothesis import given
from hypothesis import strategies as st

from normsurgeon.data.batches import Batches
from normsurgeon.data.sources import open_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import UsageError

SMALL = DataConfig(input_size=(3, 8, 8), crop_pct=1.0)


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ten")
    for number in range(10):
        put(folder / f"c{number}" / "1.png", 20 * number)
    return folder


@given(size=st.integers(1, 12), limit=st.none() | st.integers(1, 12))
def test_batches_hold_every_image_once_whatever_their_size(ten, size, limit):
    batches = Batches(open_source(ten), SMALL, batch_size=size, max_images=limit)
    labels = [number for images, labels in batches for number in labels.tolist()]
    take = min(10, limit or 10)
    assert labels == [number * 10 // take for number in range(take)]  # spread evenly over the classes
    assert batches.total == take


def test_batches_leave_out_what_cannot_be_read(tmp_path):
    put(tmp_path / "ape" / "1.png", 100)
    (tmp_path / "ape" / "2.png").write_text("no image")
    put(tmp_path / "bee" / "1.png", 200)
    batches = Batches(open_source(tmp_path), SMALL, batch_size=2)
    for _ in range(2):  # again: the list is of the last iteration
        assert [(len(images), labels.tolist()) for images, labels in batches] == [(1, [0]), (1, [1])]
        assert batches.skipped == ["ape/2.png"]


def test_worker_processes_give_the_same_batches(ten):
    (ten / "c3" / "2.png").write_text("no image")
    alone, helped = (Batches(open_source(ten), SMALL, batch_size=4, workers=n) for n in (0, 2))
    for (ours, our_labels), (theirs, their_labels) in zip(alone, helped, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(our_labels, their_labels)
    assert alone.skipped == helped.skipped == ["c3/2.png"]
    (ten / "c3" / "2.png").unlink()


def test_batches_do_not_touch_the_caller_s_random_state(ten):
    before = torch.get_rng_state()
    list(Batches(open_source(ten), SMALL))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"max_images": 0}, "^max_images=0 must be at least 1$"),
    ],
)
def test_wrong_batch_options_are_refused(ten, options, message):
    with pytest.raises(UsageError, match=message):
        Batches(open_source(ten), SMALL, **options)
