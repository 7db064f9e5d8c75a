"""What every layer's output looks like: one streaming pass, memory that does not grow with the images."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from normsurgeon.analysis.choosing import Layer
from normsurgeon.analysis.features import features
from normsurgeon.analysis.fluctuation import Fluctuation, group_view
from normsurgeon.analysis.records import LayerStatistics
from normsurgeon.analysis.sampling import VectorSample
from normsurgeon.distributed import gather_merged
from normsurgeon.inference import moments

TAU = 0.025
"""A channel is dormant at a score of at most this: the threshold of Sokar et al. (arXiv 2302.12902)."""

LISTED = 100

Array = NDArray[np.float64]


@dataclass
class _Sums:
    """Everything that is known of one layer: plain types and arrays, which go from process to process."""

    shape: tuple[int, ...]
    table: Array
    sample: VectorSample
    calls: int = 0
    passes: int = 0
    first_nonfinite: int | None = None
    nonfinite: float = 0.0

    def merge(self, other: _Sums) -> None:
        """Add what another process knows of the layer."""
        if len(other.table) != len(self.table):
            return
        moments.merge(self.table, other.table)
        self.sample.merge(other.sample)
        firsts = [n for n in (self.first_nonfinite, other.first_nonfinite) if n is not None]
        self.first_nonfinite = min(firsts, default=None)


@dataclass
class StatisticsCollector:
    """Sums over layers' outputs, which ``captured`` passes on.

    Call ``begin(images)`` before each forward pass, then let ``on_input`` and ``on_output`` receive. One of several
    processes also passes ``begin`` the number of the first image among all of theirs, and calls ``gather_`` at the end.
    """

    layers: Sequence[Layer]
    seed: int = 0
    images: int = 0
    _batch: int = 0
    _passes: int = 0
    _sums: dict[str, _Sums] = field(default_factory=dict)
    _fluctuations: dict[str, Fluctuation | None] = field(default_factory=dict)
    _last: tuple[Any, int, moments.Seen] | None = None

    def begin(self, images: int, first: int | None = None) -> None:
        """Begin a forward pass over that many images; ``first`` is the first one's number, by default the next one."""
        self.images = self.images + self._batch if first is None else first
        self._batch = images
        self._passes += 1
        self._last = None

    def on_output(self, layer: Layer, x: Tensor) -> None:
        """Add what ``layer`` has just returned."""
        x_NCP = features(layer, x, self._batch)
        channels = x_NCP.shape[1]
        sums = self._sums.get(layer.name)
        if sums is None:
            sums = _Sums(tuple(x.shape[1:]), moments.empty(channels), VectorSample(channels, self.seed))
            self._sums[layer.name] = sums
        if len(sums.table) != channels:
            return  # a module called with another number of channels: the first number is what is described
        sums.calls = sums.calls + 1 if sums.passes == self._passes else 1
        sums.passes = self._passes
        image, position, priorities = sums.sample.choose(len(x_NCP), x_NCP.shape[2], self.images, sums.calls - 1)
        seen = moments.update(sums.table, x_NCP, (image, position))
        sums.sample.take(seen.picked_MC, priorities)
        nonfinite = sums.table[:, [moments.NAN, moments.INF]].sum()
        if nonfinite > sums.nonfinite and sums.first_nonfinite is None:
            sums.first_nonfinite = self.images + int(x_NCP.isfinite().flatten(1).all(1).logical_not().nonzero()[0])
        sums.nonfinite = nonfinite
        self._last = (weakref.ref(x), x._version, seen) if x_NCP.shape[0] == len(x) else None

    def on_input(self, layer: Layer, x: Tensor) -> None:
        """Add what a norm layer is about to work on: how its group statistics vary."""
        if layer.name not in self._fluctuations:
            view = group_view(layer.module)
            self._fluctuations[layer.name] = Fluctuation(view) if view is not None else None
        fluctuation = self._fluctuations[layer.name]
        if fluctuation is None or x.ndim < 2:
            return
        last = self._last
        if last is not None and _same(last[0](), x) and last[1] == x._version:
            seen = last[2]  # its producer's output, which was read a moment ago
        else:
            x_NCP = x.flatten(2) if x.ndim > 2 else x[:, :, None]
            seen = moments.update(moments.empty(x.shape[1]), x_NCP)
        fluctuation.update(seen.means_NC, seen.variances_NC)

    def gather_(self) -> None:
        """Add what the other processes saw."""
        names = [layer.name for layer in self.layers]
        self._sums = gather_merged(self._sums, names)
        self._fluctuations = gather_merged(self._fluctuations, names)

    def compute(self) -> tuple[LayerStatistics, ...]:
        """One record a layer, in the order of the first forward pass; layers that it did not reach are left out."""
        layers = {layer.name: layer for layer in self.layers}
        return tuple(_summary(layers[name], sums, self._fluctuations.get(name)) for name, sums in self._sums.items())


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _summary(layer: Layer, sums: _Sums, fluctuation: Fluctuation | None) -> LayerStatistics:
    table = sums.table
    whole = moments.pooled(table)[0]
    values = whole[moments.COUNT]
    some = table[:, moments.COUNT] > 0
    counts = np.maximum(table[:, moments.COUNT], 1)
    means, variances = table[:, moments.MEAN], table[:, moments.M2] / counts
    images = np.maximum(table[:, moments.IMAGES], 1)
    magnitude = table[:, moments.ABS] / counts
    if layer.rectified:
        magnitude = (magnitude + means) / 2  # the mean of relu(x)
    dead = some & ((table[:, moments.ABS] == 0) | (layer.rectified & (table[:, moments.HIGH] <= 0)))
    typical = magnitude[some].mean() if some.any() else 0.0
    dormant = some & (magnitude <= TAU * typical)
    variance = whole[moments.M2] / values if values else 0.0
    rank, participation, rank_samples = sums.sample.compute()
    spread, shift = fluctuation.compute() if fluctuation is not None else (None, None)

    def mean_of(values_C: Array) -> float | None:
        return float(values_C[some].mean()) if some.any() else None

    def share(column: int) -> float | None:
        return float(whole[column] / values) if values else None

    return LayerStatistics(
        layer=layer.name,
        kind=layer.kind,
        class_name=type(layer.module).__name__,
        shape=sums.shape,
        channels=len(table),
        calls=sums.calls,
        values=int(values),
        mean=float(whole[moments.MEAN]) if values else None,
        var=float(variance) if values else None,
        min=float(whole[moments.LOW]) if values else None,
        max=float(whole[moments.HIGH]) if values else None,
        abs_mean=share(moments.ABS),
        zero_fraction=share(moments.ZEROS),
        skewness=float(whole[moments.M3] / values / variance**1.5) if variance > 0 else None,
        kurtosis=float(whole[moments.M4] / values / variance**2 - 3) if variance > 0 else None,
        squared_mean=mean_of(np.square(means)),
        channel_var=mean_of(variances),
        between_var=mean_of(table[:, moments.IMAGE_M2] / images),
        within_var=mean_of(table[:, moments.WITHIN] / images),
        dead_channels=int(dead.sum()),
        dormant_channels=int(dormant.sum()),
        dead=tuple(np.flatnonzero(dead)[:LISTED].tolist()),
        dormant=tuple(np.flatnonzero(dormant)[:LISTED].tolist()),
        effective_rank=rank,
        participation_ratio=participation,
        rank_samples=rank_samples,
        nan=int(whole[moments.NAN]),
        inf=int(whole[moments.INF]),
        first_nonfinite=sums.first_nonfinite,
        group_fluctuation=spread,
        mean_fluctuation=shift,
        groups=fluctuation.view.groups if fluctuation is not None else None,
        channel_means=tuple(means.tolist()),
        channel_stds=tuple(math.sqrt(value) for value in np.maximum(variances, 0)),
    )
