"""The pre-scale of ``surgery.balancing`` once more, from real images and in the converted network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from normsurgeon.norms.catalogue import Target, find_target
from normsurgeon.recovery.observing import Site, observe
from normsurgeon.recovery.pairs import NormPair
from normsurgeon.surgery import whitening
from normsurgeon.surgery.balancing import balance
from normsurgeon.surgery.probing import FeatureProbe
from normsurgeon.surgery.whitening import Affine, Moments
from normsurgeon.views import Views

FEWEST_IMAGES = 32
"""With fewer, signs would follow the chance of these images."""

DEAD = 1e-6
"""A channel whose variance is below this share of its layer's average is left as it is."""


def rebalance_(
    model: nn.Module, pairs: Sequence[NormPair], views: Views, on_images: Callable[[int], None] | None = None
) -> tuple[int, int]:
    """Whiten and balance anew what each folded norm sees, in place; returns the number of images and of sites.

    One forward pass over the images; with fewer than ``FEWEST_IMAGES`` nothing is changed. The fixed affine that each
    norm stands in for stays the same.
    """
    folded = [pair for pair in pairs if pair.producer is not None]
    sites = [Site(pair.name, pair.norm, "input", keep_means=True) for pair in folded]
    images = observe(model, sites, views, 0, on_images)
    if images < FEWEST_IMAGES:
        return images, 0
    for pair, site in zip(folded, sites, strict=True):
        assert pair.producer is not None
        target, groups = find_target(pair.target), pair.groups
        scale = pre_scale(site.probe, site.moments, target, groups)
        _refold_(pair.producer, pair.norm, scale, site.moments, target, groups, pair.softening)
    return images, len(folded)


def pre_scale(probe: FeatureProbe, moments: Moments, target: Target, groups: int) -> Affine:
    """What the producer takes in: ``alpha * (u - mean) / sd``, and nothing for a channel that never varies."""
    alpha = balance(probe, target, groups)
    alive = moments.var > DEAD * moments.var.mean()
    scale = torch.where(alive, alpha / torch.sqrt(moments.var.clamp_min(1e-30)), 1.0)
    return Affine(scale, torch.where(alive, -scale * moments.mean, 0.0))


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
    fixed = Affine(now.scale / unit.scale, now.shift - now.scale / unit.scale * unit.shift)
    wanted = Affine(fixed.scale / scale.scale, fixed.shift - fixed.scale / scale.scale * scale.shift)
    return whitening.matching_affine(wanted, scale.after(moments), target, groups, eps, softening)


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
