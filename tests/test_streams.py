"""Standard output that cannot be written never decides over what a command has done."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from normsurgeon_cli import streams

CONVERT = ("convert", "test_resnet", "--random-init", "--to", "gn", "--no-check", "-o", "net.safetensors")


class Broken(io.RawIOBase):
    """A stream that takes ``room`` bytes, and then none."""

    def __init__(self, room: int, error: int) -> None:
        self.room, self.error, self.taken = room, error, b""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        if len(self.taken) + len(data) > self.room:
            raise OSError(self.error, os.strerror(self.error))
        self.taken += bytes(data)
        return len(data)


@pytest.mark.parametrize(
    ("error", "reason"), [(errno.ENOSPC, "No space left on device"), (errno.EPIPE, None), (errno.EIO, os.strerror(5))]
)
def test_a_stream_that_fails_is_noted_and_gets_no_more(monkeypatch, error: int, reason: str | None) -> None:
    raw = Broken(10, error)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(streams, "_streams", {})
    streams.make_patient()
    print("0123456→", end="", flush=True)  # more than there is room for, once the arrow is an escape
    assert raw.taken == b""
    print("!", end="", flush=True)
    assert raw.taken == b""
    assert streams.why_nothing_was_shown() == reason


def test_a_character_that_the_encoding_does_not_have_is_an_escape(monkeypatch) -> None:
    raw = Broken(1000, errno.ENOSPC)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(streams, "_streams", {})
    streams.make_patient()
    print("bn → gn \udcff")
    assert streams.why_nothing_was_shown() is None
    assert raw.taken == b"bn \\u2192 gn \\udcff\n"


def shell(line: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command under a shell, in which ``"$@"`` stands for it."""
    command = (sys.executable, "-m", "normsurgeon_cli", *arguments)
    return subprocess.run(["sh", "-c", line, "sh", *command], cwd=folder, capture_output=True, text=True)


@pytest.mark.system
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('"$@" > /dev/full', "the files are written; standard output could not be shown: No space left on device"),
        ('"$@" >&-', None),
        ('"$@" <&- >&- 2>&-', None),
        ('PYTHONIOENCODING=ascii "$@"', None),
        ('{ "$@"; echo $? >&3; } 3>&2 2>&1 | head -c 1', "0"),
    ],
)
def test_a_file_that_is_written_is_success_whatever_becomes_of_the_output(tmp_path, line, said) -> None:
    done = shell(line, tmp_path, *CONVERT)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert (tmp_path / "net.safetensors").stat().st_size > 1_000_000
    if said is not None:
        assert done.stderr.splitlines()[-1] == said


@pytest.mark.system
def test_a_result_that_cannot_be_shown_and_is_in_no_file_is_an_error(tmp_path) -> None:
    done = shell('"$@" > /dev/full', tmp_path, "inspect", "test_resnet")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: cannot write to standard output: No space left on device"


@pytest.mark.system
def test_a_current_folder_that_is_gone_is_one_line(tmp_path) -> None:
    done = shell('mkdir gone; cd gone; rmdir ../gone; "$@"', tmp_path, *CONVERT)
    line = "error: the current folder has been removed: change to one that is there\n"
    assert (done.returncode, done.stderr) == (1, line)
