"""A uniform sample of feature vectors from a stream, the same whatever the batches: for the channels' covariance.

A covariance over all positions would cost more than the forward pass. Instead every image offers some positions, each
with a priority that is drawn from the image's number and nothing else, and the vectors of least priority stay (a
bottom-k sample; Cohen & Kaplan, PODC 2007): uniform, of bounded size, and mergeable.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_VALUES = 2**16
CAPACITY = (256, 1024)
OFFERED = 64
"""A layer keeps ``MOST_VALUES`` / channels vectors, within ``CAPACITY``; an image offers up to ``OFFERED``."""

Offer = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""The vectors of a batch that a sample wants: image and position of each, and the priority it comes with."""


class VectorSample:
    """At most ``capacity`` vectors of ``channels`` values.

    >>> sample = VectorSample(3)
    >>> sample.update(torch.ones(2, 3, 5), first_image=0)
    >>> sample.vectors.shape
    (10, 3)
    """

    def __init__(self, channels: int, seed: int = 0):
        self.capacity = min(max(MOST_VALUES // max(channels, 1), CAPACITY[0]), CAPACITY[1])
        self.seed = seed
        self.vectors: NDArray[np.float32] = np.empty((0, channels), np.float32)
        self.priorities: NDArray[np.float64] = np.empty(0)

    def choose(self, images: int, positions: int, first_image: int, call: int = 0) -> Offer:
        """Which vectors of a batch to take: of N images, the first of them number ``first_image`` of the stream."""
        offered = min(OFFERED, positions)
        drawn, within = _offers(first_image, images, offered, call, self.seed)
        kept = np.arange(len(drawn))
        if len(self.priorities) == self.capacity:
            kept = np.flatnonzero(drawn < self.priorities.max())
        if len(kept) > self.capacity:
            kept = np.sort(kept[np.argpartition(drawn[kept], self.capacity - 1)[: self.capacity]])
        # One position in each of as many equal strips, so that they differ: where in the strip is random, too.
        image, slot = np.divmod(kept, max(offered, 1))
        position = (slot + within[kept]) * positions / max(offered, 1)
        return image, position.astype(np.int64).clip(max=max(positions - 1, 0)), drawn[kept]

    def update(self, x_NCP: Tensor, first_image: int, call: int = 0) -> None:
        """Choose vectors of a batch and add them."""
        image, position, priorities = self.choose(x_NCP.shape[0], x_NCP.shape[2], first_image, call)
        self.take(x_NCP[torch.from_numpy(image), :, torch.from_numpy(position)].float().numpy(), priorities)

    def merge(self, other: VectorSample) -> None:
        """Add another process's vectors."""
        self.take(other.vectors, other.priorities)

    def take(self, vectors: NDArray[np.float32], priorities: NDArray[np.float64]) -> None:
        """Add vectors with the priorities that they were offered at."""
        if not len(priorities):
            return
        vectors, priorities = np.concatenate([self.vectors, vectors]), np.concatenate([self.priorities, priorities])
        if len(priorities) > self.capacity:
            least = np.argpartition(priorities, self.capacity - 1)[: self.capacity]
            vectors, priorities = vectors[least], priorities[least]
        self.vectors, self.priorities = vectors, priorities

    def compute(self) -> tuple[float | None, float | None, int]:
        """Effective rank and participation ratio of the vectors' covariance, and how many vectors there were."""
        return ranks(self.vectors)


def ranks(vectors_RC: NDArray[np.floating]) -> tuple[float | None, float | None, int]:
    """Effective rank exp(−Σ p ln p), p = λ / Σλ (Roy & Vetterli, EUSIPCO 2007), participation ratio (Σλ)² / Σλ², and R.

    λ are the eigenvalues of the C × C covariance of R vectors; vectors with a non-finite value are left out. None for
    fewer than two vectors, 0 for a constant layer.

    >>> ranks(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))[1:]
    (2.0, 4)
    """
    vectors = vectors_RC[np.isfinite(vectors_RC).all(1)].astype(np.float64)
    count = len(vectors)
    if count < 2:
        return None, None, count
    vectors -= vectors.mean(0)
    scale = np.abs(vectors).max()
    if scale == 0:
        return 0.0, 0.0, count
    vectors /= scale
    gram = vectors @ vectors.T if count < vectors.shape[1] else vectors.T @ vectors  # the same non-zero eigenvalues
    eigenvalues = np.linalg.eigvalsh(gram).clip(min=0)
    share = eigenvalues / eigenvalues.sum()
    share = share[share > 1e-15]
    return float(np.exp(-(share * np.log(share)).sum())), float(1 / np.square(share).sum()), count


@lru_cache(maxsize=64)
def _offers(
    first_image: int, images: int, offered: int, call: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Priorities, and places within a strip, of what the images offer: the same for every layer of a network."""
    numbers = range(first_image, first_image + images)
    draws = [np.random.default_rng((seed, number, call)).random((2, offered)) for number in numbers]
    priorities, within = np.stack(draws, 1) if draws else np.empty((2, 0, 0))
    return priorities.ravel(), within.ravel()
