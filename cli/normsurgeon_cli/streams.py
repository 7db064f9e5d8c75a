"""Standard output and standard error that never stop a command: what it computes and writes to files decides.

A reader that has gone (``| head``), a full disk and a closed stream are noted and told at the end; a character that the
terminal's encoding does not have is shown as an escape.
"""

from __future__ import annotations

import errno
import io
import os
import sys


class _Patient(io.RawIOBase):
    """A stream whose writes always succeed; ``error`` is the first that did not."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self.raw = raw
        self.error: OSError | None = None

    def write(self, data: object) -> int | None:
        """Write, or take note; after an error nothing more is written."""
        size = len(memoryview(data))  # type: ignore[arg-type]
        if self.error is None:
            try:
                return self.raw.write(data)  # type: ignore[arg-type]
            except OSError as error:
                self.error = error
        return size

    def writable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """As the stream itself."""
        return self.raw.isatty()

    def fileno(self) -> int:
        """As the stream itself."""
        return self.raw.fileno()


_streams: dict[str, _Patient] = {}


def make_patient() -> None:
    """Let ``sys.stdout`` and ``sys.stderr`` be such streams from now on."""
    for number in range(3):  # where one is closed, the next file to be opened would take its place
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream: io.TextIOWrapper | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            continue
        raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
        if not isinstance(raw, io.RawIOBase):
            continue
        _streams[name] = _Patient(raw)
        patient = io.TextIOWrapper(
            io.BufferedWriter(_streams[name]),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, patient)


def why_nothing_was_shown() -> str | None:
    """Why standard output could not be written to its end; None if it was, or if its reader has gone on purpose."""
    sys.stdout.flush()
    failed = _streams["stdout"].error if "stdout" in _streams else None
    if failed is None or failed.errno == errno.EPIPE:
        return None
    return failed.strerror or str(failed)
