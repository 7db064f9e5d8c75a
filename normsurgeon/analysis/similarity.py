"""Which layers carry the same information: cross-layer CKA and cosines, from Gram matrices made once a batch.

A layer's features for N images are a matrix X of N rows, one number a channel and position; its Gram matrix K = X Xᵀ
is N × N whatever the layer's shape, so that layers of any two shapes, of one network or of two, compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normsurgeon.analysis.choosing import Layer
from normsurgeon.analysis.features import features
from normsurgeon.analysis.records import Matrix
from normsurgeon.norms.layers import wide

GROUP = 16
"""Images that CKA is estimated from at a time, whatever the batch size; the averages of these estimates are divided."""
LEAST = 4
"""Images that the unbiased estimator of HSIC needs: its denominator holds n − 3."""

GRID = 256
"""Positions of an image that the plain cosine looks at, a regular grid where a layer has more."""

Array = NDArray[np.float64]


def gram(x: Tensor) -> Array:
    """K = X Xᵀ of shape (N, N), float64, for features (N, …), computed in float32 (float64 for float64 input).

    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[5.0, 11.0], [11.0, 25.0]]
    """
    x = wide(x.detach().flatten(1))
    return (x @ x.T).double().cpu().numpy()


def centred_gram(x: Tensor, k: Array | None = None) -> Array:
    """``gram`` of the features less their mean over the images; ``k`` is ``gram(x)`` where that is known.

    The centring is done in the N × N matrix (H K H), which costs nothing; where the mean is so large that the
    difference would lose digits, the features themselves are centred first.
    """
    k = gram(x) if k is None else k
    centred = k - k.mean(0) - k.mean(1)[:, None] + k.mean()
    if np.trace(centred) < 1e-3 * np.trace(k):
        x = wide(x.detach().flatten(1))
        return gram(x - x.mean(0))
    return centred


def hsic_vectors(grams_LNN: Array) -> Array:
    """Vectors (L, N²) whose inner products are the unbiased estimates of HSIC (Song et al., JMLR 2012, eq. 5).

    HSIC₁(K, L) = [tr K̃L̃ + 1ᵀK̃1 · 1ᵀL̃1 / ((n−1)(n−2)) − 2 · 1ᵀK̃L̃1 / (n−2)] / (n(n−3)), K̃ = K with a zero diagonal.
    That equals the inner product of U-centred matrices (Székely & Rizzo, 2014), of which each layer has one: all
    pairs of layers are then a single matrix product.

    >>> x = np.random.default_rng(0).normal(size=(8, 5))
    >>> v = hsic_vectors((x @ x.T)[None])
    >>> v.shape
    (1, 64)
    """
    n = grams_LNN.shape[-1]
    k = grams_LNN.copy()
    k[:, range(n), range(n)] = 0
    rows = k.sum(2, keepdims=True) / (n - 2)
    u = k - rows - rows.transpose(0, 2, 1) + k.sum((1, 2), keepdims=True) / ((n - 1) * (n - 2))
    u[:, range(n), range(n)] = 0
    return (u / np.sqrt(n * (n - 3))).reshape(len(u), -1)


def cka(products: Array, own: Array, other: Array) -> Array:
    """⟨K, L⟩ / √(⟨K, K⟩⟨L, L⟩) for all pairs; nan where either norm is not above 0.

    ``products`` (L, M), ``own`` (L,) and ``other`` (M,) are sums over batches: averaged before the ratio.
    """
    scale = np.sqrt(np.clip(own, 0, None)[:, None] * np.clip(other, 0, None)[None])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, products / scale, np.nan)


@dataclass
class Kernels:
    """The Gram matrices of one batch, for each layer one of every ``GROUP`` images, in the order of the first calls.

    Call ``begin`` before each forward pass, then let ``on_output`` receive what ``captured`` hands over. A layer
    that is called more than once counts with its first call. ``grids`` keeps, where asked for, a grid of at most
    ``GRID`` positions of each layer's features in float32: what cosines between layers need, and no more.
    """

    with_grids: bool = False
    images: int = 0
    grams: dict[str, list[Array]] = field(default_factory=dict)
    centred: dict[str, list[Array]] = field(default_factory=dict)
    grids: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def begin(self, images: int) -> None:
        """Begin a forward pass over that many images: what is known of the last one is dropped."""
        self.images = images
        for kept in (self.grams, self.centred, self.grids):
            kept.clear()

    def on_output(self, layer: Layer, x: Tensor) -> None:
        """Take in what ``layer`` has just returned."""
        if layer.name in self.centred or len(x) % self.images:
            return
        rows = x.detach().reshape(self.images, -1)
        self.sizes.setdefault(layer.name, rows.shape[1])
        groups = rows.split(GROUP)
        self.grams[layer.name] = [gram(group) for group in groups]
        self.centred[layer.name] = list(map(centred_gram, groups, self.grams[layer.name]))
        if self.with_grids:
            self.grids[layer.name] = grid(features(layer, x, self.images))

    def group(self, number: int) -> tuple[Array, Array]:
        """The layers' Gram matrices (L, n, n) of a group of n images, and the centred ones."""
        grams, centred = (np.stack([groups[number] for groups in made.values()]) for made in (self.grams, self.centred))
        return grams, centred


def grid(x_NCP: Tensor) -> Tensor:
    """A copy of the features at no more than ``GRID`` positions, evenly spaced, in at least float32."""
    step = -(-x_NCP.shape[2] // GRID)
    return wide(x_NCP.detach()[:, :, ::step].clone())


@dataclass
class SimilarityCollector:
    """Sums over batches of what the three matrices are made of; ``update`` with a batch's kernels, then ``compute``.

    With ``columns`` the matrices are between two networks (``update`` then takes both networks' kernels).
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    images: int = 0
    used: int = 0
    smallest: int = 0
    _sums: dict[str, list[Array]] = field(default_factory=dict)

    def update(self, kernels: Kernels, others: Kernels | None = None) -> None:
        """Add one batch: ``others`` are the kernels of the second network for the same images."""
        self._check(tuple(kernels.centred), tuple((others or kernels).centred))
        self.images += kernels.images
        if kernels.with_grids and others is None:
            self._add("cosine", self._cosines(kernels))
        for number, first in enumerate(range(0, kernels.images, GROUP)):
            n = min(GROUP, kernels.images - first)
            both = [k.group(number) for k in (kernels, others) if k is not None]
            self._add("gram", _products(*(grams_LNN.reshape(len(grams_LNN), -1) for grams_LNN, _ in both)))
            if n >= LEAST:
                self.used += n
                self.smallest = min(self.smallest or n, n)
                self._add("hsic", _products(*(hsic_vectors(centred_LNN) for _, centred_LNN in both)))

    def merge(self, other: SimilarityCollector) -> None:
        """Add the sums of another process, over other batches."""
        if not other.rows:
            return
        self._check(other.rows, other.columns)
        self.images, self.used = self.images + other.images, self.used + other.used
        self.smallest = min((n for n in (self.smallest, other.smallest) if n), default=0)
        for kind, parts in other._sums.items():
            self._add(kind, parts)

    def _check(self, rows: tuple[str, ...], columns: tuple[str, ...]) -> None:
        if not self.rows:
            self.rows, self.columns = rows, columns
        if (rows, columns) != (self.rows, self.columns):
            raise AssertionError("the layers changed from batch to batch")

    def _add(self, kind: str, parts: Sequence[Array]) -> None:
        totals = self._sums.setdefault(kind, [np.zeros_like(part) for part in parts])
        for total, part in zip(totals, parts, strict=True):
            total += part

    def _cosines(self, kernels: Kernels) -> tuple[Array, Array]:
        """Sums over images of the cosines of layers whose features have one shape, and how many images these are."""
        total, count = np.zeros((2, len(self.rows), len(self.rows)))
        places: dict[tuple[int, ...], list[int]] = {}
        for place, name in enumerate(self.rows):
            places.setdefault(tuple(kernels.grids[name].shape[1:]), []).append(place)
        for group in places.values():
            x = torch.stack([kernels.grids[self.rows[i]].flatten(1) for i in group], 1)  # (N, L, D)
            x = x / torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min(1e-30)
            at = np.ix_(group, group)
            total[at] = torch.bmm(x, x.transpose(1, 2)).double().sum(0).cpu().numpy()
            count[at] = kernels.images
        return total, count

    def compute(self) -> tuple[Matrix, Matrix, Matrix]:
        """CKA, plain cosine and Gram cosine, with None where a pair has no value."""
        nothing = np.full((len(self.rows), len(self.columns)), np.nan)
        by_cka, by_gram = (cka(*self._sums[kind]) if kind in self._sums else nothing for kind in ("hsic", "gram"))
        total, count = self._sums.get("cosine", (nothing, nothing))
        by_cosine = np.divide(total, count, out=nothing.copy(), where=count > 0)
        return as_matrix(by_cka), as_matrix(by_cosine), as_matrix(by_gram)

    def notes(self, sizes: Sequence[int] = ()) -> tuple[str, ...]:
        """What limits the figures, in words."""
        found = []
        if not self.used:
            found.append(
                f"CKA has no value: the unbiased estimator needs at least {LEAST} images, and there were fewer at a "
                f"time ({self.images} in all); try more images"
            )
        elif self.used < self.images:
            found.append(
                f"{self.images - self.used} of {self.images} images, the last of them, are fewer than {LEAST} at a "
                "time and are left out of CKA"
            )
        if self.used and self.used < 64:
            found.append(f"CKA from {self.used} images is noisy; a few hundred settle it")
        wide = sum(size > 100 * self.used for size in sizes)
        if self.used and wide:
            found.append(
                f"{wide} of {len(sizes)} layers have more than 100 features for each image: the debiased estimator "
                "stays centred there, but biased CKA would be near 1 whatever the layers"
            )
        return tuple(found)


def _products(a: Array, b: Array | None = None) -> list[Array]:
    """Inner products of each layer's vector with each of the other network's (or its own), and all squared norms."""
    b = a if b is None else b
    return [a @ b.T, np.square(a).sum(1), np.square(b).sum(1)]


def as_matrix(values: Array) -> Matrix:
    """Rows of plain floats, None for what is not finite."""
    return tuple(tuple(float(v) if np.isfinite(v) else None for v in row) for row in values)
