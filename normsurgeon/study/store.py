"""The results of a study in one SQLite file, a cell a transaction: what is there after a crash is whole.

    study    key, value: the grid, what all cells share, versions
    cells    one row a cell: its axes, and what came of it; ``outcome`` is all of it as JSON
    curves   one row a point of a training curve
    layers   one row a layer of an analysed cell

pandas opens it: ``pandas.read_sql("select * from cells", sqlite3.connect(path))``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from normsurgeon.errors import CheckpointError, UsageError
from normsurgeon.study.records import AXES, LayerSummary, Outcome

FORMAT = 1
FILE = "results.sqlite"

_RESULTS = ("status", "reason", "accuracy", "correct", "images", "loss", "start_accuracy", "steps", "seconds")
_POINTS = ("epoch", "step", "train_loss", "accuracy", "loss")
_LAYER = tuple(field.name for field in fields(LayerSummary))
_TABLES = {
    "study": ("key primary key", "value"),
    "cells": ("key primary key", *AXES, *_RESULTS, "outcome"),
    "curves": ("cell", *_POINTS),
    "layers": ("cell", "place", *_LAYER),
}


class Store:
    """One results file, open. Made by ``open_store``."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.connection = connection

    def outcomes(self) -> dict[str, Outcome]:
        """What is there already, by cell key."""
        with _explained(self.path):
            rows = self.connection.execute("select key, outcome from cells").fetchall()
        return {key: Outcome.from_dict(json.loads(text)) for key, text in rows}

    def write(self, outcome: Outcome) -> None:
        """Add a cell, or put it in the place of an earlier attempt.

        :raises CheckpointError: the file cannot be written.
        """
        cell, values = outcome.cell, outcome.to_dict()
        axes = [cell.label(axis) if axis == "regularization" else getattr(cell, axis) for axis in AXES]
        text = json.dumps(values, allow_nan=False)
        with _explained(self.path), self.connection:
            for table, column in (("cells", "key"), ("curves", "cell"), ("layers", "cell")):
                self.connection.execute(f"delete from {table} where {column} = ?", (cell.key,))
            self._insert("cells", [(cell.key, *axes, *(values[name] for name in _RESULTS), text)])
            self._insert("curves", [(cell.key, *(getattr(p, name) for name in _POINTS)) for p in outcome.curve])
            layers = outcome.looked.layers if outcome.looked else ()
            self._insert("layers", [(cell.key, place, *asdict(each).values()) for place, each in enumerate(layers)])

    def _insert(self, table: str, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            self.connection.executemany(f"insert into {table} values ({marks})", rows)

    def facts(self) -> dict[str, Any]:
        """The table ``study``."""
        with _explained(self.path):
            rows = self.connection.execute("select key, value from study").fetchall()
        return {key: json.loads(value) for key, value in rows}

    def state(self, facts: Mapping[str, Any]) -> None:
        """Write the table ``study`` anew."""
        with _explained(self.path), self.connection:
            for key, value in facts.items():
                self.connection.execute("insert or replace into study values (?, ?)", (key, json.dumps(value)))


@contextmanager
def open_store(folder: str | os.PathLike[str]) -> Iterator[Store]:
    """The results file in a folder, made where it is not there; one process at a time writes it.

    :raises UsageError: another process is at it.
    :raises CheckpointError: no place to write, or a file of another kind.
    """
    path = Path(folder) / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error.strerror or error}; try another") from error
    with _alone(path), _explained(path), contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
        found = connection.execute("pragma user_version").fetchone()[0]
        tables = connection.execute("select count(*) from sqlite_master").fetchone()[0]
        if found != FORMAT and (found or tables):
            raise CheckpointError(f"{path} holds no study of this version of normsurgeon; try another folder")
        with connection:
            for table, columns in _TABLES.items():
                connection.execute(f"create table if not exists {table} ({', '.join(columns)})")
            connection.execute(f"pragma user_version = {FORMAT}")
        yield Store(path, connection)


def read_store(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """What a results file holds, read only: the table ``study``, and the outcomes by cell key.

    :raises CheckpointError: no such file, or one of another kind.
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
def _alone(path: Path) -> Iterator[None]:
    """A lock that the system lets go when the process ends, however it ends."""
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
