"""What the sites of a network see and give over a stream of images: per-channel moments, and some images' means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normsurgeon.calls import Call, on, outputs_of
from normsurgeon.distributed import gather
from normsurgeon.inference import moments
from normsurgeon.inference.hooks import listening
from normsurgeon.inference.run import home_of
from normsurgeon.norms.affine import Moments
from normsurgeon.surgery.probing import FeatureProbe

MAX_KEPT_IMAGES = 512
"""Images whose channel means are kept, spread evenly over the stream as it grows."""


@dataclass
class Site:
    """One place to read: a module's input or output, (N, C, …), and the sums of what passed there."""

    name: str
    module: nn.Module
    where: Literal["input", "output"]
    keep_means: bool = False
    table: moments.Table = field(default_factory=lambda: moments.empty(0))
    means: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)

    def receive(self, x: Tensor, first_image: int, stride: int) -> None:
        """Take a batch in."""
        if not len(self.table):
            self.table = moments.empty(x.shape[1])
        seen = moments.update(self.table, x.flatten(2) if x.ndim > 2 else x[:, :, None])
        if self.keep_means:
            means = seen.means_NC.astype(np.float32)
            numbers = range(first_image, first_image + len(means))
            self.means += [(n, row) for n, row in zip(numbers, means, strict=False) if n % stride == 0]

    def merge(self, table: moments.Table, means: list[tuple[int, NDArray[np.float32]]]) -> None:
        """Take in what passed at the same place in another process."""
        if len(table):
            if len(self.table):
                moments.merge(self.table, table)
            else:
                self.table = table.copy()
        self.means += means

    @property
    def moments(self) -> Moments:
        """Mean and (population) variance of each channel, (C,) float64."""
        count = np.maximum(self.table[:, moments.COUNT], 1)
        return Moments(
            torch.from_numpy(self.table[:, moments.MEAN].copy()),
            torch.from_numpy(self.table[:, moments.M2] / count),
        )

    @property
    def probe(self) -> FeatureProbe:
        """What balancing needs: of the whitened features, the kept images' channel means, and the kurtosis."""
        count, m2, m4 = (self.table[:, column] for column in (moments.COUNT, moments.M2, moments.M4))
        spread = np.sqrt(np.maximum(m2 / np.maximum(count, 1), 1e-30))
        kurtosis = count * m4 / np.maximum(m2 * m2, 1e-30) - 3
        rows = np.stack([row for _, row in sorted(self.means, key=lambda pair: pair[0])])
        white = (rows - self.table[:, moments.MEAN]) / spread
        return FeatureProbe(torch.from_numpy(white).float(), torch.from_numpy(kurtosis).float())


def observe(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[tuple[int, Tensor | Call]],
    count: Callable[[int], None] = lambda images: None,
) -> int:
    """One forward pass over this process's batches, each with the number of its first image among all processes'.

    The new sites then hold the sums over all processes. Returns the number of all images. The answer does not depend on
    the batch size, nor on how many processes share the images, up to rounding.
    """
    images, end, stride = 0, 0, 1
    for first, x in batches:
        end = first + len(x)
        stride = _thinned(sites, stride, end)

        def receiver(site: Site, first: int = first, every: int = stride) -> Callable[[Tensor], None]:
            return lambda features: site.receive(features, first, every)

        with torch.inference_mode(), listening([(site.module, site.where, receiver(site)) for site in sites]):
            run(model, x)
        images += len(x)
        count(len(x))
    found = gather((images, end, [(site.table, site.means) for site in sites]))
    for site, *parts in zip(sites, *(sums for *_, sums in found), strict=True):
        site.table, site.means = moments.empty(0), []
        for table, means in parts:
            site.merge(table, means)
    _thinned(sites, 1, max(end for _, end, _ in found))
    return sum(number for number, *_ in found)


def _thinned(sites: Sequence[Site], stride: int, images: int) -> int:
    """Keep every second image's means, until at most ``MAX_KEPT_IMAGES`` are left; the new stride."""
    before = stride
    while -(-images // stride) > MAX_KEPT_IMAGES:
        stride *= 2
    if stride > before:
        for site in sites:
            site.means = [pair for pair in site.means if pair[0] % stride == 0]
    return stride


def run(model: nn.Module, images: Tensor | Call) -> Any:
    """A forward pass, of images that are first put where the model is, in its precision."""
    return outputs_of(model, on(images, *home_of(model)))
