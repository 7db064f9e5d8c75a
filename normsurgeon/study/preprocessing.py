"""Pre-processing by name, fitted on the training split only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from normsurgeon.errors import DataError, UsageError
from normsurgeon.study.decorrelating import LinearPrediction, Zca
from normsurgeon.study.names import offer
from normsurgeon.study.pointwise import (
    ContrastStretch,
    MinMax,
    Preprocessing,
    Standard,
    StandardPerImage,
    Unchanged,
    ZeroMean,
)

KINDS: dict[str, type[Preprocessing]] = {
    kind.name: kind
    for kind in (Unchanged, ZeroMean, MinMax, Standard, StandardPerImage, ContrastStretch, LinearPrediction, Zca)
}
"""Every pre-processing that is fitted to images. ``model``, which is not, is a network's own mean and std."""

MOST_IMAGES = 10_000
VALUES_AT_ONCE = 1 << 20
"""Pixels (times channels) that are summed up together; all sums are in float64, on the CPU."""


def fit(
    name: str,
    images: Tensor | Iterable[Tensor],
    *,
    own: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    zca_eps: float = 1e-2,
    most_images: int = MOST_IMAGES,
) -> Preprocessing:
    """Pre-processing fitted to training images. The test images must not be among them.

    name         ``none``, ``zero-mean``, ``min-max``, ``standard``, ``standard-per-image``, ``contrast-stretch``,
                 ``linear-prediction``, ``zca``, or ``model``
    images       (N, C, H, W), floats of 0 to 1, or batches of these; read once, and no more than ``most_images``
    own          of ``model``: the network's mean and std, one number a channel
    zca_eps      of ``zca``: what is added to the eigenvalues of the covariance

    :raises UsageError: an unknown name, something else than images, or images too large for ZCA.
    :raises DataError: no images, or values that are not finite.

    >>> images = torch.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    >>> standard = fit("standard", images)
    >>> bool((standard(images).mean((0, 2, 3)).abs() < 1e-5).all())
    True
    >>> fit("zero-mean", images).describe()
    'minus the training mean of each channel (0.3316, 0.5, 0.6684)'
    """
    if name == "model":
        if own is None:
            raise UsageError("preprocessing 'model' takes the network's mean and std; give own=(mean, std)")
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in own)
        return Standard(mean, std)
    kind = KINDS.get(name)
    if kind is None:
        raise UsageError(f"unknown pre-processing {name!r}; {offer(str(name), [*KINDS, 'model'])}")
    batches = _checked(images, most_images)
    return Zca.fit(batches, zca_eps) if kind is Zca else kind.fit(batches)


def _checked(images: Tensor | Iterable[Tensor], most: int) -> Iterator[Tensor]:
    """Batches of at most ``VALUES_AT_ONCE`` values in float64, ``most`` images in all."""
    shape: torch.Size | None = None
    left = most
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor) or batch.ndim != 4 or not batch.is_floating_point():
            raise UsageError(f"images must be floats (N, C, H, W), and these are {_kind(batch)}")
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


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"
