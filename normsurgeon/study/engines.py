"""Where cells run: one after the other, in parallel processes of this machine, or on a Ray cluster.

An engine takes cells and yields their outcomes, in any order. Every cell is a function of itself alone, computed by
one thread on CPUs, so all engines give the same numbers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from normsurgeon._util.one_line import one_line
from normsurgeon._util.stopping import interruption
from normsurgeon.data.datasets import clear_caches
from normsurgeon.errors import EnvironmentProblem, TrainingStopped, UsageError
from normsurgeon.study.cell import OnShare, network_file, run_cell
from normsurgeon.study.grid import Grid
from normsurgeon.study.records import Cell, Outcome

TICK = 0.5
"""Seconds between two reports of a cell's progress."""

OnCell = Callable[[Cell, float], None]
"""Called with a running cell and the share of it that is done."""
Outcomes = Generator[Outcome, None, None]
News = Cell | Outcome | Exception | None
"""A cell that starts on Ray, what came of one, or why Ray ended: of an error, or (None) all is done."""


@dataclass(frozen=True)
class Work:
    """What every worker needs: the grid, the folder for kept networks (or None), the device (or None), and the folder
    of the networks that converted cells start from (or None)."""

    grid: Grid
    networks: Path | None = None
    device: str | None = None
    originals: Path | None = None

    def run(self, cell: Cell, on_share: OnShare | None = None) -> Outcome:
        """Run a cell; ``on_share`` is called twice a second with the share that is done."""
        last = time.monotonic()

        def report(share: float) -> None:
            nonlocal last
            if on_share is not None and time.monotonic() - last >= TICK:
                last = time.monotonic()
                on_share(share)

        keep = network_file(self.networks, cell) if self.networks else None
        return run_cell(self.grid, cell, keep=keep, originals=self.originals, device=self.device, on_share=report)


def serial(work: Work, cells: Sequence[Cell], on_cell: OnCell) -> Outcomes:
    """One cell after the other, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cell in cells:
            yield work.run(cell, lambda share, cell=cell: on_cell(cell, share))  # type: ignore[misc]
    except TrainingStopped as stopped:  # its advice is about fine-tuning
        raise interruption(stopped.signal) from stopped
    finally:
        torch.set_num_threads(threads)
        clear_caches()


class _Worker:
    """A pool of one process, which runs one cell at a time: if it breaks, it is clear which cell broke it."""

    def __init__(self, work: Work, number: int) -> None:
        devices = torch.cuda.device_count() if work.device in (None, "cuda") else 0
        work = replace(work, device=f"cuda:{number % devices}") if devices else work
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.shares, theirs = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(work, theirs))
        before = set(multiprocessing.active_children())
        with _sigint_blocked():  # from its first moment: Ctrl-C reaches it, too
            self.pool.submit(int)  # starts the process
        (self.process,) = set(multiprocessing.active_children()) - before
        theirs.close()
        self.cell: Cell

    def submit(self, cell: Cell) -> Future[Outcome]:
        self.cell = cell
        return self.pool.submit(_run, cell)

    def report(self, on_cell: OnCell) -> bool:
        """Pass on what the process has sent of its progress; whether it has sent anything."""
        sent = False
        try:
            while self.shares.poll():
                on_cell(self.cell, self.shares.recv())
                sent = True
        except (EOFError, OSError):  # it is gone; its future has that too
            pass
        return sent

    def death(self) -> str:
        self.process.join()
        for _ in range(100):  # the pool's own thread may have waited for it, and be about to note how it ended
            if self.process.exitcode is not None:
                break
            time.sleep(0.01)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"its process ended with exit code {code}"
        advice = "; was memory short? try fewer --jobs" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{advice}"


def _start_tracker() -> None:
    """Start Python's process that clears up semaphores: here, for it unblocks signals, and without its warning, which
    would be the last line of a program that a signal ended."""
    option = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(option)  # it starts with the same -W options
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(option)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A process that is started inside never gets SIGINT; here it comes afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def processes(work: Work, cells: Sequence[Cell], on_cell: OnCell, jobs: int) -> Outcomes:
    """In ``jobs`` processes. A process that dies fails its own cell alone, and another replaces it."""
    _start_tracker()
    waiting = deque(cells)
    workers: dict[Future[Outcome], _Worker] = {}
    started = False
    try:
        for number in range(min(jobs, len(cells))):
            worker = _Worker(work, number)
            workers[worker.submit(waiting.popleft())] = worker
        while workers:
            done, _ = wait(workers, timeout=TICK, return_when=FIRST_COMPLETED)
            for worker in workers.values():
                started = worker.report(on_cell) or started
            for future in done:
                worker = workers[future]
                try:
                    outcome = future.result()
                except (BrokenProcessPool, TrainingStopped) as error:
                    if not started:
                        raise EnvironmentProblem(
                            f"no worker can start: {worker.death()}; in a script, call run_study below "
                            "if __name__ == '__main__':, or give jobs=1"
                        ) from error
                    outcome = Outcome(worker.cell, "failed", worker.death())
                    worker = _Worker(work, worker.number) if waiting else worker
                del workers[future]
                if waiting:
                    workers[worker.submit(waiting.popleft())] = worker
                else:
                    worker.pool.shutdown(wait=False)
                yield outcome
    finally:
        for worker in workers.values():
            worker.process.kill()  # SIGTERM would be handled by fine-tuning; what is done is stored here


_here: tuple[Work, Connection]
"""In a worker process: what it works on, and where it sends its progress."""


def _begin(work: Work, shares: Connection) -> None:
    """Prepare a worker process. It ends with its parent, however that ends."""
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    _here = work, shares
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run(cell: Cell) -> Outcome:
    work, shares = _here
    shares.send(0.0)
    return work.run(cell, shares.send)


def on_ray(work: Work, cells: Sequence[Cell], on_cell: OnCell, jobs: int | None, address: str | None) -> Outcomes:
    """On the Ray cluster at ``address`` (``auto``, ``ray://host:10001``), or on one that is started here.

    jobs  cells at once; default: as many as the cluster has CPUs (or GPUs) for

    Ray runs in a thread of its own, in which no signal is handled: an interruption reaches the caller at once, and
    tears nothing of Ray's. Cells that run then are cancelled, and a cluster that was started here ends.

    :raises EnvironmentProblem: if Ray is not installed, or cannot start.
    :raises UsageError: if there is no cluster at that address.
    """
    news: SimpleQueue[News] = SimpleQueue()
    stop = threading.Event()
    thread = threading.Thread(target=_drive_ray, args=(work, cells, jobs, address, news.put, stop), name="ray")
    try:
        thread.start()
        while (each := _next(news)) is not None:
            if isinstance(each, Exception):
                raise each
            if isinstance(each, Cell):
                on_cell(each, 0.0)
            else:
                yield each
    finally:
        stop.set()
        while thread.is_alive():
            _take_sigterm_back()
            thread.join(RAY_TICK)
        _take_sigterm_back()


RAY_TICK = 0.01
"""Seconds between two looks at what Ray has done."""


def _next(news: SimpleQueue[News]) -> News:
    while True:  # in a function of its own: Python 3.11 leaves a continue out of the try around it
        _take_sigterm_back()
        try:
            return news.get(timeout=RAY_TICK)
        except Empty:
            continue


def _take_sigterm_back() -> None:
    """Ray's compiled code takes SIGTERM when it starts, to abort with a dump, and leaves it without a handler when it
    ends. Python, which is not asked, still knows whose it was."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _drive_ray(
    work: Work, cells: Sequence[Cell], jobs: int | None, address: str | None,
    tell: Callable[[News], None], stop: threading.Event,
) -> None:  # fmt: skip
    """Run cells until all are done or ``stop`` is set; ``tell`` of cells that start, of outcomes, and of the end."""
    try:
        for each in _cells_on_ray(work, cells, jobs, address, stop):
            tell(each)
        tell(None)
    except Exception as error:
        tell(error)


def _cells_on_ray(
    work: Work, cells: Sequence[Cell], jobs: int | None, address: str | None, stop: threading.Event
) -> Iterator[Cell | Outcome]:
    try:
        import ray
    except ImportError as error:
        raise EnvironmentProblem("--engine ray takes Ray; try: pip install 'normsurgeon[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        _start_ray(ray, jobs, address)
    running: dict[Any, Cell] = {}
    try:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) and work.device in (None, "cuda") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_run_remotely)
        waiting = deque(cells)
        limit = jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
        while (waiting or running) and not stop.is_set():
            while waiting and len(running) < limit:
                cell = waiting.popleft()
                running[remote.remote(work, cell)] = cell
                yield cell
            done, _ = ray.wait(list(running), timeout=TICK)
            for reference in done:
                cell = running.pop(reference)
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield Outcome(cell, "failed", f"Ray: {one_line(error, 300, kind=False)}")
    finally:
        for reference in running:
            ray.cancel(reference, force=True)  # a gentle end would be caught by fine-tuning
        if ours:
            ray.shutdown()


def _start_ray(ray: Any, jobs: int | None, address: str | None) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # its 15 starves workers next to anything else that computes
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="error", **options)
    except ConnectionError as error:
        raise UsageError(f"there is no Ray cluster at {address}; try --ray-address auto, or none") from error
    except Exception as error:
        raise EnvironmentProblem(f"Ray cannot start ({one_line(error, 200)}); try --engine local") from error


def _run_remotely(work: Work, cell: Cell) -> Outcome:
    torch.set_num_threads(1)
    return work.run(cell)


def default_jobs(device: str | None) -> int:
    """Cells at once: one for each GPU if they run on GPUs, else one for each CPU that this process may use."""
    if device is not None and device.startswith("cuda:"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (torch.cuda.device_count() if device in (None, "cuda") else 0) or cores
