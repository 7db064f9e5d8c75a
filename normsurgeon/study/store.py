"""The results of a study in one SQLite file, a cell per transaction: what is there after a crash is whole.

    study     key, value: the grid, what all cells share, versions
    outcomes  key, outcome: what came of each cell, as JSON

and, as views of ``outcomes``, so that nothing is stored twice:

    cells     one row per cell: its axes, and what came of it
    curves    one row per point of a training curve
    layers    one row per layer of an analysed cell

pandas opens it: ``pandas.read_sql("select * from cells", sqlite3.connect(path))``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from normsurgeon._util.parts import lock, unlock
from normsurgeon.errors import CheckpointError, UsageError
from normsurgeon.study.records import AXES, Epoch, LayerSummary, Outcome

FORMAT = 2
FILE = "results.sqlite"

_RESULTS = ("status", "reason", "accuracy", "correct", "images", "loss", "chance", "start_accuracy", "steps", "seconds")


def _columns(names: Iterable[str], value: str, path: str) -> str:
    return ", ".join(f"json_extract({value}, '{path}.{name}') as {name}" for name in names)


def _rows_of(record: type[Any], path: str, place: str = "") -> str:
    """A view of one row per entry of a list in the outcomes."""
    columns = _columns([each.name for each in fields(record)], "value", "$")
    return f"select outcomes.key as cell{place}, {columns} from outcomes, json_each(outcome, '{path}')"


_SCHEMA = (
    "create table if not exists study (key primary key, value)",
    "create table if not exists outcomes (key primary key, outcome)",
    f"create view if not exists cells as select key, {_columns(AXES, 'outcome', '$.cell')}, "
    f"{_columns(_RESULTS, 'outcome', '$')} from outcomes",
    f"create view if not exists curves as {_rows_of(Epoch, '$.curve')}",
    f"create view if not exists layers as {_rows_of(LayerSummary, '$.looked.layers', ', json_each.key as place')}",
    f"pragma user_version = {FORMAT}",
)


class Store:
    """One results file, open. Made by ``open_store``."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.connection = connection

    def outcomes(self) -> dict[str, Outcome]:
        """What is there already, by cell key."""
        return {key: Outcome.from_dict(values) for key, values in self._read("outcomes").items()}

    def facts(self) -> dict[str, Any]:
        """The table ``study``."""
        return self._read("study")

    def write(self, outcome: Outcome) -> None:
        """Add a cell, or replace an earlier attempt.

        :raises CheckpointError: if the file cannot be written.
        """
        self._write("outcomes", {outcome.cell.key: outcome.to_dict()})

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Replace rows of the table ``study``."""
        self._write("study", facts)

    def _read(self, table: str) -> dict[str, Any]:
        with _explained(self.path):
            return {key: json.loads(text) for key, text in self.connection.execute(f"select * from {table}")}

    def _write(self, table: str, values: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(value, allow_nan=False)) for key, value in values.items()]
        with _explained(self.path), self.connection:
            self.connection.executemany(f"insert or replace into {table} values (?, ?)", rows)


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
            for statement in _SCHEMA:
                connection.execute(statement)
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
        handle = lock(path.with_suffix(".lock"))
    except OSError as error:
        raise CheckpointError(f"cannot write into {path.parent}: {error.strerror or error}; try another") from error
    if handle is None:
        raise UsageError(f"another process runs the study in {path.parent}; wait for it, or try another --output")
    try:
        yield
    finally:
        unlock(handle)
