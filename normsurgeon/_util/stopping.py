"""SIGINT (Ctrl-C) and SIGTERM: noted, for work that saves what it has, or raised, for work that saves as it goes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from normsurgeon.errors import STOPPED


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would raise a KeyboardInterrupt."""

    exit_code = STOPPED["SIGTERM"]


def interruption(name: str | None) -> KeyboardInterrupt:
    """What a signal raises. SIGINT raises just what Python raises: an uncaught subclass of it ends Python with 1, and a
    shell's loop would go on."""
    return Terminated() if name == "SIGTERM" else KeyboardInterrupt()


def signal_of(error: KeyboardInterrupt) -> str:
    """The signal that raised it."""
    return "SIGTERM" if isinstance(error, Terminated) else "SIGINT"


class Stop:
    """Whether a signal asked the work to stop, and which."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """A Stop that SIGINT and SIGTERM set. The second one is no longer caught here: it ends the process.

    In another thread than the main one, where Python allows no handlers, nothing is caught.
    """
    stop = Stop()

    def note(name: str) -> None:
        stop.signal = name
        put_back()

    with _caught(note) as put_back:
        yield stop


@contextmanager
def interrupted_by_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM raise a KeyboardInterrupt in the main thread; the Stop tells it to what cannot be interrupted.

    An exception may be lost, in a callback that must not raise: whoever runs for long looks at the Stop, too.
    """
    stop = Stop()

    def interrupt(name: str) -> None:
        stop.signal = name
        raise interruption(name)

    with _caught(interrupt):
        yield stop


@contextmanager
def _caught(handle: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    before: dict[signal.Signals, object] = {}

    def put_back() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]

    if threading.current_thread() is threading.main_thread():
        for each in (signal.Signals[name] for name in STOPPED):
            if signal.getsignal(each) is signal.SIG_IGN:  # a job in the background, which Ctrl-C does not mean
                continue
            before[each] = signal.signal(each, lambda number, frame: handle(signal.Signals(number).name))
    try:
        yield put_back
    finally:
        put_back()
