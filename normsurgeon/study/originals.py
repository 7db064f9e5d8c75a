"""The BatchNorm networks that converted cells begin from: which there are, and where they are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from normsurgeon.study.grid import Grid
from normsurgeon.study.networks import build_network
from normsurgeon.study.preparing import DataSet, open_data
from normsurgeon.study.records import Cell

FOLDER = "originals"


def originals_folder(output: Path, grid: Grid) -> Path | None:
    """Where a study keeps them: one folder for each way of training them. None where it trains none.

    >>> grid = Grid("resnet8", "gn", "digits", start="converted", pretraining={"steps": 50})
    >>> len(originals_folder(Path("out"), grid).relative_to("out/originals").name)
    16
    """
    if grid.pretraining is None:
        return None
    text = json.dumps(grid.of_originals().training.to_dict(), sort_keys=True)
    return output / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]


def originals_of(grid: Grid, cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """The runs that train what some cells begin from, each once."""
    found = dict.fromkeys(grid.original(cell) for cell in cells)
    return tuple(cell for cell in found if cell is not None)


def original_data(grid: Grid, original: Cell) -> DataSet:
    """What an original is trained on.

    :raises DataError: no such data.
    """
    training = grid.of_originals().training
    return open_data(original.dataset, training.train_images, training.test_images)


def untrained_original(grid: Grid, cell: Cell) -> nn.Module | None:
    """What a cell begins from, with random weights: for what depends on the architecture alone. None where nothing
    is trained for it.

    >>> grid = Grid("resnet8", "gn", "digits", start="converted", pretraining={"steps": 50})
    >>> type(untrained_original(grid, grid.cells()[0]).bn1).__name__
    'BatchNorm2d'
    """
    original = grid.original(cell)
    if original is None:
        return None
    data = original_data(grid, original)
    return build_network(original, data.classes, data.channels)
