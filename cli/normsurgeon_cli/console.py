"""What the commands print with: results on standard output, progress and messages on standard error.

Of several processes under a launcher only the main one prints; each prints errors that are its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.segment import Segment

from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon.distributed import is_main_process
from normsurgeon.printable import printable
from normsurgeon.render.document import Document, Section, Table
from normsurgeon.render.formatting import DASH, percent
from normsurgeon.render.terminal import print_document
from normsurgeon_cli.lines import Lines

if TYPE_CHECKING:
    from normsurgeon.inference.evaluate import Evaluation


class _Console(Console):
    """A console that obeys no control characters of what it is to print: names in files may hold them."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich, which would drop a bell or a backspace in a text, and name another file than there is."""
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


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


def print_table(table: Table) -> None:
    """A table with all of its columns; in a pipe as aligned plain text."""
    print_document(Document("", "", (Section("", "", (replace(table, whole=True),)),)), out())


def score_rows(reference: str, *scored: Evaluation) -> Iterator[tuple[str, ...]]:
    """A row for each number that the last of the evaluations has; ``reference`` is what they are compared with."""
    for title, name, form in (
        ("top-1", "top1", percent),
        ("top-5", "top5", percent),
        ("mean loss", "loss", "{:.4f}".format),
        (f"agreement with the {reference}", "agreement", percent),
        (f"KL from the {reference} (nats)", "kl", "{:.4f}".format),
    ):
        values = [getattr(each, name) for each in scored]
        if values[-1] is not None:
            yield title, *(DASH if value is None else form(value) for value in values)


@contextmanager
def progress(first: str = "starting", figures: Callable[[Progress], str] = lambda step: "") -> Iterator[OnProgress]:
    """A bar on standard error, or lines where that is no terminal: call what it yields after each step.

    first    what is done until then
    figures  what the bar also shows after a step
    """
    console = err()
    if not console.is_terminal and is_main_process():
        with Lines(first, print_message) as lines:
            yield lambda step: lines.update(step.stage, step.done, step.total, figures(step))
        return
    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not is_main_process(),
    )
    with bar:
        task = bar.add_task(first, total=None, figures="")

        def show(step: Progress) -> None:
            bar.update(task, description=step.stage, completed=step.done, total=step.total, figures=figures(step))

        yield show


def status(description: str) -> AbstractContextManager[object]:
    """A spinner on standard error, or lines where that is no terminal."""
    console = err()
    return console.status(description) if console.is_terminal else Lines(description, print_message)
