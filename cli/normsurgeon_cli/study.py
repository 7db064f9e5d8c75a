"""normsurgeon study: norms compared over a grid of settings, as an experiment that can be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normsurgeon.errors import TrainingError, UsageError
from normsurgeon.render.document import Column, Table
from normsurgeon.render.formatting import duration
from normsurgeon_cli import options
from normsurgeon_cli.console import err, out, print_json, print_message, print_table, progress, status
from normsurgeon_cli.lines import Lines

if TYPE_CHECKING:
    from normsurgeon._util.progress import Progress
    from normsurgeon.study.grid import Grid

EXAMPLES = (
    "normsurgeon study quick.yaml",
    "normsurgeon study grid.yaml -o results --jobs 4 --html results.html",
)


def study(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="A grid as a YAML file (docs/study.md), or one that is shipped: quick.yaml, batch-size.yaml, "
            "activations.yaml, preprocessing.yaml.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where results go. Default: study-NAME."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and about how long they take; run none.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, metavar="N", help="Cells at once. Default: one for each core."),
    ] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="local, or ray: on a Ray cluster.")] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="auto, or ray://HOST:10001. Default: Ray here."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: GPUs where there are any.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The report. Default: report.html in the results."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Train every cell of a grid of settings, and report what the norms differ in, with intervals.

    The same command goes on with a study that was stopped.
    """
    from normsurgeon.study.grid import find_config, read_grid

    if ray_address is not None and engine != "ray":
        raise UsageError("--ray-address goes with --engine ray")
    if html is not None and html.suffix != ".html":
        raise UsageError(f"{html}: the report is a page, and its name must end in .html")
    grid = read_grid(find_config(config))
    if dry_run:
        _dry_run(grid, jobs, json)
        return
    folder = output or Path(f"study-{grid.name}")
    pages = (html or folder / "report.html", folder / "answer.json")
    for path in (
        pages if not (folder / "results.sqlite").exists() else ()
    ):  # else the study goes on, and so does its page
        if path.parent.is_dir():
            options.check_output(path, force, (config,))
    with status(f"checking the {len(grid.cells())} cells of {grid.name} …"):
        from normsurgeon.study.run import run_study
    try:
        with _view(grid) as (on_progress, on_message):
            report = run_study(
                grid,
                folder,
                jobs=jobs,
                engine=engine,
                ray_address=ray_address,
                device=device,
                on_message=on_message,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        print_message(f"stopped; what is done is in {folder}, and the same command goes on")
        raise
    page, _ = (report.save(path) for path in pages)
    if json:
        print_json(report.to_dict())
    else:
        from normsurgeon.render.terminal import print_document

        print_document(report.document(), out())
    if not report.results.counts()["done"]:
        raise TrainingError(f"no cell of {grid.name} has a result; the reasons are above and in {page}")
    print_message(f"wrote {page}; every number is in {folder / 'answer.json'} and {folder / 'results.sqlite'}")


def _dry_run(grid: Grid, jobs: int | None, json: bool) -> None:
    with status("loading data sets and networks …"):
        from normsurgeon.study.engines import default_jobs
        from normsurgeon.study.records import AXES, varying_axes
        from normsurgeon.study.run import check, estimate_seconds

        impossible = check(grid)
    cells = grid.cells()
    possible = [cell for cell in cells if cell not in impossible]
    jobs = jobs or default_jobs("cpu")
    with progress("timing a few updates") as show:
        seconds = estimate_seconds(grid, possible, jobs, show)
    if json:
        listed = [{**cell.to_dict(), "key": cell.key, "impossible": impossible.get(cell)} for cell in cells]
        print_json({"study": grid.name, "cells": listed, "seconds": seconds, "jobs": jobs})
        return
    varying = varying_axes(cells) or ("norm",)
    columns = (*(Column(axis.replace("_", " ")) for axis in varying), Column("skipped because"))
    rows = ((*(cell.label(axis) for axis in varying), impossible.get(cell)) for cell in cells)
    print_table(Table(columns, tuple(rows)))
    same = ", ".join(f"{axis.replace('_', ' ')} {cells[0].label(axis)}" for axis in AXES if axis not in varying)
    skipped = f", {len(impossible)} of them impossible" if impossible else ""
    console = out()
    console.print(f"{len(cells)} cells{skipped}; all: {same}", markup=False, soft_wrap=True)
    many = "process" if jobs == 1 else "processes"
    console.print(f"about {duration(max(60, seconds))} in {jobs} {many} on this machine's CPU", soft_wrap=True)


@contextmanager
def _view(grid: Grid) -> Iterator[Any]:
    """At a terminal a bar for the study and one for each running cell; elsewhere a line for each that is done, and how
    far the study has come."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from normsurgeon.study.records import varying_axes

    console = err()
    live = console.is_terminal
    cells = grid.cells()
    varying = varying_axes(cells)
    bar = Bars(
        TextColumn("{task.description}", markup=False),  # brackets in names are no markup
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not live,
    )
    tasks: dict[Any, Any] = {}

    def on_message(message: str) -> None:
        console.print(message, style="dim", markup=False, soft_wrap=True)  # above the bars, which share the console

    def name(cell: Any) -> str:
        return " · ".join(f"{axis.replace('_', ' ')} {cell.label(axis)}" for axis in varying) or cell.norm

    shares: dict[Any, float] = {}
    lines = Lines(grid.name, on_message)

    with bar, nullcontext() if live else lines:
        whole = bar.add_task(grid.name, total=len(cells))

        def on_progress(step: Progress) -> None:
            cell, outcome = step.details["cell"], step.details["outcome"]
            label = f"{step.stage}: {name(cell)}" if step.stage == "pretraining" else name(cell)
            bar.update(whole, completed=step.done)
            shares[cell] = step.details["share"]
            if outcome is not None:
                del shares[cell]
            lines.update(f"{grid.name}, {step.stage}", step.done + sum(shares.values()), step.total)
            if outcome is None:
                if cell not in tasks:
                    tasks[cell] = bar.add_task(label, total=100)
                bar.update(tasks[cell], completed=round(100 * step.details["share"]))
                return
            if cell in tasks:
                bar.remove_task(tasks.pop(cell))
            accuracy = outcome.accuracy
            result = f"{100 * accuracy:.2f} %" if accuracy is not None else f"{outcome.status}: {outcome.reason}"
            if not live or outcome.status != "done":
                on_message(f"{step.done}/{step.total}  {label}: {result}  ({outcome.seconds:.0f} s)")

        yield on_progress, on_message
