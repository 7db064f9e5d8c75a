"""A study from its grid to its results: checked, run where it has not been run yet, stored cell by cell."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normsurgeon._util.one_line import one_line
from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon._util.stopping import Stop, interrupted_by_signals, interruption
from normsurgeon.data.datasets import clear_caches
from normsurgeon.data.preprocessing import Zca
from normsurgeon.errors import DataError, LoadingError, UsageError, WeightsUnavailableError
from normsurgeon.finetuning.checking import find_device
from normsurgeon.study.cell import config_of, data_of, lost_original, network_file
from normsurgeon.study.engines import OnCell, Outcomes, Work, default_jobs, on_ray, processes, serial
from normsurgeon.study.grid import Grid, read_grid
from normsurgeon.study.networks import build_network
from normsurgeon.study.records import Cell, Outcome, Results
from normsurgeon.study.report import StudyReport, study_report
from normsurgeon.study.store import Store, open_store
from normsurgeon.version import __version__

Engine = Callable[[Work, Sequence[Cell], OnCell], Outcomes]


def run_study(
    config: Grid | Mapping[str, Any] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    device: str | None = None,
    on_message: Callable[[str], None] = lambda text: None,
    on_progress: OnProgress | None = None,
) -> StudyReport:
    """Run every cell of a grid that has no result in ``output`` yet, and report what all of them show.

    config       a Grid, its dict, or a YAML file
    output       the folder of the results (``results.sqlite``), of kept networks, and of those that others start from
    jobs         cells at once; default: as many as the machine has cores, 1: in this process
    engine       ``local``, or ``ray``: on the cluster at ``ray_address``, or on one that is started here
    device       where to train; default: GPUs if there are any, else the CPU, one thread per cell
    on_message   called with each message, one line of text
    on_progress  called when a cell starts, twice a second while it runs and when it ends: ``done`` of ``total`` cells
                 have an outcome; ``details`` are the ``cell``, the ``share`` of it that is done, and its ``outcome``
                 or None. The stage is ``pretraining`` while networks are trained that others start from

    A study that was stopped continues where it was: cells that are done, diverged or impossible are kept, cells that
    failed, or were skipped and seem possible now, are tried again. Every cell is a function of its settings alone, so
    the results are those of an uninterrupted study, whatever ``jobs`` and ``engine`` are.

    :raises UsageError: if the grid or the device is not possible, or the folder has results of another training.
    :raises DataError: if a data set is not there: nothing is run.
    :raises LoadingError: if a network cannot be loaded: nothing is run.
    :raises KeyboardInterrupt: after Ctrl-C or SIGTERM; what is done is stored.

    >>> import tempfile
    >>> grid = {"models": "resnet8", "norms": ["bn", "gn"], "datasets": "digits", "seeds": 1,
    ...         "training": {"steps": 2, "train_images": 64, "image_size": 8}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run_study(grid, folder, jobs=1).results.counts()
    {'done': 2, 'diverged': 0, 'failed': 0, 'skipped': 0}
    """
    if not isinstance(config, Grid):
        config = Grid.from_dict(config) if isinstance(config, Mapping) else read_grid(config)
    run = _engine(jobs, engine, ray_address, device)
    cells, impossible = config.cells(), check(config)
    with open_store(output) as store, interrupted_by_signals() as stop:
        _check_same_study(store, config, Path(output), on_message)
        study = _Study(config, Path(output).resolve(), store, len(cells), device, run, on_progress, stop)
        missing = [cell for cell in cells if not study.has(cell, impossible)]
        if len(missing) < len(cells):
            on_message(f"{len(cells) - len(missing)} of {len(cells)} cells have their results in {output} already")
        study.done = len(cells) - len(missing)
        for cell in missing:
            if cell in impossible:
                study.keep(Outcome(cell, "skipped", impossible[cell]))
        study.run([cell for cell in missing if cell not in impossible])
    outcomes = tuple(study.known[cell.key] for cell in cells)
    return study_report(Results(config.name, outcomes, config.title, _shared(config)))


def _engine(jobs: int | None, engine: str, address: str | None, device: str | None) -> Engine:
    """Where the cells run.

    :raises UsageError: if there is no such engine or device.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs={jobs} must be at least 1")
    if engine not in ("local", "ray"):
        raise UsageError(f"there is no engine {engine!r}; it is local or ray")
    if engine == "ray":  # of a cluster, the workers know the devices
        return lambda work, cells, on_cell: on_ray(work, cells, on_cell, jobs, address)
    find_device(device)
    count = jobs or default_jobs(device)
    if count == 1:
        return lambda work, cells, on_cell: serial(work, cells, on_cell)
    return lambda work, cells, on_cell: processes(work, cells, on_cell, count)


class _Study:
    """The outcomes that are known, and how the others are found and stored."""

    def __init__(
        self, grid: Grid, folder: Path, store: Store, total: int, device: str | None, engine: Engine,
        on_progress: OnProgress | None, stop: Stop,
    ) -> None:  # fmt: skip
        self.grid, self.store, self.device, self.engine = grid, store, device, engine
        self.known = store.outcomes()
        self.networks = folder / "networks" if grid.keep_checkpoints else None
        self.originals = originals_folder(folder, grid)
        self.done, self.total = 0, total
        self.on_progress, self.stop = on_progress, stop

    def has(self, cell: Cell, impossible: Mapping[Cell, str]) -> bool:
        """Whether a cell needs no run."""
        outcome = self.known.get(cell.key)
        if outcome is None or outcome.status == "failed":
            return False
        if outcome.status == "skipped":  # for a reason that may be of that time alone, such as another device
            return cell in impossible
        if outcome.status == "diverged":
            return True
        kept = self.networks is None or network_file(self.networks, cell).is_file()
        return kept and (not self.grid.analysis or outcome.analysis is not None)

    def keep(self, outcome: Outcome) -> None:
        """Store an outcome."""
        self.store.write(outcome)
        self.known[outcome.cell.key] = outcome
        self.done += 1
        self.report(outcome.cell, 1.0, outcome)

    def run(self, cells: Sequence[Cell]) -> None:
        """Train what the cells start from, and then the cells."""
        lost: dict[Cell | None, Outcome] = {}
        if self.originals is not None:
            folder = self.originals
            needed = [each for each in originals_of(self.grid, cells) if not network_file(folder, each).is_file()]
            work = Work(self.grid.of_originals(), folder, self.device)
            for outcome in self._outcomes(work, needed, "pretraining"):
                self.report(outcome.cell, 1.0, outcome, "pretraining")
                if outcome.status != "done":
                    lost[outcome.cell] = outcome
        for cell in cells:
            if (without := lost.get(self.grid.original(cell))) is not None:
                self.keep(Outcome(cell, "skipped" if without.status == "skipped" else "failed", lost_original(without)))
        work = Work(self.grid, self.networks, self.device, self.originals)
        for outcome in self._outcomes(work, [cell for cell in cells if self.grid.original(cell) not in lost]):
            self.keep(outcome)

    def _outcomes(self, work: Work, cells: Sequence[Cell], stage: str = "cells") -> Iterator[Outcome]:
        if cells:
            with closing(self.engine(work, cells, lambda c, share: self.report(c, share, stage=stage))) as outcomes:
                yield from outcomes

    def report(self, cell: Cell, share: float, outcome: Outcome | None = None, stage: str = "cells") -> None:
        """Call ``on_progress``; stop, if an interruption was lost on the way."""
        if self.stop:
            raise interruption(self.stop.signal)
        if self.on_progress is not None:
            details = {"cell": cell, "share": share, "outcome": outcome}
            self.on_progress(Progress(stage, self.done, self.total, details))


def _shared(grid: Grid) -> dict[str, Any]:
    """What all cells share, as the report shows it; of a pretraining, what is its own."""
    shared, whole = grid.training.to_dict(), grid.to_dict()
    if grid.pretraining is None:
        return shared
    return {**shared, "pretraining": {k: v for k, v in whole["pretraining"].items() if shared.get(k, ...) != v}}


# What converted cells start from


def originals_folder(output: Path, grid: Grid) -> Path | None:
    """Where a study keeps them: one folder for each way of training them. None if it trains none."""
    if grid.pretraining is None:
        return None
    text = json.dumps(grid.of_originals().training.to_dict(), sort_keys=True)
    return output / "originals" / hashlib.sha256(text.encode()).hexdigest()[:16]


def originals_of(grid: Grid, cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """The runs that train what some cells start from, each once."""
    found = dict.fromkeys(grid.original(cell) for cell in cells)
    return tuple(cell for cell in found if cell is not None)


def _untrained(grid: Grid, cell: Cell) -> nn.Module:
    """A cell's network before it is trained; what it starts from has random weights, for only its layers matter."""
    original, data = grid.original(cell), data_of(grid, cell)
    below = None if original is None else _untrained(grid.of_originals(), original)
    return build_network(cell, data.classes, data.channels, below)


# Before anything runs


def check(grid: Grid) -> dict[Cell, str]:
    """Open every data set and load every network once, before hours are spent; the impossible cells, with reasons.

    :raises DataError: if a data set is not there.
    :raises LoadingError: if a network cannot be loaded.
    """
    clear_caches()
    known: dict[tuple[Any, ...], str | None] = {}

    def reason(of: Grid, cell: Cell) -> str | None:
        found = of.impossible(cell)
        if found is None and (original := of.original(cell)) is not None:
            below = reason(of.of_originals(), replace(original, seed=0))
            found = f"pretraining: {below}" if below else None
        # What a network can take depends on these alone.
        kind = (of.pretraining is None, cell.model, cell.start, cell.dataset, cell.activation, cell.norm,
                cell.preprocessing)  # fmt: skip
        if found is None and kind not in known:
            known[kind] = _problem(of, cell)
        return found or known.get(kind) or _too_large(of, cell)

    found = {cell: reason(grid, cell) for cell in grid.cells()}
    return {cell: text for cell, text in found.items() if text is not None}


def _problem(grid: Grid, cell: Cell) -> str | None:
    """What is wrong with a cell's network: it is built, and two images go through it."""
    try:
        data_of(grid, cell)
    except DataError as error:
        raise DataError(f"the study's data set {cell.dataset} cannot be used: {error}") from error
    try:
        model = _untrained(grid, cell).eval()
    except WeightsUnavailableError as error:
        raise WeightsUnavailableError(
            f"the published weights of the study's network {cell.model} are out of reach; "
            "try a file of weights as the model, or start: scratch"
        ) from error
    except LoadingError as error:
        raise type(error)(f"the study's network {cell.model} cannot be used: {error}") from error
    except UsageError as error:
        return str(error)
    shape = config_of(model, grid.training.image_size).input_size
    try:
        if cell.preprocessing == Zca.name:
            Zca.check_size(shape)
        with torch.inference_mode():
            model(torch.zeros(2, *shape))
    except UsageError as error:
        return str(error)
    except Exception as error:  # whatever a network raises for images of a size that it does not take
        return f"{cell.model} takes no images of {' × '.join(map(str, shape))} ({one_line(error, 160)})"
    return None


def _too_large(grid: Grid, cell: Cell) -> str | None:
    try:
        data_of(grid, cell).check_batch(cell.batch_size)
    except UsageError as error:
        return str(error)
    return None


LOOP = 0.003
"""Seconds that an update costs next to the network: reading, seeding, schedules."""
STARTING = 8.0
"""Seconds until a worker process has imported what it needs."""


def estimate_seconds(grid: Grid, cells: Sequence[Cell], jobs: int, on_progress: OnProgress | None = None) -> float:
    """The wall-clock seconds of some cells on this machine's CPU, in ``jobs`` processes; the analysis left out.

    A few updates of each kind of cell are timed, and added up.

    >>> grid = Grid(models="resnet8", norms="gn", datasets="digits", training={"steps": 2, "image_size": 8})
    >>> 8 < estimate_seconds(grid, grid.cells(), jobs=1) < 600
    True
    """
    known: dict[tuple[Any, ...], tuple[float, float]] = {}
    seconds = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = [(grid, cell) for cell in cells]
        if originals := originals_of(grid, cells):
            runs = [(grid.of_originals(), original) for original in originals] + runs
        for number, (of, cell) in enumerate(runs):
            kind = (cell.model, cell.dataset, cell.start, cell.activation, cell.norm, cell.batch_size)
            if kind not in known:
                network = _untrained(of, cell)
                known[kind] = _timed(network, config_of(network, of.training.image_size).input_size, cell.batch_size)
            update, test = known[kind]
            data = data_of(of, cell)
            per_epoch = max(1, len(data.train) // min(cell.batch_size, len(data.train)))
            steps = of.training.steps or (of.training.epochs or 1) * per_epoch
            tests = 1 if of.training.judge == "last" else 1 + -(-steps // per_epoch)
            seconds.append(steps * (update + LOOP) + tests * test * len(data.test))
            if on_progress is not None:
                on_progress(Progress("timing a few updates", number + 1, len(runs)))
    finally:
        torch.set_num_threads(threads)
    return STARTING + max(sum(seconds) / jobs, max(seconds, default=0.0))


def _timed(network: nn.Module, shape: tuple[int, ...], batch_size: int) -> tuple[float, float]:
    """Seconds of an update, and of testing one image."""
    images = torch.rand(batch_size, *shape)
    network.train(batch_size > 1)  # a batch norm may see a single value, which it refuses
    updates, tested = 3, 100
    network(images).square().mean().backward()  # warms up
    start = time.perf_counter()
    for _ in range(updates):
        network(images).square().mean().backward()
    update = (time.perf_counter() - start) / updates
    network.eval()
    with torch.inference_mode():
        start = time.perf_counter()
        network(torch.rand(tested, *shape))
    return update, (time.perf_counter() - start) / tested


# Whether results belong together


def _check_same_study(store: Store, grid: Grid, folder: Path, on_message: Callable[[str], None]) -> None:
    """Note what the results are made with.

    :raises UsageError: if there are results that were made with other settings or other files.
    """
    facts, whole = store.facts(), grid.to_dict()
    now, before = whole["training"], facts.get("training")
    if before is not None and before != now:
        raise UsageError(
            f"the results in {folder} were made with another training: {_changes(before, now)}; "
            "try another --output, or the settings of before"
        )
    pretraining, earlier = whole["pretraining"], facts.get("pretraining")
    if "converted" not in grid.start:
        pretraining = earlier  # of cells that this grid leaves out
    elif pretraining != earlier and any(each.cell.start == "converted" for each in store.outcomes().values()):
        changes = f": {_changes(earlier, pretraining)}" if earlier and pretraining else ""
        raise UsageError(
            f"the converted networks in {folder} started from others{changes}; "
            "try another --output, or the pretraining of before"
        )
    inputs, known = _inputs(grid), facts.get("inputs", {})
    for name in inputs:
        if known.get(name, inputs[name]) != inputs[name]:
            raise UsageError(f"the results in {folder} were made when {name} held something else; try another --output")
    versions = {name: version(name) for name in ("torch", "timm", "numpy")} | {"normsurgeon": __version__}
    older = facts.get("versions", versions)
    if older != versions:
        changes = _changes(older, versions, "{} {} → {}")
        on_message(f"some results in {folder} were made with other versions ({changes}): numbers may differ slightly")
    noted = {"name": grid.name, "title": grid.title, "training": now, "pretraining": pretraining, "grid": whole,
             "inputs": {**known, **inputs}, "versions": versions}  # fmt: skip
    store.write_facts(noted)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], form: str = "{} ({} → {})") -> str:
    """Settings that differ, each with both of its values."""
    names = dict.fromkeys((*before, *now))
    return ", ".join(form.format(k, before.get(k), now.get(k)) for k in names if before.get(k) != now.get(k))


def _inputs(grid: Grid) -> dict[str, str]:
    """What the study reads, by the names in its grid: of data sets which images, of files of weights their contents."""
    cells = grid.cells()
    found = {cell.dataset: data_of(grid, cell).fingerprint() for cell in {c.dataset: c for c in cells}.values()}
    for original in {each.dataset: each for each in originals_of(grid, cells)}.values():
        found[f"{original.dataset} (pretraining)"] = data_of(grid.of_originals(), original).fingerprint()
    for name in grid.models:
        if Path(name).is_file():
            with open(name, "rb") as file:
                found[name] = hashlib.sha256(file.read()).hexdigest()[:16]
    return found
