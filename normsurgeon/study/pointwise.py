"""Pre-processing that looks at a pixel and at some statistics: of the training images, or of the image itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

SMALLEST = 1e-6
"""A standard deviation or range below this is rounding, and is not divided by."""

Self = TypeVar("Self", bound="Preprocessing")


@dataclass(frozen=True, eq=False)
class Preprocessing(ABC):
    """A fitted transform: images (N, C, H, W) → the same shape, dtype and device.

    An image's result depends on that image and the fitted state alone. The state is plain tensors in the fields, so
    that worker processes can be sent it and torch can save it.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def fit(cls: type[Self], batches: Iterable[Tensor]) -> Self:
        """From the training images: batches (N, C, H, W) in float64, each seen once."""

    @abstractmethod
    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The images, pre-processed."""

    @abstractmethod
    def describe(self) -> str:
        """What it does, in one line."""

    def to(self: Self, device: torch.device | str) -> Self:
        """The same with its state on another device."""
        tensors = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True, eq=False)
class Unchanged(Preprocessing):
    """y = x."""

    name = "none"

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> Unchanged:
        """There is nothing to fit."""
        return cls()

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The images as they are."""
        return x_NCHW

    def describe(self) -> str:
        """What it does."""
        return "pixels of 0 to 1 as they are"


@dataclass(frozen=True, eq=False)
class ZeroMean(Preprocessing):
    """y = x - mean_C, the mean of each channel over all pixels of the training images."""

    mean_C: Tensor
    name = "zero-mean"

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> ZeroMean:
        """The mean of each channel."""
        return cls(moments(batches)[0])

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The images around 0."""
        return x_NCHW - along(self.mean_C, x_NCHW)

    def describe(self) -> str:
        """What it does."""
        return f"minus the training mean of each channel ({_numbers(self.mean_C)})"


@dataclass(frozen=True, eq=False)
class MinMax(Preprocessing):
    """y = (x - min_C) / (max_C - min_C), of each channel over the training images: 0 to 1 on these.

    Other images may leave that range: nothing is clipped. A channel that is constant becomes 0.
    """

    min_C: Tensor
    range_C: Tensor
    name = "min-max"

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> MinMax:
        """The smallest and the largest value of each channel."""
        found = [(x.amin(dim=(0, 2, 3)), x.amax(dim=(0, 2, 3))) for x in batches]
        low, high = torch.stack([a for a, _ in found]).amin(0), torch.stack([b for _, b in found]).amax(0)
        return cls(low, _divisor(high - low))

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The training images' range, made 0 to 1."""
        return (x_NCHW - along(self.min_C, x_NCHW)) / along(self.range_C, x_NCHW)

    def describe(self) -> str:
        """What it does."""
        high = self.min_C + self.range_C
        return f"each channel's training range ({_numbers(self.min_C)} to {_numbers(high)}) made 0 to 1"


@dataclass(frozen=True, eq=False)
class Standard(Preprocessing):
    """y = (x - mean_C) / std_C, the standard score of each channel over all pixels of the training images.

    The standard deviation is the population's (divided by n); a channel that is constant is divided by 1.
    """

    mean_C: Tensor
    std_C: Tensor
    name = "standard"

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> Standard:
        """The mean and standard deviation of each channel."""
        mean_C, var_C = moments(batches)
        return cls(mean_C, _divisor(var_C.sqrt()))

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The images with mean 0 and variance 1 over the training images."""
        return (x_NCHW - along(self.mean_C, x_NCHW)) / along(self.std_C, x_NCHW)

    def describe(self) -> str:
        """What it does."""
        return f"standard score of each channel: mean {_numbers(self.mean_C)}, std {_numbers(self.std_C)}"


@dataclass(frozen=True, eq=False)
class StandardPerImage(Preprocessing):
    """y = (x - mean) / max(std, 1 / (255 √(HW))), mean and std of each image's each channel over its pixels.

    The least divisor is that of TensorFlow's ``tf.image.per_image_standardization`` (1 / √n for pixels of 0 to 255):
    the standard deviation of an image that one pixel of one grey level sets apart from a constant one.
    """

    name = "standard-per-image"

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> StandardPerImage:
        """There is nothing to fit: each image brings its own statistics."""
        return cls()

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Every image with mean 0 and variance 1; a constant one 0."""
        x = x_NCHW.double()
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
        least = 1 / (255 * (x.shape[2] * x.shape[3]) ** 0.5)
        return ((x - mean) / var.sqrt().clamp(min=least)).to(x_NCHW)

    def describe(self) -> str:
        """What it does."""
        return "standard score of each channel of each image, by its own mean and std"


@dataclass(frozen=True, eq=False)
class ContrastStretch(Preprocessing):
    """y = (clip(x, p2, p98) - p2) / (p98 - p2): each image's 2nd to 98th percentile, of all its values, made 0 to 1.

    As scikit-image's ``rescale_intensity(image, in_range=tuple(np.percentile(image, (2, 98))), out_range=(0, 1))``;
    percentiles are interpolated linearly (NumPy's default), and the channels of a colour image keep their proportions.
    An image whose percentiles coincide is clipped to 0 to 1 and otherwise kept, as there.
    """

    name = "contrast-stretch"
    percentiles: ClassVar[tuple[float, float]] = (2.0, 98.0)

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> ContrastStretch:
        """There is nothing to fit: each image brings its own percentiles."""
        return cls()

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Images of values 0 to 1."""
        x_ND = x_NCHW.flatten(1).double()
        sorted_ND = x_ND.sort(dim=1).values  # torch.quantile refuses more than 2^24 values
        low, high = (_percentile(sorted_ND, p) for p in self.percentiles)
        width = high - low
        stretched = (x_ND.clamp(low, high) - low) / torch.where(width > SMALLEST, width, 1)
        return torch.where(width > SMALLEST, stretched, x_ND.clamp(0, 1)).reshape(x_NCHW.shape).to(x_NCHW)

    def describe(self) -> str:
        """What it does."""
        low, high = self.percentiles
        return f"each image's values from percentile {low:g} to {high:g} stretched to 0 to 1, the rest clipped"


def moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean and population variance of each channel, (C,) each, in one pass over batches (N, C, H, W).

    The pairwise update of Chan, Golub & LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances (1979): it loses no digits where the mean is large and the variance small.

    >>> moments([torch.tensor([1.0, 2.0]).reshape(1, 1, 1, 2), torch.tensor([6.0]).reshape(1, 1, 1, 1)])
    (tensor([3.]), tensor([4.6667]))
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for x in batches:
        var_C, mean_C = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        more = x.numel() // x.shape[1]
        delta, total = mean_C - mean, count + more
        mean = mean + delta * (more / total)
        squares = squares + var_C * more + delta**2 * (count * more / total)
        count = total
    return mean, squares / count


def _percentile(sorted_ND: Tensor, percent: float) -> Tensor:
    """The percentile of each row, (N, 1), with linear interpolation between the two nearest values."""
    place = percent / 100 * (sorted_ND.shape[1] - 1)
    below = int(place)
    above = min(below + 1, sorted_ND.shape[1] - 1)
    return torch.lerp(sorted_ND[:, below], sorted_ND[:, above], place - below)[:, None]


def _divisor(spread: Tensor) -> Tensor:
    return torch.where(spread > SMALLEST, spread, 1)


def along(values_C: Tensor, x_NCHW: Tensor) -> Tensor:
    """One number a channel, (1, C, 1, 1), of the images' dtype and on their device."""
    return values_C.to(x_NCHW)[None, :, None, None]


def _numbers(values: Any) -> str:
    return ", ".join(f"{float(value):.4g}" for value in values)
