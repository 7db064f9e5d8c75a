"""A study from its grid to its results: checked, run where it has not been run yet, stored cell by cell."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from normsurgeon.errors import UsageError
from normsurgeon.finetuning.checking import find_device
from normsurgeon.study.answer import Answer, answer
from normsurgeon.study.checking import check
from normsurgeon.study.engines import Work, processes, serial, usual_jobs
from normsurgeon.study.grid import Grid, read_grid
from normsurgeon.study.originals import original_data, originals_folder, originals_of
from normsurgeon.study.preparing import fingerprint, open_data
from normsurgeon.study.ray_engine import on_ray
from normsurgeon.study.records import Cell, Outcome, Results
from normsurgeon.study.running import lost_original, work_file
from normsurgeon.study.store import Store, open_store
from normsurgeon.version import __version__


@dataclass(frozen=True)
class Progress:
    """What is told while a study runs.

    done, total   cells with an outcome, of all
    cell, share   the one that this is about, and how much of it is done
    outcome       what came of it, once it is done
    original      whether the cell is no cell of the grid, but a BatchNorm network that others begin from
    """

    done: int
    total: int
    cell: Cell
    share: float
    outcome: Outcome | None = None
    original: bool = False


def run_study(
    config: Grid | Mapping[str, Any] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Answer:
    """Run every cell of a grid that has no result in ``output`` yet, and return what all of them say.

    config       a Grid, its dict, or a YAML file
    output       the folder of the results (``results.sqlite``), of kept networks, and of those that others begin from
    jobs         cells at once; default: as many as the machine has cores, 1: in this process
    engine       ``local``, or ``ray``: on the cluster at ``ray_address``, or on one that is started here
    device       where to train; default: GPUs where there are any, else the CPU, one thread a cell
    say          is told, in one line, of what goes on
    on_progress  is told of cells that begin, go on and end

    A study that was killed goes on where it was: cells that are done, diverged or impossible are kept, cells that
    failed, or were skipped and seem possible now, are tried again. Every cell is a function of its settings alone, so
    the results are those of an uninterrupted study, whatever ``jobs`` and ``engine`` are.

    :raises UsageError: a grid that cannot be, a device that is not here, or results in the folder of another training.
    :raises DataError: a data set that is not there: nothing is run.
    :raises LoadingError: a network that cannot be loaded: nothing is run.
    :raises KeyboardInterrupt: Ctrl-C or SIGTERM; what is done is stored.

    >>> import tempfile
    >>> grid = {"models": "resnet8", "norms": ["bn", "gn"], "datasets": "digits", "seeds": 1,
    ...         "training": {"steps": 2, "train_images": 64, "image_size": 8}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run_study(grid, folder, jobs=1).results.counts()
    {'done': 2, 'diverged': 0, 'failed': 0, 'skipped': 0}
    """
    grid = _grid(config)
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs={jobs} must be at least 1")
    if engine not in ("local", "ray"):
        raise UsageError(f"there is no engine {engine!r}; it is local or ray")
    if engine == "local":
        find_device(device)  # of a cluster, the workers know
    folder = Path(output)
    cells = grid.cells()
    impossible = check(grid)
    with open_store(folder) as store, _terminated_is_interrupted():
        _same_study(store, grid, folder, say)
        known = store.outcomes()
        networks = folder.resolve() / "networks" if grid.keep_checkpoints else None
        open_cells = [cell for cell in cells if not _settled(known.get(cell.key), grid, cell in impossible, networks)]
        if len(open_cells) < len(cells):
            say(f"{len(cells) - len(open_cells)} of {len(cells)} cells have their results in {folder} already")
        todo = [cell for cell in open_cells if cell not in impossible]
        originals = originals_folder(folder.resolve(), grid)
        work = Work(grid, networks, device, originals)
        done = len(cells) - len(open_cells)

        def told(cell: Cell, share: float, outcome: Outcome | None = None, original: bool = False) -> None:
            if on_progress is not None:
                on_progress(Progress(done, len(cells), cell, share, outcome, original))

        def take(outcome: Outcome) -> None:
            nonlocal done
            store.write(outcome)
            known[outcome.cell.key] = outcome
            done += 1
            told(outcome.cell, 1.0, outcome)

        for cell in open_cells:
            if cell in impossible:
                take(Outcome(cell, "skipped", impossible[cell]))
        lost: dict[Cell | None, Outcome] = {}
        if originals is not None:
            needed = [cell for cell in originals_of(grid, todo) if not work_file(originals, cell).is_file()]
            beneath = Work(grid.of_originals(), originals, device)
            for outcome in _originals(beneath, needed, told, jobs, engine, ray_address):
                if outcome.status != "done":
                    lost[outcome.cell] = outcome
        for cell in todo:
            if (without := lost.get(grid.original(cell))) is not None:
                take(Outcome(cell, "skipped" if without.status == "skipped" else "failed", lost_original(without)))
        todo = [cell for cell in todo if grid.original(cell) not in lost]
        if todo:
            with closing(_run(work, todo, told, jobs, engine, ray_address)) as outcomes:
                for outcome in outcomes:
                    take(outcome)
    outcomes_in_order = tuple(known[cell.key] for cell in cells)
    return answer(Results(grid.name, outcomes_in_order, grid.title, _shared(grid)))


def _shared(grid: Grid) -> dict[str, Any]:
    """What all cells share, as the report shows it; of a pretraining, what is its own."""
    shared = grid.training.to_dict()
    if grid.pretraining is None:
        return shared
    own = {key: value for key, value in grid.pretraining.to_dict().items() if shared.get(key, ...) != value}
    return {**shared, "pretraining": own}


def _originals(
    work: Work, cells: Sequence[Cell], told: Any, jobs: int | None, engine: str, address: str | None
) -> Iterator[Outcome]:
    """What comes of the networks that cells begin from: all are trained before the first of these cells."""
    if not cells:
        return

    def tell(cell: Cell, share: float, outcome: Outcome | None = None) -> None:
        told(cell, share, outcome, original=True)

    with closing(_run(work, cells, tell, jobs, engine, address)) as outcomes:
        for outcome in outcomes:
            tell(outcome.cell, 1.0, outcome)
            yield outcome


def _run(
    work: Work, cells: Sequence[Cell], told: Any, jobs: int | None, engine: str, address: str | None
) -> Generator[Outcome, None, None]:
    if engine == "ray":
        return on_ray(work, cells, told, jobs, address)
    jobs = jobs or usual_jobs(work.device)
    if jobs == 1:
        return serial(work, cells, told)
    return processes(work, cells, told, jobs)


def _grid(config: Grid | Mapping[str, Any] | str | os.PathLike[str]) -> Grid:
    if isinstance(config, Grid):
        return config
    return Grid.from_dict(config) if isinstance(config, Mapping) else read_grid(config)


def _settled(outcome: Outcome | None, grid: Grid, impossible: bool, networks: Path | None) -> bool:
    if outcome is None or outcome.status == "failed":
        return False
    if outcome.status == "skipped":  # for a reason that may be of that time alone, such as another device
        return impossible
    if outcome.status == "diverged":
        return True
    kept = networks is None or work_file(networks, outcome.cell).is_file()
    return kept and (not grid.analysis or outcome.looked is not None)


def _same_study(store: Store, grid: Grid, folder: Path, say: Callable[[str], None]) -> None:
    """Results of other settings or of other files are another study's."""
    facts = store.facts()
    now, before = grid.training.to_dict(), facts.get("training")
    if before is not None and before != now:
        raise UsageError(
            f"the results in {folder} were made with another training: {_changes(before, now)}; "
            "try another --output, or the settings of before"
        )
    began = None if grid.pretraining is None else grid.pretraining.to_dict()
    if "converted" not in grid.start:
        began = facts.get("pretraining")  # of cells that this grid leaves out
    elif began != (earlier := facts.get("pretraining")) and any(
        outcome.cell.start == "converted" for outcome in store.outcomes().values()
    ):
        changes = f": {_changes(earlier, began)}" if earlier and began else ""
        raise UsageError(
            f"the converted networks in {folder} began from others{changes}; "
            "try another --output, or the pretraining of before"
        )
    inputs, known = _inputs(grid), facts.get("inputs", {})
    for name in inputs:
        if known.get(name, inputs[name]) != inputs[name]:
            raise UsageError(f"the results in {folder} were made when {name} held something else; try another --output")
    versions = {name: version(name) for name in ("torch", "timm", "numpy")} | {"normsurgeon": __version__}
    older = facts.get("versions", versions)
    if older != versions:
        moved = ", ".join(
            f"{name} {older.get(name)} → {versions[name]}" for name in versions if older.get(name) != versions[name]
        )
        say(f"some results in {folder} were made with other versions ({moved}): numbers may differ slightly")
    store.state(
        {
            "name": grid.name,
            "title": grid.title,
            "training": now,
            "pretraining": began,
            "grid": grid.to_dict(),
            "inputs": {**known, **inputs},
            "versions": versions,
        }
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Settings that differ, each with both of its values."""
    names = dict.fromkeys((*before, *now))
    return ", ".join(f"{k} ({before.get(k)} → {now.get(k)})" for k in names if before.get(k) != now.get(k))


def _inputs(grid: Grid) -> dict[str, str]:
    """What the study reads, by the names in its grid: of data sets which images, of files of weights what they hold."""
    found = {}
    for name in grid.datasets:
        found[name] = fingerprint(open_data(name, grid.training.train_images, grid.training.test_images))
    for name, original in {each.dataset: each for each in originals_of(grid, grid.cells())}.items():
        found[f"{name} (pretraining)"] = fingerprint(original_data(grid, original))
    for name in grid.models:
        if Path(name).is_file():
            with open(name, "rb") as file:
                found[name] = hashlib.sha256(file.read()).hexdigest()[:16]
    return found


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM ends a study as Ctrl-C does: what is done is stored, and the workers go."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
