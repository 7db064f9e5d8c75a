"""Random numbers that depend on where a run is, and on nothing that it did before.

An image's augmentation is seeded by (seed, epoch, image), an update's dropout and mixing by (seed, step, rank): so a
run that goes on after a crash, or with other workers, draws what an uninterrupted one draws.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

PERMUTATION, SAMPLE, STEP, HEAD = range(4)
"""What a seed is for: the first of its numbers, so that no two purposes share a stream."""


def seed_of(*numbers: int) -> int:
    """One seed of 32 bits from several numbers.

    >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (every device), in place."""
    seed = seed_of(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    if _only_cpu():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed notes the stack for each absent device: 0.8 ms
    else:
        torch.manual_seed(seed)


@lru_cache(maxsize=1)
def _only_cpu() -> bool:
    return not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available())


@contextmanager
def own_random_state() -> Iterator[None]:
    """Put the caller's random states back afterwards."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def permutation(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's images: a function of seed and epoch alone.

    >>> sorted(permutation(3, 0, 1).tolist())
    [0, 1, 2]
    """
    return np.random.default_rng([PERMUTATION, seed, epoch]).permutation(images)
