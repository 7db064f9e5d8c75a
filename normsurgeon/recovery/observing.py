"""What the sites of a network see and give over a stream of images: per-channel moments, and some images' means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normsurgeon.analysis import moments
from normsurgeon.errors import DataError
from normsurgeon.hooks import listening
from normsurgeon.inference import home_of
from normsurgeon.surgery.probing import FeatureProbe
from normsurgeon.surgery.whitening import Moments
from normsurgeon.views import Views

MOST_IMAGES = 512
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
        """What balancing asks for: of the whitened features, the kept images' channel means, and the kurtosis."""
        count, m2, m4 = (self.table[:, column] for column in (moments.COUNT, moments.M2, moments.M4))
        spread = np.sqrt(np.maximum(m2 / np.maximum(count, 1), 1e-30))
        kurtosis = count * m4 / np.maximum(m2 * m2, 1e-30) - 3
        rows = np.stack([row for _, row in sorted(self.means, key=lambda pair: pair[0])])
        white = (rows - self.table[:, moments.MEAN]) / spread
        return FeatureProbe(torch.from_numpy(white).float(), torch.from_numpy(kurtosis).float())


def observe(
    model: nn.Module,
    sites: Sequence[Site],
    views: Views,
    view: int = 0,
    on_images: Callable[[int], None] | None = None,
) -> int:
    """One forward pass over all images; the sites' sums are begun anew. Returns how many images there were.

    The answer depends on neither the batch size nor the order of equal batches, up to rounding.

    :raises DataError: no images.
    """
    for site in sites:
        site.table, site.means = moments.empty(0), []
    images, stride = 0, 1
    for batch, _ in views:
        x = batch[view if view < len(batch) else 0]
        while (images + len(x) + stride - 1) // stride > MOST_IMAGES:  # thin out: every second one of those kept
            stride *= 2
            for site in sites:
                site.means = [pair for pair in site.means if pair[0] % stride == 0]

        def receiver(site: Site, first: int = images, every: int = stride) -> Callable[[Tensor], None]:
            return lambda features: site.receive(features, first, every)

        with torch.inference_mode(), listening([(site.module, site.where, receiver(site)) for site in sites]):
            run(model, x)
        images += len(x)
        if on_images is not None:
            on_images(len(x))
    if not images:
        raise DataError(f"there are no images in {views.name}; are the batches a used-up iterator?")
    return images


def run(model: nn.Module, images: Tensor) -> Any:
    """A forward pass, of images that are first put where the model is, in its precision."""
    device, dtype = home_of(model)
    return model(images.to(device, dtype if images.is_floating_point() else None))
