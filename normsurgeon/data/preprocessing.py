"""Pre-processing by name, fitted to the training images only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from normsurgeon._util.suggest import suggest
from normsurgeon.errors import DataError, UsageError

SMALLEST = 1e-6
"""A standard deviation or range below this is rounding, and is not divided by."""

MAX_IMAGES = 10_000
VALUES_AT_ONCE = 1 << 20
"""Pixels (times channels) that are summed up together; all sums are in float64, on the CPU."""


@dataclass(frozen=True, eq=False)
class Preprocessing(ABC):
    """A fitted transform: images (N, C, H, W) → the same shape, dtype and device.

    An image's result depends on that image and the fitted state alone. The state is plain tensors in the fields, so
    that it can be sent to worker processes.
    """

    name: ClassVar[str]

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> Self:
        """From the training images: batches (N, C, H, W) in float64, each seen once. By default, nothing is fitted."""
        return cls()

    @abstractmethod
    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The images, pre-processed."""


@dataclass(frozen=True, eq=False)
class Unchanged(Preprocessing):
    """y = x."""

    name = "none"

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The images as they are."""
        return x_NCHW


@dataclass(frozen=True, eq=False)
class Standard(Preprocessing):
    """y = (x - mean_C) / std_C, the standard score of each channel over all pixels of the training images.

    The standard deviation is the population's (divided by n); a channel that is constant is divided by 1.
    """

    mean_C: Tensor
    std_C: Tensor
    name = "standard"

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> Self:
        """The mean and standard deviation of each channel."""
        mean_C, covariance_CC = _covariance(_channels(batches))
        return cls(mean_C, _divisor(covariance_CC.diagonal().sqrt()))

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The images with mean 0 and variance 1 over the training images."""
        return (x_NCHW - _along(self.mean_C, x_NCHW)) / _along(self.std_C, x_NCHW)


@dataclass(frozen=True, eq=False)
class ZeroMean(Standard):
    """y = x - mean_C, the mean of each channel over all pixels of the training images."""

    name = "zero-mean"

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> Self:
        """The mean of each channel."""
        mean_C, _ = _covariance(_channels(batches))
        return cls(mean_C, torch.ones_like(mean_C))


@dataclass(frozen=True, eq=False)
class MinMax(Standard):
    """y = (x - min_C) / (max_C - min_C), of each channel over the training images: 0 to 1 on these.

    Other images may leave that range: nothing is clipped. A channel that is constant becomes 0. The minimum and the
    range take the places of ``mean_C`` and ``std_C``.
    """

    name = "min-max"

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> Self:
        """The smallest and the largest value of each channel."""
        found = [(x.amin(dim=(0, 2, 3)), x.amax(dim=(0, 2, 3))) for x in batches]
        low, high = torch.stack([a for a, _ in found]).amin(0), torch.stack([b for _, b in found]).amax(0)
        return cls(low, _divisor(high - low))


@dataclass(frozen=True, eq=False)
class StandardPerImage(Preprocessing):
    """y = (x - mean) / max(std, 1 / (255 √(HW))), mean and std of each image's each channel over its pixels.

    The least divisor is that of TensorFlow's ``tf.image.per_image_standardization`` (1 / √n for pixels of 0 to 255):
    the standard deviation of an image that one pixel of one grey level sets apart from a constant one.
    """

    name = "standard-per-image"

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Every image with mean 0 and variance 1; a constant one 0."""
        x = x_NCHW.double()
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
        least = 1 / (255 * (x.shape[2] * x.shape[3]) ** 0.5)
        return ((x - mean) / var.sqrt().clamp(min=least)).to(x_NCHW)


@dataclass(frozen=True, eq=False)
class ContrastStretch(Preprocessing):
    """y = (clip(x, p2, p98) - p2) / (p98 - p2): each image's 2nd to 98th percentile, of all its values, made 0 to 1.

    As scikit-image's ``rescale_intensity(image, in_range=tuple(np.percentile(image, (2, 98))), out_range=(0, 1))``;
    percentiles are interpolated linearly (NumPy's default), and the channels of a colour image keep their proportions.
    An image whose percentiles coincide is clipped to 0 to 1 and otherwise kept, as there.
    """

    name = "contrast-stretch"

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Images of values 0 to 1."""
        x_ND = x_NCHW.flatten(1).double()
        sorted_ND = x_ND.sort(dim=1).values  # torch.quantile refuses more than 2^24 values
        low, high = _percentile(sorted_ND, 2), _percentile(sorted_ND, 98)
        width = high - low
        stretched = (x_ND.clamp(low, high) - low) / torch.where(width > SMALLEST, width, 1)
        return torch.where(width > SMALLEST, stretched, x_ND.clamp(0, 1)).reshape(x_NCHW.shape).to(x_NCHW)


@dataclass(frozen=True, eq=False)
class LinearPrediction(Preprocessing):
    """y[i, j] = (x[i, j] - b - Σ_k a_k x[(i, j) + k]) / s: what a linear predictor leaves over, of each channel.

    k runs over the non-symmetric half-plane of the 12 pixels that come before (i, j) in the order of reading and lie
    at most 2 rows and columns away: the causal support of 2-D linear prediction and DPCM (Jain, Fundamentals of
    Digital Image Processing, 1989, chapters 6 and 11; Lim, Two-Dimensional Signal and Image Processing, 1990,
    chapters 5 and 6). a and b solve the normal equations of least squares, AᵀA c = Aᵀx, over all pixels of the
    training images; beyond its border an image continues with its outermost pixels. s is the standard deviation of
    the residual over the training images, which has the mean 0 and is uncorrelated with the 12 neighbours there.

    coefficients_CK  a, in the order of ``NEIGHBOURS``
    bias_C, std_C    b and s
    """

    coefficients_CK: Tensor
    bias_C: Tensor
    std_C: Tensor
    name = "linear-prediction"
    REACH: ClassVar[int] = 2
    NEIGHBOURS: ClassVar[tuple[tuple[int, int], ...]] = tuple(
        (row, column) for row in (-2, -1, 0) for column in (-2, -1, 0, 1, 2) if (row, column) < (0, 0)
    )

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> Self:
        """The coefficients of each channel, from the sums AᵀA of the normal equations."""
        gram_CKK = torch.zeros(())  # of (neighbours, 1, the pixel itself)
        for x in batches:
            columns = torch.stack([*cls._neighbours(x), torch.ones_like(x), x], dim=-1)  # N, C, H, W, K + 2
            a_CPK = columns.transpose(0, 1).flatten(1, 3)
            gram_CKK = gram_CKK + a_CPK.mT @ a_CPK
        normal, right, energy = gram_CKK[:, :-1, :-1], gram_CKK[:, :-1, -1:], gram_CKK[:, -1, -1]
        # Neighbours that are all alike (a black border) leave directions open: the pseudo-inverse sets them to 0.
        solved_CK = (torch.linalg.pinv(normal, hermitian=True, rtol=1e-12) @ right)[..., 0]
        left_over = energy - (solved_CK * right[..., 0]).sum(1)
        std_C = (left_over / normal[:, -1, -1]).clamp(min=0).sqrt()
        return cls(solved_CK[:, :-1], solved_CK[:, -1], _divisor(std_C))

    @classmethod
    def _neighbours(cls, x_NCHW: Tensor) -> list[Tensor]:
        reach, (height, width) = cls.REACH, x_NCHW.shape[2:]
        padded = F.pad(x_NCHW, (reach, reach, reach, 0), mode="replicate")
        return [
            padded[:, :, reach + row : reach + row + height, reach + column : reach + column + width]
            for row, column in cls.NEIGHBOURS
        ]

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The residual, of variance 1 over the training images."""
        predicted = _along(self.bias_C, x_NCHW)
        for number, neighbour in enumerate(self._neighbours(x_NCHW)):
            predicted = predicted + _along(self.coefficients_CK[:, number], x_NCHW) * neighbour
        return (x_NCHW - predicted) / _along(self.std_C, x_NCHW)


@dataclass(frozen=True, eq=False)
class Zca(Preprocessing):
    """y = W (x - mean), W = U (Λ + ε I)^(-1/2) Uᵀ, of images as vectors of all their D = C·H·W values.

    U and Λ are the eigenvectors and eigenvalues of the training images' covariance: of all linear maps that whiten,
    the one that stays closest to the image (Bell & Sejnowski, The independent components of natural scenes are edge
    filters, 1997; Krizhevsky, Learning multiple layers of features from tiny images, 2009, appendix A). ε keeps
    directions without variance from being blown up: where Λ ≫ ε, the covariance of y is the identity.

    mean_D, whitening_DD  in float32
    eps                   ε, for pixels of 0 to 1
    """

    mean_D: Tensor
    whitening_DD: Tensor
    eps: float
    name = "zca"
    MAX_VALUES: ClassVar[int] = 3 * 32 * 32

    @classmethod
    def fit(cls, batches: Iterable[Tensor], eps: float = 1e-2) -> Self:
        """The mean and the whitening matrix, from the sums of x and of x xᵀ in one pass.

        :raises UsageError: if images have more than 3·32·32 values: W would have the square of that.
        """

        def vectors() -> Iterator[Tensor]:
            for x in batches:
                cls.check_size(tuple(x.shape[1:]))
                yield x.flatten(1)

        mean_D, covariance_DD = _covariance(vectors())
        values, directions = torch.linalg.eigh(covariance_DD)
        whitening = (directions * (values.clamp(min=0) + eps).rsqrt()) @ directions.mT
        return cls(mean_D.float(), whitening.float(), eps)

    @classmethod
    def check_size(cls, shape: tuple[int, ...]) -> None:
        """:raises UsageError: if images of that shape, (C, H, W), have too many values to be whitened."""
        values = math.prod(shape)
        if values > cls.MAX_VALUES:
            raise UsageError(
                f"zca takes images of at most {cls.MAX_VALUES} values, and {'×'.join(map(str, shape))} has {values}; "
                f"try image_size: {int((cls.MAX_VALUES / shape[0]) ** 0.5)}, or linear-prediction"
            )

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Whitened images."""
        centred_ND = x_NCHW.flatten(1) - self.mean_D.to(x_NCHW)
        return (centred_ND @ self.whitening_DD.to(x_NCHW)).reshape(x_NCHW.shape)


KINDS: dict[str, type[Preprocessing]] = {
    kind.name: kind
    for kind in (Unchanged, ZeroMean, MinMax, Standard, StandardPerImage, ContrastStretch, LinearPrediction, Zca)
}
"""Every pre-processing that is fitted to images. ``model``, which is not, is a network's own mean and std."""


def fit(
    name: str,
    images: Tensor | Iterable[Tensor],
    *,
    own: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    zca_eps: float = 1e-2,
    max_images: int = MAX_IMAGES,
) -> Preprocessing:
    """Pre-processing fitted to training images. The test images must not be among them.

    name         ``none``, ``zero-mean``, ``min-max``, ``standard``, ``standard-per-image``, ``contrast-stretch``,
                 ``linear-prediction``, ``zca``, or ``model``
    images       (N, C, H, W), floats of 0 to 1, or batches of these; read once, and no more than ``max_images``
    own          of ``model``: the network's mean and std, one number per channel
    zca_eps      of ``zca``: what is added to the eigenvalues of the covariance

    :raises UsageError: if the name is unknown, or these are no images, or too large for ZCA.
    :raises DataError: if there are no images, or values that are not finite.

    >>> images = torch.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    >>> bool((fit("standard", images)(images).mean((0, 2, 3)).abs() < 1e-5).all())
    True
    """
    if name == "model":
        if own is None:
            raise UsageError("preprocessing 'model' takes the network's mean and std; give own=(mean, std)")
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in own)
        return Standard(mean, std)
    kind = KINDS.get(name)
    if kind is None:
        raise UsageError(f"unknown pre-processing {name!r}; {suggest(str(name), [*KINDS, 'model'])}")
    batches = _checked(images, max_images)
    return Zca.fit(batches, zca_eps) if kind is Zca else kind.fit(batches)


def _checked(images: Tensor | Iterable[Tensor], most: int) -> Iterator[Tensor]:
    """Batches of at most ``VALUES_AT_ONCE`` values in float64, ``most`` images in all."""
    shape: torch.Size | None = None
    left = most
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor) or batch.ndim != 4 or not batch.is_floating_point():
            kind = f"of type {type(batch).__name__}"
            if isinstance(batch, Tensor):
                kind = f"{str(batch.dtype).removeprefix('torch.')} of shape {tuple(batch.shape)}"
            raise UsageError(f"images must be floats (N, C, H, W), and these are {kind}")
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape:
            raise UsageError(
                f"the images have several sizes ({tuple(shape)}, {tuple(batch.shape[1:])}); "
                "pre-processing is fitted to images of one size"
            )
        for part in batch[:left].split(max(1, VALUES_AT_ONCE // max(1, shape.numel()))):
            if not part.numel():
                continue
            if not part.isfinite().all():
                raise DataError("the training images have values that are not finite; is there a broken image?")
            yield part.detach().cpu().double()
            left -= len(part)
        if left <= 0:
            return
    if left == most:
        raise DataError("there are no training images to fit the pre-processing to")


def _covariance(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the population covariance (D, D) of vectors (N, D), in one pass.

    The pairwise update of Chan, Golub & LeVeque (1979): it loses no digits if the mean is large and the variance small.

    >>> _covariance([torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    (tensor([3.]), tensor([[4.6667]]))
    """
    count, mean, scatter = 0, torch.zeros(()), torch.zeros(())
    for x_ND in batches:
        mean_D, more = x_ND.mean(0), len(x_ND)
        delta, total = mean_D - mean, count + more
        centred_ND = x_ND - mean_D
        scatter = scatter + centred_ND.mT @ centred_ND + torch.outer(delta, delta) * (count * more / total)
        mean, count = mean + delta * (more / total), total
    return mean, scatter / count


def _channels(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The pixels of images as vectors of channels, (N·H·W, C)."""
    return (x_NCHW.transpose(0, 1).flatten(1).mT for x_NCHW in batches)


def _percentile(sorted_ND: Tensor, percent: float) -> Tensor:
    """The percentile of each row, (N, 1), with linear interpolation between the two nearest values."""
    place = percent / 100 * (sorted_ND.shape[1] - 1)
    below = int(place)
    above = min(below + 1, sorted_ND.shape[1] - 1)
    return torch.lerp(sorted_ND[:, below], sorted_ND[:, above], place - below)[:, None]


def _divisor(spread: Tensor) -> Tensor:
    return torch.where(spread > SMALLEST, spread, 1)


def _along(values_C: Tensor, x_NCHW: Tensor) -> Tensor:
    """One number per channel, (1, C, 1, 1), of the images' dtype and on their device."""
    return values_C.to(x_NCHW)[None, :, None, None]
