"""Whether a study can run, known before hours are spent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from normsurgeon.errors import DataError, LoadingError, UsageError, WeightsUnavailableError
from normsurgeon.study.decorrelating import Zca
from normsurgeon.study.grid import Grid
from normsurgeon.study.networks import build_network
from normsurgeon.study.originals import untrained_original
from normsurgeon.study.preparing import forget, open_data
from normsurgeon.study.records import Cell
from normsurgeon.study.running import config_of


def check(grid: Grid) -> dict[Cell, str]:
    """Open every data set and load every network once, before hours are spent; the impossible cells, with reasons.

    :raises DataError: a data set that is not there.
    :raises LoadingError: a network that cannot be loaded.
    """
    forget()
    impossible: dict[Cell, str] = {}
    seen: dict[tuple[Any, ...], str | None] = {}
    originals: dict[Cell, str | None] = {}
    for cell in grid.cells():
        reason = grid.impossible(cell) or _original_problem(grid, cell, originals)
        kind = (cell.model, cell.start, cell.dataset, cell.activation, cell.norm, cell.preprocessing)
        if reason is None and kind not in seen:
            seen[kind] = _problem(grid, cell)
        reason = reason or seen.get(kind) or _too_large(grid, cell)
        if reason is not None:
            impossible[cell] = reason
    return impossible


def _problem(grid: Grid, cell: Cell) -> str | None:
    """What is wrong with a cell's network: it is built, and two images go through it."""
    try:
        data = open_data(cell.dataset, grid.training.train_images, grid.training.test_images)
    except DataError as error:
        raise DataError(f"the study's data set {cell.dataset} cannot be used: {error}") from error
    try:
        model = build_network(cell, data.classes, data.channels, untrained_original(grid, cell)).eval()
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
    except Exception as error:  # whatever a network says to images of a size that it does not take
        said = " ".join(str(error).split())[:160]
        return f"{cell.model} takes no images of {' × '.join(map(str, shape))} ({type(error).__name__}: {said})"
    return None


def _original_problem(grid: Grid, cell: Cell, seen: dict[Cell, str | None]) -> str | None:
    """What is wrong with the run that trains what a cell begins from; ``seen``: what is known of other cells'."""
    original = grid.original(cell)
    if original is None:
        return None
    if (kind := replace(original, seed=0)) not in seen:
        beneath = grid.of_originals()
        seen[kind] = beneath.impossible(original) or _problem(beneath, original) or _too_large(beneath, original)
    reason = seen[kind]
    return f"pretraining: {reason}" if reason else None


def _too_large(grid: Grid, cell: Cell) -> str | None:
    try:
        open_data(cell.dataset, grid.training.train_images, grid.training.test_images).check_batch(cell.batch_size)
    except UsageError as error:
        return str(error)
    return None
