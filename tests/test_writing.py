"""Writing: all of the new file, or what stood there before."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

import normsurgeon as ns
from normsurgeon._util.parts import lock, part_of, remove_own_parts, remove_stale_parts, unlock
from normsurgeon.errors import UsageError, WriteError

ENDINGS = (".safetensors", ".pt")


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return ns.load("test_resnet", pretrained=False)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_midway_leaves_the_old_file(resnet, tmp_path, monkeypatch, ending, step: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / f"net{ending}"
    path.write_bytes(b"what stood there")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(WriteError) as caught:
        ns.save(resnet, path)
    assert str(caught.value) == f"cannot write {path}: No space left on device; nothing was written"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"what stood there"


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        (".safetensors", "File too large"),
        (".pt", r"the file could not be written to its end \(is the disk full\?\)"),
    ],
)
def test_a_file_that_outgrows_its_limit_leaves_the_old_file(resnet, tmp_path, ending: str, why: str) -> None:
    path = tmp_path / f"net{ending}"
    path.write_bytes(b"what stood there")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(WriteError, match=f"cannot write {path}: {why}; nothing was written$"):
            ns.save(resnet, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"what stood there"


def test_an_interrupted_write_leaves_nothing(resnet, tmp_path, monkeypatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        ns.save(resnet, tmp_path / "net.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_flushed_does_not_undo_a_complete_file(resnet, tmp_path, monkeypatch) -> None:
    flush = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert isinstance(ns.load(ns.save(resnet, tmp_path / "net.pt")), nn.Module)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_written_file_has_the_rights_that_the_umask_gives(resnet, tmp_path, ending: str) -> None:
    before = os.umask(0o027)
    try:
        path = ns.save(resnet, tmp_path / f"net{ending}")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_missing_folder_is_named(resnet, tmp_path) -> None:
    path = tmp_path / "nowhere" / "net.pt"
    with pytest.raises(WriteError, match=f"^cannot write {path}: there is no folder {path.parent}$"):
        ns.save(resnet, path)


def test_a_path_that_is_a_folder_is_an_error(resnet, tmp_path) -> None:
    path = tmp_path / "net.pt"
    path.mkdir()
    with pytest.raises(WriteError, match=f"^cannot write {path}: it is a folder$"):
        ns.save(resnet, path)


def test_tensors_that_share_memory_are_written_whole(tmp_path: Path) -> None:
    from normsurgeon.models.state_dict import read_file, write_safetensors

    base = torch.arange(12.0).reshape(3, 4)
    state = {"whole": base, "again": base, "row": base[1], "transposed": base.T, "nothing": torch.empty(0)}
    write_safetensors(tmp_path / "a.safetensors", state, {})
    found, _ = read_file(tmp_path / "a.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_another_ending_is_refused_before_anything_is_written(resnet, tmp_path) -> None:
    with pytest.raises(
        UsageError, match=r"net\.bin: the ending says the format, and must be \.safetensors, \.pt or \.pth$"
    ):
        ns.save(resnet, tmp_path / "net.bin")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_another_one_writes_is_not(resnet, tmp_path) -> None:
    path = tmp_path / "net.safetensors"
    stale, older, other = (
        tmp_path / f".{name}.part" for name in ("net.safetensors.1a", "net.safetensors.2b", "a.pt.3c")
    )
    stale.mkdir()
    (stale / ".tmpAbCdEf").write_bytes(b"half")
    older.write_bytes(b"half of a file, as earlier versions left it")
    other.mkdir()
    with part_of(path) as part:  # of a writer that is at work
        part.write_bytes(b"half")
        ns.save(resnet, path)
        assert part.exists()
    assert {file.name for file in tmp_path.iterdir()} == {path.name, other.name}
    remove_stale_parts(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_part_is_removed_before_a_signal_ends_the_process(tmp_path) -> None:
    with part_of(tmp_path / "net.pt") as part:
        part.write_bytes(b"half")
        remove_own_parts()
        assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_by_one_until_it_is_released(tmp_path) -> None:
    path = tmp_path / "run.lock"
    handle = lock(path)
    assert handle is not None
    assert lock(path) is None
    path.unlink()
    unlock(handle)
    again = lock(path)
    assert again is not None
    assert path.exists()
    unlock(again)
