"""What the benchmarks share: time, peaks of memory, processes, tables, and results that outlive an interrupted run."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample"
"""500 images in ImageNet class folders, next to the project."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line whose help is the script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def brief(error: BaseException, limit: int = 160) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alternating(repeats: int, functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """The times of each function, taken in turns (forwards, then backwards) after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name in list(functions)[:: -1 if repeat % 2 else 1]:
            spent = seconds(functions[name])
            if repeat:  # the first round pays for imports and allocation
                times[name].append(spent)
    return times


def medians(repeats: int, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median time of each function, from ``alternating``."""
    return {name: statistics.median(times) for name, times in alternating(repeats, functions).items()}


def peak_mib() -> float:
    """The peak resident size of this process in MiB.

    Not ``ru_maxrss``: that begins at the size of the process that started this one.
    """
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))


def in_a_process(function: Callable[..., Any], *arguments: object, limit: float | None = None) -> Any:
    """What ``function`` returns in a new process, which is ended after ``limit`` seconds.

    :raises RuntimeError: if it takes longer, or the process ends without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise RuntimeError(f"took more than {limit} s")
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with {process.exitcode} (out of memory?)") from None
    finally:
        process.kill()
        process.join()


def _send(connection: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(function(*arguments))


def row(cells: Iterable[object]) -> str:
    """One row of a Markdown table; whole numbers get thousands separators, None is an empty cell."""
    texts = ("" if c is None else f"{c:,}" if isinstance(c, int) else str(c).replace("|", "/") for c in cells)
    return f"| {' | '.join(texts)} |"


def head(columns: Sequence[str], texts: Iterable[int] = (0,)) -> str:
    """The first two rows of a Markdown table; the columns numbered ``texts`` align left, all others right."""
    left = set(texts)
    return f"{row(columns)}\n|{'|'.join('---' if i in left else '---:' for i in range(len(columns)))}|"


def table(columns: Sequence[str], rows: Iterable[Iterable[object]], texts: Iterable[int] = (0,)) -> str:
    """A Markdown table."""
    return "\n".join([head(columns, texts), *map(row, rows)])


def records(file: Path | None) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; a line that was half written when a run was stopped is left out."""
    for line in file.read_text().splitlines() if file is not None and file.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append(file: Path | None, record: dict[str, Any]) -> None:
    """Add a record, on a line of its own even after one that is half written."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
    with file.open("a") as stream:
        stream.write(("" if whole else "\n") + json.dumps(record) + "\n")
