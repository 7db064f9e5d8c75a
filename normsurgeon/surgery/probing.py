"""Statistics of whitened features under synthetic images: what the running statistics alone do not show.

A batch norm's buffers say how each channel varies, not how channels vary together. Two facts more decide how well a
per-sample norm can stand in: which channels' means rise and fall together from image to image, and which channels
have heavy tails. Both are read off one forward pass over images with natural statistics (1/f noise and overlapping
discs), each batch norm using the batch's own statistics; no real data is involved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.calls import Call
from normsurgeon.graph.following import Followed, filled
from normsurgeon.graph.skeleton import seeded, shadow_of
from normsurgeon.norms import batchnorm
from normsurgeon.norms.layers import per_channel

IMAGES, SIDE = 64, 64
"""Synthetic images for balancing, and how large they are where the network takes any size."""

CHUNK = 2**19
"""Values that are squared at a time: 2 MiB, which the caches hold."""


@dataclass(frozen=True)
class FeatureProbe:
    """What one site's whitened input looked like.

    ``means_NC``: each image's channel means. ``kurtosis_C``: excess kurtosis of each channel over all images and
    positions.
    """

    means_NC: Tensor
    kurtosis_C: Tensor


def probe_features(model: nn.Module, names: Sequence[str], calls: Iterable[Call]) -> dict[str, FeatureProbe]:
    """Run the first of ``calls`` that ``model`` takes, and describe the input of the named batch norms.

    The model is left alone. Empty for one that refuses all of them; without the norms that its call does not reach.
    """
    shadow = shadow_of(model)
    for call in calls:
        try:
            with _probes(shadow, names) as found, torch.no_grad(), seeded(model):
                call(shadow)
            return dict(found)
        except Exception:  # a foreign forward may refuse an image in any way; then there is nothing to learn here
            continue
    return {}


def synthetic_calls(
    model: nn.Module, followed: Followed, count: int = IMAGES, side: int = SIDE
) -> Iterator[tuple[Call, str]]:
    """Inputs that are made up, as the model takes them, and what to call them; the cheapest first.

    Images (signals, volumes) of the extent that ``side`` pixels squared have; then fewer at the model's own size, which
    cost about the same. Of a model that takes something else, its owner's example, or normal numbers.
    """
    tensor = next(model.parameters(), None)
    device = tensor.device if tensor is not None else torch.device("cpu")
    shape = followed.call.shape if followed.call is not None else None
    if followed.call is not None and shape is not None and len(shape) > 2:
        full = tuple(shape[2:])
        small = tuple(min(round(side ** (2 / len(full))), extent) for extent in full)
        fewer = min(count, max(4, count // 8, round(count * side**2 / math.prod(full))))
        for number, size in ((count, small), (fewer, full)):
            images = synthetic_images(number, shape[1], size)
            yield followed.call.map(partial(_cast, images, device)), "synthetic images"
    elif followed.example is not None:
        yield followed.example.map(lambda t: filled(t, device)), "example inputs"
    elif followed.call is not None:
        if shape is not None and len(shape) > 1:
            several = (count, *shape[1:])
            yield followed.call.map(lambda t: filled(t.new_empty(several), device)), "random inputs"
        yield followed.call.map(lambda t: filled(t, device)), "random inputs"


def _cast(images: Tensor, device: torch.device, like: Tensor) -> Tensor:
    return images.to(device, like.dtype)


def synthetic_images(count: int, channels: int, size: tuple[int, ...], seed: int = 0) -> Tensor:
    """Images (count, channels, *size) with the statistics that natural ones share: 1/f spectra, edges, and colour
    channels that mostly agree. Zero mean, unit variance over all; always the same for a seed.

    ``size`` has one extent for signals, two for images, three for volumes. The 1/f law is Field's (J. Opt. Soc. Am. A,
    1987); the discs (plateaus, balls) are a small dead-leaves model (Lee, Mumford & Huang, IJCV 2001).
    """
    generator = torch.Generator().manual_seed(seed)
    ones = [1] * len(size)
    axes = tuple(range(2, 2 + len(size)))
    slopes = 0.8 + 0.8 * torch.rand(count, 1, *ones, generator=generator)
    frequency = torch.sqrt(sum(_along(axis, len(size), f).square() for axis, f in enumerate(_frequencies(size))))  # type: ignore[arg-type]
    frequency[(0,) * len(size)] = 1 / max(size)
    noise = torch.randn(count, channels, *size, generator=generator)
    field = torch.fft.irfftn(torch.fft.rfftn(noise, dim=axes) / frequency**slopes, s=size, dim=axes)
    field = field / field.std(axes, keepdim=True).clamp_min(1e-6)
    leaves = _discs(count, channels, size, generator)
    share = torch.rand(count, 1, *ones, generator=generator)
    images = share * field + (1 - share) * leaves
    images = 0.85 * images.mean(1, keepdim=True) + 0.5 * images  # colours mostly agree
    contrast = 0.3 + torch.rand(count, 1, *ones, generator=generator)
    brightness = 0.5 * torch.randn(count, 1, *ones, generator=generator)
    images = images * contrast + brightness
    return (images - images.mean()) / images.std()


def _frequencies(size: tuple[int, ...]) -> list[Tensor]:
    return [*(torch.fft.fftfreq(extent) for extent in size[:-1]), torch.fft.rfftfreq(size[-1])]


def _along(axis: int, dims: int, values: Tensor) -> Tensor:
    """A vector as a tensor of ``dims`` dimensions that varies along one."""
    return values.view([-1 if each == axis else 1 for each in range(dims)])


def _discs(count: int, channels: int, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Overlapping discs (balls, intervals) of one colour each, small ones far more frequent than large ones."""
    dims = len(size)
    places = [_along(axis, dims, torch.arange(size[axis]))[None] / size[axis] for axis in reversed(range(dims))]
    colours = [torch.randn(count, channels, *[1] * dims, generator=generator)]
    uppermost = torch.zeros(count, 1, *size, dtype=torch.int64)
    for number in range(1, 41):
        *centre, radius = torch.rand(dims + 1, count, *[1] * dims, generator=generator)
        radius = 0.04 * (15**radius)
        distance: Any = sum((place - middle).square() for place, middle in zip(places, centre, strict=True))
        inside = (distance < radius.square())[:, None]
        colours.append(torch.randn(count, channels, *[1] * dims, generator=generator))
        uppermost.masked_fill_(inside, number)
    table = torch.stack([colour.flatten(1) for colour in colours], 2)
    return table.gather(2, uppermost.flatten(2).expand(count, channels, -1)).view(count, channels, *size)


@contextmanager
def _probes(shadow: nn.Module, names: Sequence[str]) -> Iterator[dict[str, FeatureProbe]]:
    """Let every batch norm use the batch's statistics, and record the named ones."""
    found: dict[str, FeatureProbe] = {}
    wanted = set(names)
    for name, module in shadow.named_modules():
        if batchnorm.is_batch_norm(module) and batchnorm.read(module).mean is not None:
            module.forward = _batch_statistics(module, name if name in wanted else None, found)
    try:
        yield found
    finally:
        for module in shadow.modules():
            module.__dict__.pop("forward", None)


def _batch_statistics(module: nn.Module, name: str | None, found: dict[str, FeatureProbe]) -> Any:
    reading = batchnorm.read(module)

    def forward(x: Tensor) -> Tensor:
        # torch's own kernel in training mode, without buffers to update: whitens in one pass, and fast.
        xhat = torch.native_batch_norm(x, None, None, None, None, True, 0.0, reading.eps)[0]
        if name is not None and name not in found:
            found[name] = _described(xhat)
        if reading.weight is not None and reading.bias is not None:
            xhat.mul_(per_channel(reading.weight, x)).add_(per_channel(reading.bias, x))
        return reading.finished(xhat)

    return forward


def _described(xhat: Tensor) -> FeatureProbe:
    """A few images at a time: activations are what a probe's memory goes to."""
    xhat_NCP = xhat.flatten(2) if xhat.ndim > 2 else xhat[:, :, None]
    second_C, fourth_C = torch.zeros(2, xhat.shape[1], device=xhat.device)
    for chunk in xhat_NCP.split(max(1, CHUNK // max(1, xhat_NCP[0].numel()))):
        square = chunk.square()
        second_C += square.sum((0, 2))
        fourth_C += square.square_().sum((0, 2))
    count = xhat_NCP.shape[0] * xhat_NCP.shape[2]
    kurtosis_C = (fourth_C / count) / (second_C / count).square().clamp_min(1e-12) - 3
    return FeatureProbe(xhat_NCP.mean(2).float(), kurtosis_C.float())
