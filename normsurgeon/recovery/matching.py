"""Each converted norm's output gets the original's moments, site by site as the images come to it, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from normsurgeon.calls import joined
from normsurgeon.distributed import gather
from normsurgeon.errors import UsageError
from normsurgeon.inference import moments
from normsurgeon.inference.hooks import listening
from normsurgeon.inference.views import Views, no_images
from normsurgeon.norms import batchnorm
from normsurgeon.norms.affine import Affine, Moments
from normsurgeon.norms.layers import per_channel
from normsurgeon.recovery.observing import Site, observe, run
from normsurgeon.recovery.pairs import NormPair, norm_output

END = ""
"""What a process that has finished sends in place of a norm's name."""

MAX_GROWTH = 4.0
"""The largest factor by which matching enlarges a channel."""

QUIET = 1e-4
"""A channel whose variance is below this share of its layer's average is only shifted: its scale is noise."""


def held_images(views: Views) -> tuple[tuple[Tensor, ...] | None, int]:
    """All of this process's images at once, as one batch for each pre-processing; and how many all processes have.

    None where there are fewer images than processes.

    :raises DataError: no images, in any of the processes.
    """
    batches = [images for images, _ in views if len(images[0])]
    held = tuple(joined(parts) for parts in zip(*batches, strict=True)) if batches else None
    images = sum(gather(len(held[0]) if held else 0))
    if not images:
        raise no_images(views)
    return held, images


def wanted_moments(
    reference: nn.Module, pairs: Sequence[NormPair], images: Tensor | None, count: Callable[[int], None]
) -> dict[str, Moments]:
    """The moments of what the original's batch norms give, which in eval mode are a fixed affine map of their input."""
    sites = [Site(pair.name, pair.batch_norm, "input") for pair in pairs]
    observe(reference, sites, [] if images is None else [(0, images)])
    count(len(pairs))
    found = {}
    for pair, site in zip(pairs, sites, strict=True):
        if len(site.table):
            fixed = batchnorm.read(pair.batch_norm).fixed
            found[pair.name] = Affine(fixed.scale.cpu(), fixed.shift.cpu()).after(site.moments)
    return found


def match_in_order_(
    model: nn.Module,
    pairs: Sequence[NormPair],
    wanted: dict[str, Moments],
    images: Tensor | None,
    count: Callable[[int], None],
) -> dict[str, float]:
    """One pass: each norm is matched as the images come to it, and hands on what it then gives; errors by site.

    Several processes meet at each norm and match it to all of their images together. One without images meets them
    there, too.
    """
    errors: dict[str, float] = {}
    by_name = {pair.name: pair for pair in pairs}

    def meet(mine: tuple[str, moments.Table] | None) -> Affine | None:
        """Match the norm that all processes have come to; None at the end. ``mine`` is None without images."""
        found = [part for part in gather(mine) if part is not None]
        name = found[0][0]
        if any(other != name for other, _ in found):
            raise UsageError(
                f"the processes came to other norms ({', '.join(sorted({part[0] or 'the end' for part in found}))}): "
                "which are called depends on the images; try calibrating in one process"
            )
        if name == END:
            return None
        site = Site(name, by_name[name].norm, "output")
        for _, table in found:
            site.merge(table, [])
        scale, errors[name] = match_(by_name[name].norm, site.moments, wanted[name])
        count(1)
        return scale

    def matching(pair: NormPair) -> Callable[[Tensor], Tensor | None]:
        def receive(y: Tensor) -> Tensor | None:
            if pair.name in errors or pair.name not in wanted:
                return None  # a norm that is called again: matched at its first call
            site = Site(pair.name, pair.norm, "output")
            site.receive(y, 0, 1)
            scale = meet((pair.name, site.table))
            assert scale is not None
            at = y.device, y.dtype
            return y.mul_(per_channel(scale.scale.to(*at), y)).add_(per_channel(scale.shift.to(*at), y))

        return receive

    if images is None:
        while meet(None) is not None:
            pass
        return errors
    with torch.no_grad(), listening([(*norm_output(pair.norm), matching(pair)) for pair in pairs]):
        run(model, images)
    meet((END, moments.empty(0)))
    return errors


def match_(norm: nn.Module, found: Moments, wanted: Moments) -> tuple[Affine, float]:
    """Give a norm's output the wanted moments, in place, where it has the found ones.

    Returns the map that does the same to its output, and how far that was off: the root mean square over channels of
    ``(mean - mean_BN) / sd_BN`` and of ``log(sd / sd_BN)``. A channel that is all but constant on one of the two sides
    counts for its mean only.
    """
    varies = found.var > QUIET * found.var.mean()
    ratio = torch.where(varies, torch.sqrt(wanted.var / found.var.clamp_min(1e-30)), 1.0).clamp(max=MAX_GROWTH)
    weight, bias = norm.weight, norm.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    scale = Affine(ratio, wanted.mean - ratio * found.mean)
    with torch.no_grad():
        bias.copy_(ratio.to(bias.device) * bias.double() + scale.shift.to(bias.device))
        weight.copy_(ratio.to(weight.device) * weight.double())
    floor = QUIET * wanted.var.mean().clamp_min(1e-30)
    shift = (found.mean - wanted.mean) / torch.sqrt(wanted.var.clamp_min(floor))
    growth = ratio.clamp_min(1e-30).log()[varies & (wanted.var > floor)]
    return scale, float((shift.square().mean() + growth.square().sum() / max(1, len(ratio))).sqrt())
