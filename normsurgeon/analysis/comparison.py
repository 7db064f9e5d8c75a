"""A network and its baseline, layer by layer: what a surgery changed, and where."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normsurgeon.analysis.choosing import Layer
from normsurgeon.analysis.features import features
from normsurgeon.analysis.records import LayerPair, LayerStatistics, Matrix
from normsurgeon.analysis.similarity import grid
from normsurgeon.distributed import gather_merged

Array = NDArray[np.float64]


@dataclass
class _Pair:
    """Sums over images of one layer's features a and the baseline's b."""

    channels: int
    images: int = 0
    cosine: float = 0.0
    distance: float = 0.0
    energy: float = 0.0
    products_C: Array = field(default_factory=lambda: np.zeros(0))
    squares_C: Array = field(default_factory=lambda: np.zeros(0))
    squares_baseline_C: Array = field(default_factory=lambda: np.zeros(0))

    def merge(self, other: _Pair) -> None:
        """Add another process's sums."""
        for name in vars(other):
            if name != "channels":
                setattr(self, name, getattr(self, name) + getattr(other, name))

    def compute(self) -> tuple[float | None, float | None, float | None, int | None, float | None]:
        """Cosine, relative error, the channels' mean cosine, the worst channel, and its cosine."""
        cosine = self.cosine / self.images
        error = math.sqrt(self.distance / self.energy) if self.energy > 0 else None
        scale_C = np.sqrt(self.squares_C * self.squares_baseline_C)
        if not scale_C.any():
            return cosine, error, None, None, None
        cosine_C = np.divide(self.products_C, scale_C, out=np.full(self.channels, np.nan), where=scale_C > 0)
        worst = int(np.nanargmin(cosine_C))
        return cosine, error, float(np.nanmean(cosine_C)), worst, float(cosine_C[worst])


@dataclass
class PairCollector:
    """Compares the layers that two networks have under one name and shape, at a grid of positions of each image.

    For each batch: ``begin``, run the baseline with ``on_baseline``, then the model with ``on_output``. The
    baseline's features are held until the model's layer of that name has run.
    """

    images: int = 0
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _pairs: dict[str, _Pair] = field(default_factory=dict)

    def begin(self, images: int) -> None:
        """Begin a batch of that many images."""
        self.images = images
        self._waiting.clear()

    def on_baseline(self, layer: Layer, x: Tensor) -> None:
        """Keep what the baseline's layer returned; of several calls, the first."""
        if layer.name not in self._waiting:
            self._waiting[layer.name] = grid(features(layer, x, self.images))

    def on_output(self, layer: Layer, x: Tensor) -> None:
        """Compare what the model's layer returned with what the baseline's of the same name did."""
        b = self._waiting.pop(layer.name, None)
        if b is None:
            return
        a = grid(features(layer, x, self.images))
        if a.shape != b.shape:
            return
        a, b = a.to(b.device), b.to(a.dtype)
        # On finite values only: one image gone wrong should show in the counts, and not wipe out the rest.
        fine = a.isfinite().flatten(1).all(1) & b.isfinite().flatten(1).all(1)
        if not fine.all():
            a, b = a[fine], b[fine]
        if not len(a):
            return
        channels = a.shape[1]
        pair = self._pairs.setdefault(layer.name, _Pair(channels, 0, 0, 0, 0, *np.zeros((3, channels))))
        product_NC, a_NC, b_NC = ((u * v).sum(2).double() for u, v in ((a, b), (a, a), (b, b)))
        norms = (a_NC.sum(1) * b_NC.sum(1)).sqrt().clamp_min(1e-300)
        pair.images += len(a)
        pair.cosine += float((product_NC.sum(1) / norms).sum())
        pair.distance += float((a - b).square().sum(dtype=torch.float64))
        pair.energy += float(b_NC.sum())
        pair.products_C += product_NC.sum(0).cpu().numpy()
        pair.squares_C += a_NC.sum(0).cpu().numpy()
        pair.squares_baseline_C += b_NC.sum(0).cpu().numpy()

    def gather_(self, names: Sequence[str]) -> None:
        """Add what the other processes compared of these layers."""
        self._pairs = gather_merged(self._pairs, names)

    def compute(
        self,
        layers: Sequence[str],
        baseline_layers: Sequence[str],
        statistics: dict[str, LayerStatistics],
        baseline_statistics: dict[str, LayerStatistics],
        cka: Matrix | None,
        gram_cosine: Matrix | None,
        rewritten: Set[str],
    ) -> tuple[LayerPair, ...]:
        """One record for each name that both networks have; ``cka`` and ``gram_cosine`` are layers × baseline's."""
        columns = {name: place for place, name in enumerate(baseline_layers)}
        found = []
        for row, name in enumerate(layers):
            if name not in columns:
                continue
            by_cka, by_gram = (matrix[row][columns[name]] if matrix else None for matrix in (cka, gram_cosine))
            pair = self._pairs[name].compute() if name in self._pairs else (None, None, None, None, None)
            moved = _moved(statistics.get(name), baseline_statistics.get(name))
            found.append(LayerPair(name, name, by_cka, by_gram, *pair, *moved, name in rewritten))
        return tuple(found)


def _moved(mine: LayerStatistics | None, theirs: LayerStatistics | None) -> tuple[float | None, float | None]:
    """Mean over channels of |mean_a − mean_b| / std_b, and the geometric mean of std_a / std_b."""
    if mine is None or theirs is None or mine.channels != theirs.channels:
        return None, None
    a, b = np.array(mine.channel_stds), np.array(theirs.channel_stds)
    alive = (b > 0) & (a > 0)
    if not alive.any():
        return None, None
    apart = np.abs(np.array(mine.channel_means) - np.array(theirs.channel_means))
    return float((apart[alive] / b[alive]).mean()), float(np.exp(np.log(a[alive] / b[alive]).mean()))


def rewritten_layers(model: nn.Module, baseline: nn.Module, layers: Sequence[Layer]) -> frozenset[str]:
    """Of these layers of either network, those that differ by design: a conversion put something else behind them.

    Where a norm was converted or folded away, its producer may have taken in the whitening, or all of the norm. What
    it returns then says nothing about what was lost; the norm and the block after it do.
    """
    ours, theirs = dict(model.named_modules()), dict(baseline.named_modules())
    return frozenset(
        layer.name
        for layer in layers
        if layer.feeds is not None
        and type(ours.get(layer.feeds)) is not type(theirs.get(layer.feeds))
        and not _same_weights(ours.get(layer.name), theirs.get(layer.name))
    )


def _same_weights(a: nn.Module | None, b: nn.Module | None) -> bool:
    mine, other = getattr(a, "weight", None), getattr(b, "weight", None)
    if not isinstance(mine, Tensor) or not isinstance(other, Tensor) or mine.shape != other.shape:
        return False
    return torch.equal(mine.detach().cpu().double(), other.detach().cpu().double())
