"""The same moments as ``moments.update``'s torch path, for float32 on the CPU, in one read of the features.

A forward pass is mostly matrix products, a statistic is mostly memory traffic: fifteen numbers a channel by separate
torch reductions cost as much as half the forward pass, and read once, a tenth (benchmarks/analysis.py). Compiled by
numba, which is an extra (``pip install "normsurgeon[fast]"``); without it the torch path does the work.

OpenMP threads that wait for torch's next operation spin for a while, on the very cores that this loop's threads need.
OMP_WAIT_POLICY=PASSIVE, set before torch is imported, lets them sleep: the command line does so, and a program that
uses this package may. It takes a third off the time of the statistics, and does not change a forward pass.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALL = 2**17
"""Values below which a second thread costs more than it saves."""


@cache
def available() -> bool:
    """Whether numba is installed (and not switched off by NORMSURGEON_NUMBA=0)."""
    return os.environ.get("NORMSURGEON_NUMBA", "1") != "0" and find_spec("numba") is not None


def update(
    table: NDArray[np.float64], x_NCP: NDArray[np.float32], image: NDArray[np.int64], position: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
    """``moments.update`` for a contiguous float32 array; ``image`` in ascending order."""
    kernel = _kernel()
    images, channels, positions = x_NCP.shape
    rows_NC2 = np.zeros((images, channels, 2))
    picked = np.empty((len(image), channels), np.float32)
    starts = np.searchsorted(image, np.arange(images + 1))
    threads = min(torch.get_num_threads(), channels) if x_NCP.size >= SMALL else 1
    if positions and images:
        edges = [channels * i // threads for i in range(threads + 1)]
        # Threads of our own: a second OpenMP pool next to torch's would fight it for the cores.
        work: tuple[Any, ...] = (table, x_NCP, rows_NC2, starts, position, picked)
        others = [_pool().submit(kernel, *work, *edges[i : i + 2]) for i in range(1, threads)]
        kernel(*work, *edges[:2])
        for other in others:
            other.result()
    return rows_NC2[:, :, 0], rows_NC2[:, :, 1], picked


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="normsurgeon")


@cache
def _kernel() -> Any:
    from normsurgeon.inference.kernel import take_in

    return take_in
