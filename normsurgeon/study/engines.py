"""Where cells run: one after the other, in parallel processes of this machine, or on a Ray cluster.

An engine takes cells and yields their outcomes, in any order. Every cell is a function of itself alone, computed by
one thread on CPUs, so all engines give the same numbers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from normsurgeon.errors import EnvironmentProblem, TrainingStopped
from normsurgeon.study.grid import Grid
from normsurgeon.study.preparing import forget
from normsurgeon.study.records import Cell, Outcome
from normsurgeon.study.running import run_cell, work_file

TOLD_EVERY = 0.5
"""Seconds between two words about a cell's progress."""

READY = "ready"
"""A worker's first word."""


@dataclass(frozen=True)
class Work:
    """What every worker knows: the grid, the folder for kept networks (or None), the device (or None), and the folder
    of the networks that converted cells begin from (or None)."""

    grid: Grid
    networks: Path | None = None
    device: str | None = None
    originals: Path | None = None

    def do(self, cell: Cell, tell: Callable[[float], None] | None = None) -> Outcome:
        """Run a cell; ``tell`` hears the share that is done, twice a second."""
        last = time.monotonic()

        def listen(row: Any) -> None:
            nonlocal last
            if tell is not None and time.monotonic() - last >= TOLD_EVERY:
                last = time.monotonic()
                tell(row.done / row.total)

        keep = work_file(self.networks, cell) if self.networks else None
        return run_cell(self.grid, cell, keep=keep, originals=self.originals, device=self.device, on_progress=listen)


Told = Callable[[Cell, float], None]


def serial(work: Work, cells: Sequence[Cell], told: Told) -> Generator[Outcome, None, None]:
    """One cell after the other, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cell in cells:
            yield work.do(cell, lambda share, cell=cell: told(cell, share))  # type: ignore[misc]
    except TrainingStopped as stopped:  # its advice is finetune's
        raise KeyboardInterrupt from stopped
    finally:
        torch.set_num_threads(threads)
        forget()


def processes(work: Work, cells: Sequence[Cell], told: Told, jobs: int) -> Generator[Outcome, None, None]:
    """In so many processes. A process that dies takes its cell with it, as failed, and another takes its place."""
    waiting = list(reversed(cells))
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[Any, Cell]] = {}
    numbers: dict[Connection, int] = {}  # of the workers, which say whose GPU is whose
    begun = False
    devices = torch.cuda.device_count() if work.device in (None, "cuda") else 0

    def start(number: int) -> tuple[Connection, Any]:
        ours, theirs = context.Pipe()
        device = f"cuda:{number % devices}" if devices else work.device
        process = context.Process(target=_serve, args=(theirs, replace(work, device=device)), daemon=True)
        process.start()
        theirs.close()
        numbers[ours] = number
        return ours, process

    def give(connection: Connection, process: Any) -> None:
        cell = waiting.pop()
        running[connection] = process, cell
        with suppress(OSError):  # a process that is gone is found below
            connection.send(cell)

    try:
        for number in range(min(jobs, len(cells))):
            give(*start(number))
        while running:
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                process, cell = running[ready]
                try:
                    message = ready.recv()
                except (EOFError, OSError):
                    process.join()
                    if not begun:
                        raise EnvironmentProblem(
                            f"no worker can start: {_death(process.exitcode)}; in a script, call run_study below "
                            "if __name__ == '__main__':, or give jobs=1"
                        ) from None
                    del running[ready]
                    yield Outcome(cell, "failed", _death(process.exitcode))
                    if waiting:
                        give(*start(numbers.pop(ready)))
                    continue
                begun = True
                if message == READY:
                    continue
                if isinstance(message, float):
                    told(cell, message)
                    continue
                del running[ready]
                yield message
                if waiting:
                    give(ready, process)
                else:
                    ready.send(None)
                    ready.close()
    finally:
        for process, _ in running.values():
            process.kill()  # SIGTERM would be fine-tuning's to take care of; what is done is stored here


def cores() -> int:
    """How many CPUs this process may use.

    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_jobs(device: str | None) -> int:
    """Cells at once: one for each GPU where they run on GPUs, else one for each core.

    >>> usual_jobs("cpu") == cores(), usual_jobs("cuda:1")
    (True, 1)
    """
    if device is not None and device.startswith("cuda:"):
        return 1
    return (torch.cuda.device_count() if device in (None, "cuda") else 0) or cores()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; was memory short? try fewer --jobs" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {code}"


def _serve(connection: Connection, work: Work) -> None:
    """A worker: cells come, outcomes go, until None comes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)
    parent = os.getppid()

    def tell(share: float) -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody waits for the answer
        connection.send(share)

    try:
        connection.send(READY)
        while (cell := connection.recv()) is not None:
            connection.send(work.do(cell, tell))
    except (EOFError, OSError, KeyboardInterrupt, TrainingStopped):
        pass
