"""What a study is made of, cells and what came of each, and the SQLite file that holds them. Imports no torch.

The file's tables, each value in one place only; a cell is written in one transaction, so a crash leaves whole cells:

    study    key, value: the grid, what all cells share, versions
    cells    one row per cell: its axes, and what came of it
    curves   one row per point of a training curve
    layers   one row per layer of an analysed cell

pandas opens it: ``pandas.read_sql("select * from cells", sqlite3.connect(path))``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from normsurgeon.errors import CheckpointError, UsageError

Status = Literal["done", "diverged", "failed", "skipped"]
LOST: tuple[Status, ...] = ("diverged", "failed", "skipped")
"""The ways in which a cell ends without a result."""


@dataclass(frozen=True, order=True)
class Cell:
    """One training run: one point of the grid. Cells that differ in ``norm`` alone are compared as a pair.

    model           a timm name, ``resnet8``, ``resnet14``, ``resnet20`` (He et al.'s small ResNets for CIFAR), or
                    any other MODEL of the command line
    dataset         a data spec: ``digits``, ``fashion-mnist``, a folder, a timm data set
    start           ``scratch``, or ``converted``: pretrained weights, converted to the norm with their function kept
    activation      ``default`` (as the network has it), ``relu``, ``silu``, …
    preprocessing   ``none``, ``zero-mean``, ``standard``, … (study/preprocessing.py)
    regularization  training settings by name, such as (("weight_decay", 0.0005),); () for none
    batch_size      images per update
    lr              the learning rate that the run uses (after any scaling by the batch size)
    norm            ``bn`` (as the network has it), a target such as ``gn``, or ``gn:8`` for 8 groups
    seed            of the weights, the order of the images and everything else that is random
    """

    model: str
    dataset: str
    start: str = "scratch"
    activation: str = "default"
    preprocessing: str = "standard"
    regularization: tuple[tuple[str, float], ...] = ()
    batch_size: int = 32
    lr: float = 0.1
    norm: str = "bn"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON keeps as they are."""
        return {**vars(self), "regularization": dict(self.regularization)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The inverse of ``to_dict``."""
        return cls(**{**values, "regularization": tuple(sorted(dict(values["regularization"]).items()))})

    @property
    def key(self) -> str:
        """A short name that is the same for equal cells, on every machine.

        >>> Cell("resnet8", "digits").key == Cell("resnet8", "digits").key != Cell("resnet8", "digits", seed=1).key
        True
        """
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def label(self, axis: str) -> str:
        """One axis' value as a reader sees it.

        >>> Cell("resnet8", "digits", regularization=(("weight_decay", 0.0005),)).label("regularization")
        'weight_decay=0.0005'
        """
        value = getattr(self, axis)
        if axis == "regularization":
            return ", ".join(f"{name}={number:g}" for name, number in value) or "none"
        return f"{value:g}" if isinstance(value, float) else str(value)


AXES = tuple(field.name for field in fields(Cell))
"""The axes of the grid, in the order in which tables list them."""


def varying_axes(cells: Iterable[Cell]) -> tuple[str, ...]:
    """The axes along which some cells differ."""
    cells = list(cells)
    return tuple(axis for axis in AXES if len({getattr(cell, axis) for cell in cells}) > 1)


@dataclass(frozen=True)
class Epoch:
    """One point of a training curve, after a pass over the training images (or the last, shorter one).

    train_loss: mean of what was minimised, over the updates since the point before; accuracy, loss: on the held-out
    images, the network in eval mode; None where it was not judged then.
    """

    epoch: float
    step: int
    train_loss: float | None
    accuracy: float | None
    loss: float | None


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a trained cell's network, from the analysis (docs/report.md defines the statistics).

    dead_fraction: dead channels of all; sensitivity: trace of the empirical Fisher over the layer's parameters
    """

    layer: str
    kind: str
    channels: int
    mean: float | None
    std: float | None
    zero_fraction: float | None
    dead_fraction: float | None
    effective_rank: float | None
    group_fluctuation: float | None
    sensitivity: float | None = None


@dataclass(frozen=True)
class CellAnalysis:
    """The analysis of a trained cell: its layers in order, and linear CKA between them (L × L)."""

    layers: tuple[LayerSummary, ...]
    cka_layers: tuple[str, ...] = ()
    cka: tuple[tuple[float | None, ...], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    status    ``done``; ``diverged``: the loss stopped being finite; ``failed``: an error; ``skipped``: impossible
    reason    one line, of everything but ``done``
    correct   right top-1 answers, of ``images`` held-out ones, of the network after the last update (none is picked)
    loss      mean cross-entropy on them, in nats
    start_accuracy  before training, where the cell starts from a converted network
    curve     the training curve; its last point is the result
    steps     updates made
    analysis  of the trained network, where the grid wants it (``looked`` in the JSON)
    seconds   of wall-clock time: the only thing here that a second run with the same seeds does not repeat
    """

    cell: Cell
    status: Status
    reason: str | None = None
    correct: int | None = None
    images: int | None = None
    loss: float | None = None
    start_accuracy: float | None = None
    curve: tuple[Epoch, ...] = ()
    steps: int = 0
    analysis: CellAnalysis | None = None
    seconds: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Top-1 as a fraction, or None where the cell has no result."""
        return self.correct / self.images if self.correct is not None and self.images else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        values = asdict(self)
        return {**values, "cell": self.cell.to_dict(), "accuracy": self.accuracy, "looked": values.pop("analysis")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of ``to_dict``."""
        kept = {key: value for key, value in values.items() if key not in ("accuracy", "analysis", "looked")}
        found = values.get("looked")
        if found is not None:
            layers = tuple(LayerSummary(**layer) for layer in found["layers"])
            found = CellAnalysis(layers, tuple(found["cka_layers"]), tuple(map(tuple, found["cka"])))
        kept |= {"cell": Cell.from_dict(kept["cell"]), "curve": tuple(Epoch(**point) for point in kept["curve"])}
        return cls(**kept, analysis=found)


def finite(value: Any) -> Any:
    """Plain data with None for each number that is not finite, as JSON and the store take it.

    >>> finite({"a": (1.0, float("inf"))})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Results:
    """A study's outcomes, one per cell, in the order of the grid.

    name, title  of the study
    training     what all cells share (epochs, optimizer, schedule, numbers of images …), plain types
    """

    name: str
    outcomes: tuple[Outcome, ...]
    title: str = ""
    training: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """How many cells ended in which way."""
        return {kind: sum(outcome.status == kind for outcome in self.outcomes) for kind in ("done", *LOST)}

    def varying(self) -> tuple[str, ...]:
        """The axes along which the study's cells differ, ``seed`` left out."""
        return tuple(axis for axis in varying_axes(outcome.cell for outcome in self.outcomes) if axis != "seed")


# The file

FORMAT = 2
FILE = "results.sqlite"

_RESULTS = ("status", "reason", "correct", "images", "loss", "start_accuracy", "steps", "seconds")
_POINT = tuple(each.name for each in fields(Epoch))
_LAYER = tuple(each.name for each in fields(LayerSummary))
_CELL = ("key", *AXES, *_RESULTS, "similarity")  # similarity: JSON, of an analysed cell
_TABLES = {
    "study": "key primary key, value",
    "cells": f"key primary key, {', '.join(_CELL[1:])}, accuracy generated always as (correct * 1.0 / images)",
    "curves": f"cell, {', '.join(_POINT)}",
    "layers": f"cell, place, {', '.join(_LAYER)}",
}


class Store:
    """One results file, open. Made by ``open_store``."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.connection = connection

    def outcomes(self) -> dict[str, Outcome]:
        """What is there already, by cell key."""
        with _explained(self.path):
            rows = self.connection.execute(f"select {', '.join(_CELL)} from cells").fetchall()
            points = self.connection.execute(f"select cell, {', '.join(_POINT)} from curves order by rowid").fetchall()
            layers = self.connection.execute(f"select cell, {', '.join(_LAYER)} from layers order by place").fetchall()
        curves: dict[str, list[Epoch]] = {}
        for key, *point in points:
            curves.setdefault(key, []).append(Epoch(*point))
        summaries: dict[str, list[LayerSummary]] = {}
        for key, *layer in layers:
            summaries.setdefault(key, []).append(LayerSummary(*layer))
        found = {}
        for row in rows:
            values = dict(zip(_CELL, row, strict=True))
            key, axes = values["key"], {axis: values[axis] for axis in AXES}
            cell = Cell.from_dict({**axes, "regularization": json.loads(axes["regularization"])})
            analysis = None
            if values["similarity"] is not None:
                names, cka = json.loads(values["similarity"])
                analysis = CellAnalysis(tuple(summaries.get(key, ())), tuple(names), tuple(map(tuple, cka)))
            results = {name: values[name] for name in _RESULTS}
            found[key] = Outcome(cell, **results, curve=tuple(curves.get(key, ())), analysis=analysis)
        return found

    def write(self, outcome: Outcome) -> None:
        """Add a cell, or replace an earlier attempt.

        :raises CheckpointError: if the file cannot be written.
        """
        cell, analysis = outcome.cell, outcome.analysis
        axes = {**vars(cell), "regularization": json.dumps(dict(cell.regularization))}
        similarity = None if analysis is None else json.dumps([analysis.cka_layers, analysis.cka], allow_nan=False)
        row = (cell.key, *(axes[axis] for axis in AXES), *(getattr(outcome, name) for name in _RESULTS), similarity)
        with _explained(self.path), self.connection:
            for table, column in (("cells", "key"), ("curves", "cell"), ("layers", "cell")):
                self.connection.execute(f"delete from {table} where {column} = ?", (cell.key,))
            self._insert("cells", _CELL, [row])
            self._insert("curves", ("cell", *_POINT), [(cell.key, *astuple(point)) for point in outcome.curve])
            layers = analysis.layers if analysis else ()
            rows = [(cell.key, place, *astuple(layer)) for place, layer in enumerate(layers)]
            self._insert("layers", ("cell", "place", *_LAYER), rows)

    def _insert(self, table: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
        marks = ", ".join("?" * len(columns))
        self.connection.executemany(f"insert into {table} ({', '.join(columns)}) values ({marks})", rows)

    def facts(self) -> dict[str, Any]:
        """The table ``study``."""
        with _explained(self.path):
            rows = self.connection.execute("select key, value from study").fetchall()
        return {key: json.loads(value) for key, value in rows}

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Replace rows of the table ``study``."""
        with _explained(self.path), self.connection:
            rows = [(key, json.dumps(value)) for key, value in facts.items()]
            self.connection.executemany("insert or replace into study values (?, ?)", rows)


@contextmanager
def open_store(folder: str | os.PathLike[str]) -> Iterator[Store]:
    """The results file in a folder, made if it is not there; one process at a time writes it.

    :raises UsageError: if another process is writing it.
    :raises CheckpointError: if it cannot be written, or is a file of another kind.
    """
    path = Path(folder) / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error.strerror or error}; try another") from error
    with _locked(path), _explained(path), contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
        found = connection.execute("pragma user_version").fetchone()[0]
        tables = connection.execute("select count(*) from sqlite_master").fetchone()[0]
        if found != FORMAT and (found or tables):
            raise CheckpointError(f"{path} holds no study of this version of normsurgeon; try another folder")
        with connection:
            for table, columns in _TABLES.items():
                connection.execute(f"create table if not exists {table} ({columns})")
            connection.execute(f"pragma user_version = {FORMAT}")
        yield Store(path, connection)


def read_store(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """What a results file holds, read only: the table ``study``, and the outcomes by cell key.

    :raises CheckpointError: if there is no such file, or it is of another kind.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise CheckpointError(f"there is no study in {folder} ({FILE} is not there)")
    with _explained(path):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)
        with contextlib.closing(connection):
            store = Store(path, connection)
            return store.facts(), store.outcomes()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise CheckpointError(f"{path} cannot be used ({error}); try another folder, or more room") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock that the system releases when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: SQLite keeps the file whole all the same
        yield
        return
    try:
        handle = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(f"cannot write into {path.parent}: {error.strerror or error}; try another") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another process runs the study in {path.parent}; wait for it, or try another --output"
            ) from error
        yield
