"""Statistics of whitened features under synthetic images: what the running statistics alone do not tell.

A batch norm's buffers say how each channel varies, not how channels vary together. Two facts more decide how well a
per-sample norm can stand in: which channels' means rise and fall together from image to image, and which channels
have heavy tails. Both are read off one forward pass over images with natural statistics (1/f noise and overlapping
discs), each batch norm using the batch's own statistics; no real data is involved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.graph.skeleton import HOOKS
from normsurgeon.norms import sources
from normsurgeon.norms.layers import per_channel

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


def probe_features(
    model: nn.Module, names: Sequence[str], input_shape: tuple[int, ...], images: int = 64, side: int = 64
) -> dict[str, FeatureProbe]:
    """Run synthetic images through ``model``, which is left alone, and describe the input of the named batch norms.

    ``input_shape`` (N, channels, H, W) is what the model accepts; smaller images are tried first. Empty for a model
    that takes no images or refuses these.
    """
    if len(input_shape) != 4:
        return {}
    shadow = _shadow_of(model)
    channels, full = input_shape[1], (input_shape[2], input_shape[3])
    # Networks of a fixed input size refuse small images; fewer at full size then cost about the same.
    fewer = max(8, images * side * side // (full[0] * full[1]))
    for count, size in ((images, (min(side, full[0]), min(side, full[1]))), (fewer, full)):
        try:
            with _probes(shadow, names) as found, torch.no_grad():
                reference = next(shadow.parameters())
                x = synthetic_images(count, channels, size).to(reference.device, reference.dtype)
                shadow(x)
            return dict(found)
        except Exception:  # a foreign forward may refuse an image in any way; then there is nothing to learn here
            continue
    return {}


def synthetic_images(count: int, channels: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Images (count, channels, H, W) with the statistics that natural ones share: 1/f spectra, edges, and colour
    channels that mostly agree. Zero mean, unit variance over all; always the same for a seed.

    The 1/f law is Field's (J. Opt. Soc. Am. A, 1987); the discs are a small dead-leaves model (Lee, Mumford & Huang,
    IJCV 2001).
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    slopes = 0.8 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    frequency = torch.sqrt(torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width)[None].square())
    frequency[0, 0] = 1 / max(height, width)
    noise = torch.randn(count, channels, height, width, generator=generator)
    field = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency**slopes, s=(height, width))
    field = field / field.std((2, 3), keepdim=True).clamp_min(1e-6)
    leaves = _discs(count, channels, height, width, generator)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    images = share * field + (1 - share) * leaves
    images = 0.85 * images.mean(1, keepdim=True) + 0.5 * images  # colours mostly agree
    contrast = 0.3 + torch.rand(count, 1, 1, 1, generator=generator)
    brightness = 0.5 * torch.randn(count, 1, 1, 1, generator=generator)
    images = images * contrast + brightness
    return (images - images.mean()) / images.std()


def _discs(count: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Overlapping discs of one colour each, small ones far more frequent than large ones."""
    y = torch.arange(height).view(1, -1, 1) / height
    x = torch.arange(width).view(1, 1, -1) / width
    canvas = torch.randn(count, channels, 1, 1, generator=generator).repeat(1, 1, height, width)
    for _ in range(40):
        across, down, radius = torch.rand(3, count, 1, 1, generator=generator)
        radius = 0.04 * (15**radius)
        inside = ((x - across).square() + (y - down).square() < radius.square())[:, None]
        canvas = torch.where(inside, torch.randn(count, channels, 1, 1, generator=generator), canvas)
    return canvas


def _shadow_of(model: nn.Module) -> nn.Module:
    """The model's modules around the model's own tensors: runs like it, in eval mode, without hooks, at no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    shadow = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for module in shadow.modules():
        for hooks in HOOKS:
            getattr(module, hooks, {}).clear()
    return shadow.eval()


@contextmanager
def _probes(shadow: nn.Module, names: Sequence[str]) -> Iterator[dict[str, FeatureProbe]]:
    """Let every batch norm use the batch's statistics, and record the named ones."""
    found: dict[str, FeatureProbe] = {}
    wanted = set(names)
    for name, module in shadow.named_modules():
        if sources.is_batch_norm(module) and sources.read(module).mean is not None:
            module.forward = _batch_statistics(module, name if name in wanted else None, found)
    try:
        yield found
    finally:
        for module in shadow.modules():
            module.__dict__.pop("forward", None)


def _batch_statistics(module: nn.Module, name: str | None, found: dict[str, FeatureProbe]) -> Any:
    reading = sources.read(module)

    def forward(x: Tensor) -> Tensor:
        # torch's own kernel in training mode, without buffers to update: whitens in one pass, and fast.
        xhat = torch.native_batch_norm(x, None, None, None, None, True, 0.0, reading.eps)[0]
        if name is not None and name not in found:
            found[name] = _described(xhat)
        if reading.weight is not None and reading.bias is not None:
            xhat.mul_(per_channel(reading.weight, x)).add_(per_channel(reading.bias, x))
        for part in (reading.drop, reading.act):
            xhat = part(xhat) if part is not None else xhat
        return xhat

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
