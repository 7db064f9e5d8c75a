"""What the commands print with: results on standard output, progress and messages on standard error.

Of several processes under a launcher only the main one prints; each prints errors that are its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon.distributed import is_main_process
from normsurgeon.printable import printable
from normsurgeon.render.text import plain_table

MIN_COLUMN = 8
"""Characters below which a column breaks words into pieces."""
_NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?( %)?")


class _Console(Console):
    """A console that obeys no control characters of what it is to print: names in files may hold them.

    It leaves a broken pipe to the boundary, where rich would leave with exit code 1.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def out() -> Console:
    """Standard output. Made each time, so that a redirected stream is honoured."""
    return _Console(highlight=False, quiet=not is_main_process())


def err() -> Console:
    """Standard error."""
    return _Console(stderr=True, highlight=False, quiet=not is_main_process())


def program() -> str:
    """How to call this program again: by its name where that is on the PATH, else as it was called this time."""
    called = os.path.relpath(sys.argv[0])
    return called if shutil.which("normsurgeon") is None and called.endswith("normsurgeon") else "normsurgeon"


def print_message(message: str) -> None:
    """A message for the person at the terminal; keeps out of standard output."""
    err().print(message, style="dim", markup=False, soft_wrap=True)


def error_line(message: str) -> None:
    """An error, on one line."""
    console = _Console(stderr=True, highlight=False)
    console.print("error: ", style="bold red", end="")
    console.print(" ".join(message.split()), markup=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document on standard output and nothing else."""
    if not is_main_process():
        return
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A rich table at a terminal; aligned plain text in a pipe, where nothing may be cut off.

    On a terminal that is too narrow for the columns each row is a block of lines.
    """
    console = out()
    if not is_main_process():
        return
    if not console.is_terminal:
        if title:
            print(printable(title))
        print(plain_table(header, rows))
        return
    used = [i for i in range(len(header)) if any(row[i] not in (None, "") for row in rows)]
    rows = [[None if cell is None else printable(str(cell), keep="") for cell in row] for row in rows]
    widths = [max(len(header[i]), *(len(str(row[i] or "")) for row in rows)) for i in used]
    if sum(min(width, MIN_COLUMN) + 3 for width in widths) + 1 > console.width:
        _print_blocks(console, [header[i] for i in used], [[row[i] for i in used] for row in rows], title)
        return
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i in used:
        numbers = all(row[i] in (None, "") or _NUMBER.fullmatch(str(row[i])) for row in rows)
        table.add_column(Text(header[i]), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if row[i] is None else str(row[i])) for i in used))  # brackets in names are no markup
    console.print(table)


def _print_blocks(console: Console, header: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None) -> None:
    if title:
        console.print(Text(title, "bold"))
    for first, *rest in rows:
        console.print(Text(str(first), "bold"))
        for name, value in zip(header[1:], rest, strict=True):
            if value not in (None, ""):
                console.print(Text.assemble((f"  {name}: ", "dim"), str(value)))


@contextmanager
def progress(first: str = "starting", figures: Callable[[Progress], str] = lambda step: "") -> Iterator[OnProgress]:
    """A bar on standard error, at a terminal only: call what it yields after each step.

    first    what is done until then
    figures  what the bar also shows after a step
    """
    console = err()
    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or not is_main_process(),
    )
    with bar:
        task = bar.add_task(first, total=None, figures="")

        def show(step: Progress) -> None:
            bar.update(task, description=step.stage, completed=step.done, total=step.total, figures=figures(step))

        yield show


@contextmanager
def status(description: str) -> Iterator[None]:
    """A spinner on standard error, at a terminal only."""
    console = err()
    if console.is_terminal and is_main_process():
        with console.status(description):
            yield
    else:
        yield
