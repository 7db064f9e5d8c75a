"""About how long a study takes: a few updates of each kind of cell are timed, and added up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from normsurgeon.study.grid import Grid
from normsurgeon.study.networks import build_network
from normsurgeon.study.originals import originals_of, untrained_original
from normsurgeon.study.preparing import open_data
from normsurgeon.study.records import Cell
from normsurgeon.study.running import config_of

LOOP = 0.003
"""Seconds that an update costs beside the network: reading, seeding, schedules."""

STARTING = 8.0
"""Seconds until a worker process has imported what it needs."""

TIMED = 3
TESTED = 100


def estimate_seconds(
    grid: Grid, cells: Sequence[Cell], jobs: int, on_progress: Callable[[int, int], None] | None = None
) -> float:
    """The wall-clock seconds of some cells on this machine's CPU, in so many processes; the analysis left out.

    >>> grid = Grid(models="resnet8", norms="gn", datasets="digits", training={"steps": 2, "image_size": 8})
    >>> 8 < estimate_seconds(grid, grid.cells(), jobs=1) < 600
    True
    """
    known: dict[tuple[Any, ...], tuple[float, float]] = {}
    total, longest = 0.0, 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = [(grid, cell) for cell in cells]
        if originals := originals_of(grid, cells):
            runs = [(grid.of_originals(), original) for original in originals] + runs
        for number, (of, cell) in enumerate(runs):
            data = open_data(cell.dataset, of.training.train_images, of.training.test_images)
            kind = (cell.model, cell.dataset, cell.start, cell.activation, cell.norm, cell.batch_size)
            if kind not in known:
                network = build_network(cell, data.classes, data.channels, untrained_original(of, cell))
                known[kind] = _timed(network, config_of(network, of.training.image_size).input_size, cell.batch_size)
            update, test = known[kind]
            steps, looks = _length(of, cell, len(data.train))
            seconds = steps * (update + LOOP) + looks * test * len(data.test)
            total, longest = total + seconds, max(longest, seconds)
            if on_progress is not None:
                on_progress(number + 1, len(runs))
    finally:
        torch.set_num_threads(threads)
    return STARTING + max(total / jobs, longest)


def _length(grid: Grid, cell: Cell, images: int) -> tuple[int, int]:
    """Updates of a cell, and how often it is tested."""
    per_epoch = max(1, images // min(cell.batch_size, images))
    steps = grid.training.steps or (grid.training.epochs or 1) * per_epoch
    return steps, 1 if grid.training.judge == "last" else 1 + -(-steps // per_epoch)


def _timed(network: nn.Module, shape: tuple[int, ...], batch_size: int) -> tuple[float, float]:
    """Seconds of an update, and of testing one image."""
    images = torch.rand(batch_size, *shape)
    network.train()
    if batch_size == 1:
        network.eval()  # a batch norm may see a single value, which it refuses
    begin = 0.0
    for number in range(TIMED + 1):
        if number == 1:  # the first one warms up
            begin = time.perf_counter()
        network(images).square().mean().backward()
    update = (time.perf_counter() - begin) / TIMED
    network.eval()
    with torch.inference_mode():
        begin = time.perf_counter()
        network(torch.rand(TESTED, *shape))
    return update, (time.perf_counter() - begin) / TESTED
