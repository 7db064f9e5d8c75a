"""The pre-scale of ``surgery.balancing`` once more, from real images.

The signs and weights follow the original's whitened features: those of the converted network bear its errors, and gave
less (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from normsurgeon.inference.views import Views, no_images
from normsurgeon.norms import batchnorm
from normsurgeon.norms.affine import Affine, Moments
from normsurgeon.norms.targets import Target, find_target
from normsurgeon.recovery.observing import Site, observe
from normsurgeon.recovery.pairs import NormPair
from normsurgeon.surgery import whitening
from normsurgeon.surgery.balancing import balance

MIN_IMAGES = 32
"""With fewer, signs would follow the chance of these images."""


def rebalance_(
    reference: nn.Module, pairs: Sequence[NormPair], views: Views, count: Callable[[int], None]
) -> tuple[int, int]:
    """Choose new signs and weights for each folded site, in place; returns the number of images and of sites.

    One forward pass of the original over the images; with fewer than ``MIN_IMAGES`` nothing is changed. The fixed
    affine that each norm stands in for stays the same.

    :raises DataError: no images, in any of the processes.
    """
    folded = [pair for pair in pairs if pair.producer is not None and pair.old_producer is not None]
    sites = [Site(pair.name, pair.batch_norm, "input", keep_means=True) for pair in folded]
    images = observe(reference, sites, ((first, batch[-1]) for first, (batch, _) in views.numbered()), count)
    if not images:
        raise no_images(views)
    if images < MIN_IMAGES:
        return images, 0
    balanced = 0
    for pair, site in zip(folded, sites, strict=True):
        if pair.producer is None or pair.old_producer is None or not len(site.table):
            continue  # not reached by a forward pass
        target, groups = find_target(pair.target), pair.groups
        seen = whitening.change_of_producer(pair.old_producer, pair.producer)  # by the norm, from raw features
        seen = Affine(_cpu(seen.scale), _cpu(seen.shift))
        wanted = balance(site.probe, target, groups) * _cpu(batchnorm.read(pair.batch_norm).whitener.scale)
        scale = Affine(wanted / seen.scale, torch.zeros_like(wanted))
        scale = whitening.at_scale(pair.producer, scale, target, groups if pair.softening is None else 1, 1.0)
        _refold_(pair.producer, pair.norm, scale, seen.after(site.moments), target, groups, pair.softening)
        balanced += 1
    return images, balanced


def _cpu(values: Tensor) -> Tensor:
    return values.double().cpu()


def rescaled_affine(
    now: Affine, eps: float, scale: Affine, moments: Moments, target: Target, groups: int, softening: float | None
) -> tuple[Affine, float]:
    """The norm's weight and bias once its input is ``scale(u)`` and no longer u, whose moments are given.

    For a sample of average statistics the norm then gives what it gave before.
    """
    # What the norm does to such a sample now, as a fixed affine: matching_affine's formula, inverted.
    unit, _ = whitening.matching_affine(
        Affine(torch.ones_like(now.scale), torch.zeros_like(now.scale)), moments, target, groups, eps, None
    )
    fixed = now.behind(unit)
    return whitening.matching_affine(fixed.behind(scale), scale.after(moments), target, groups, eps, softening)


def _refold_(
    producer: nn.Module,
    norm: nn.Module,
    scale: Affine,
    moments: Moments,
    target: Target,
    groups: int,
    softening: float | None,
) -> None:
    weight, bias = norm.weight, norm.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    now = Affine(weight.detach().double().cpu(), bias.detach().double().cpu())
    affine, norm.eps = rescaled_affine(now, float(norm.eps), scale, moments, target, groups, softening)  # type: ignore[arg-type,assignment]
    device = weight.device
    with torch.no_grad():
        weight.copy_(affine.scale)
        bias.copy_(affine.shift)
    whitening.fold_(producer, Affine(scale.scale.to(device), scale.shift.to(device)))
