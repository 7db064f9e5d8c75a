"""Ctrl-C and SIGTERM end the program at once, wherever it is: one line, exit code 130 or 143, no half-written file.

An exception would not do: compiled code that calls Python swallows some, as importing torch does, and imports that are
torn in two print tracebacks. Work that can save what it has (fine-tuning, an analysis, a study) catches the signals
itself meanwhile. Nothing heavy is imported here, so that this is in place first.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # without the enumerations, which take as long as Python
import atexit
import os
import sys

TYPE_CHECKING = False  # typing's own takes milliseconds, in which a signal would give a traceback
if TYPE_CHECKING:
    from collections.abc import Callable

LINE = "error: interrupted: nothing half-written is left behind\n"

before_the_end: list[Callable[[], None]] = []
"""What is called before the process ends: parts of files are removed."""

_state = {"process": 0, "silent": False}


def end_at_signals() -> None:
    """Let SIGINT and SIGTERM end this process from now on."""
    _state["process"] = os.getpid()
    atexit.register(_ignore)  # called last: afterwards Python puts back what would end it with another code
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is not signal.SIG_IGN:  # nohup and the like decide
            signal.signal(each, _end)


def say_nothing() -> None:
    """End without the line: another of several processes prints it."""
    _state["silent"] = True


def done(code: int) -> None:
    """All is done: a signal from now on only hastens the end, and changes nothing of what the program leaves with."""
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is _end:
            signal.signal(each, lambda number, frame: os._exit(code))


def _ignore() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def _end(number: int, frame: object) -> None:
    if os.getpid() == _state["process"]:  # else one that was forked, to read images: the first one tells
        for clean in (*before_the_end, _end_children):
            try:
                clean()
            except Exception:  # what cannot be cleaned does not keep the process
                continue
        if not _state["silent"]:
            bar = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # a bar hides the cursor
            try:  # noqa: SIM105 (contextlib is not imported yet)
                os.write(2, (bar + LINE).encode())
            except OSError:
                pass
    os._exit(128 + number)


def _end_children() -> None:
    multiprocessing = sys.modules.get("multiprocessing")
    for child in multiprocessing.active_children() if multiprocessing is not None else ():
        child.kill()
