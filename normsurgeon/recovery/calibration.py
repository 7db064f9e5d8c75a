"""Unlabelled images bring the converted norms' outputs back to the original's mean and variance: ``calibrate``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.errors import DataError, UsageError
from normsurgeon.hooks import listening
from normsurgeon.inference import eval_mode, placed
from normsurgeon.norms import sources
from normsurgeon.norms.layers import per_channel
from normsurgeon.recovery.observing import Site, run
from normsurgeon.recovery.pairs import NormPair, norm_output, norm_pairs, originals_of
from normsurgeon.recovery.rebalancing import rebalance_
from normsurgeon.surgery import whitening
from normsurgeon.surgery.rewriting import Conversion
from normsurgeon.surgery.whitening import Affine, Moments
from normsurgeon.training.feeding import open_split
from normsurgeon.views import Data, Views, open_views

MATCHED_IMAGES = 128
"""Images that matching holds in memory at once: exact in graph order in one pass, and no more however many there
are."""

MOST = 4.0
"""The largest factor by which matching enlarges a channel."""

QUIET = 1e-4
"""A channel whose variance is below this share of its layer's average is only shifted: its scale is noise."""


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` did.

    images          looked at to balance
    matched_images  of them, images on which outputs were matched
    sites           norms that were matched
    balanced        of them, norms whose producer got new signs and weights
    forward_passes  of the original and of the converted network together
    worst_error     the largest over the sites, before its match, of the root mean square over channels of the mean's
                    error in standard deviations and of the logarithm of the standard deviation's error
    worst_site      where that was
    seconds         of wall-clock time
    """

    images: int
    matched_images: int
    sites: int
    balanced: int
    forward_passes: int
    worst_error: float
    worst_site: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"event": "calibrate", **asdict(self)}


def calibrate(
    result: Conversion | nn.Module,
    data: Data,
    *,
    original: nn.Module | None = None,
    balance: bool = True,
    matched_images: int = MATCHED_IMAGES,
    batch_size: int = 32,
    max_images: int | None = None,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_progress: Callable[[str, int, int | None], None] | None = None,
) -> Calibration:
    """Match each converted norm's output to the original's, per channel in mean and variance, on unlabelled images.

    Changes ``result.model``'s weights in place; an error or Ctrl-C leaves them as they were. Two steps:

    * *balance*: the channels of the producer before each norm get signs and weights anew, which keep the norm's
      pooled statistics steady from image to image (one pass of the original);
    * *match*: ``weight <- r * weight``, ``bias <- r * (bias - mean) + mean_BN`` with ``r = sd_BN / sd``, site by site
      in the order of the data, each seeing the prefix that has been matched already. All of ``matched_images`` go
      through as one batch, so that this takes one pass of the original and one of the converted network and not one
      for each site. (All sites at once, in several passes, diverges: each corrects again what earlier ones do.)

    result          a Conversion, or a converted model from a file (its plan came with it)
    data            a data spec (of data that comes in splits, the training one), an ImageSource, or batches
                    ``(images (N, C, H, W), …)``; labels are not looked at
    original        the BatchNorm network; default: the one that ``result`` was converted from
    matched_images  at most so many are held at once, spread evenly over a source; of batches, the first
    max_images      at most so many are looked at

    Memory does not grow with the number of images, and the answer does not depend on the batch size, up to rounding.

    :raises UsageError: no original, a model that is no conversion, or batches that can be passed over only once.
    :raises DataError: no images.

    >>> import normsurgeon as ns, timm
    >>> result = ns.convert(timm.create_model("test_resnet").eval(), to="gn")
    >>> images = torch.randn(32, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    >>> done = calibrate(result, [(images, None)])
    >>> done.sites, done.forward_passes
    (15, 3)
    """
    if matched_images < 1:
        raise UsageError(f"matched_images={matched_images} must be at least 1")
    model, reference = originals_of(result, original)
    pairs = norm_pairs(result, reference)
    if isinstance(data, (str, os.PathLike)):
        data = open_split(data, None, training=True)  # whatever its labels are
    begin = time.perf_counter()
    with ExitStack() as stack:
        for each in (model, reference):
            stack.enter_context(placed(each, device))
        stack.enter_context(eval_mode(model, reference))
        stack.enter_context(undone_on_error(model))
        images, balanced = 0, 0
        if balance:
            views = open_views(data, [model, reference], batch_size, max_images, workers, classifiers=False)
            if not views.repeatable:
                raise UsageError(
                    "the batches are an iterator, which can be passed over only once; try a list, or a DataLoader"
                )
            images, balanced = rebalance_(reference, pairs, views, _telling("balancing", views.total, on_progress))
        most = matched_images if max_images is None else min(matched_images, max_images)
        views = open_views(data, [model, reference], batch_size, most, workers, classifiers=False)
        held = held_images(views)
        tell = _telling("matching", 2 * len(pairs), on_progress)
        wanted = _wanted(reference, pairs, held[-1], tell)
        errors = _match_in_order(model, pairs, wanted, held[0], tell)
    worst = max(errors, key=errors.__getitem__, default=None)
    done = Calibration(
        images=max(images, len(held[0])),
        matched_images=len(held[0]),
        sites=len(errors),
        balanced=balanced,
        forward_passes=2 + bool(balance),
        worst_error=errors[worst] if worst else 0.0,
        worst_site=worst,
        seconds=time.perf_counter() - begin,
    )
    if isinstance(result, Conversion):
        result.history.append(done.to_dict())
    return done


def held_images(views: Views) -> tuple[Tensor, ...]:
    """All images of the views at once, as one batch for each pre-processing.

    :raises DataError: no images.
    """
    batches = [images for images, _ in views]
    if not batches:
        raise DataError(f"there are no images in {views.name}; are the batches a used-up iterator?")
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _wanted(
    reference: nn.Module, pairs: Sequence[NormPair], images: Tensor, tell: Callable[[int], None]
) -> dict[str, Moments]:
    """The moments of what the original's batch norms give, which in eval mode are a fixed affine map of their input."""
    sites = [Site(pair.name, pair.batch_norm, "input") for pair in pairs]
    with torch.inference_mode(), listening([(site.module, site.where, _counted(site, tell)) for site in sites]):
        run(reference, images)
    found = {}
    for pair, site in zip(pairs, sites, strict=True):
        if len(site.table):
            reading = sources.read(pair.batch_norm)
            fixed = whitening.compose(whitening.gamma_beta(reading), whitening.whitener(reading))
            found[pair.name] = whitening.Affine(fixed.scale.cpu(), fixed.shift.cpu()).after(site.moments)
    return found


def _counted(site: Site, tell: Callable[[int], None]) -> Callable[[Tensor], None]:
    def receive(x: Tensor) -> None:
        site.receive(x, 0, 1)
        tell(1)

    return receive


def _match_in_order(
    model: nn.Module,
    pairs: Sequence[NormPair],
    wanted: dict[str, Moments],
    images: Tensor,
    tell: Callable[[int], None],
) -> dict[str, float]:
    """One pass: each norm is matched as the images come to it, and hands on what it then gives; errors by site."""
    errors: dict[str, float] = {}

    def matching(pair: NormPair) -> Callable[[Tensor], Tensor | None]:
        def receive(y: Tensor) -> Tensor | None:
            if pair.name in errors or pair.name not in wanted:
                return None  # a norm that is called again: matched at its first call
            site = Site(pair.name, pair.norm, "output")
            site.receive(y, 0, 1)
            scale, errors[pair.name] = match_(pair.norm, site.moments, wanted[pair.name])
            tell(1)
            at = y.device, y.dtype
            return y.mul_(per_channel(scale.scale.to(*at), y)).add_(per_channel(scale.shift.to(*at), y))

        return receive

    with torch.no_grad(), listening([(*norm_output(pair.norm), matching(pair)) for pair in pairs]):
        run(model, images)
    return errors


def match_(norm: nn.Module, found: Moments, wanted: Moments) -> tuple[Affine, float]:
    """Give a norm's output the wanted moments, in place, where it has the found ones.

    Returns the map that does the same to its output, and how far that was off: the root mean square over channels of
    ``(mean - mean_BN) / sd_BN`` and of ``log(sd / sd_BN)``. A channel that is all but constant on one of the two sides
    counts for its mean only.
    """
    varies = found.var > QUIET * found.var.mean()
    ratio = torch.where(varies, torch.sqrt(wanted.var / found.var.clamp_min(1e-30)), 1.0).clamp(max=MOST)
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


def _telling(
    step: str, total: int | None, on_progress: Callable[[str, int, int | None], None] | None
) -> Callable[[int], None]:
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(step, done, total)

    return tell


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """A model's parameters and eps as they were, if what is inside fails or is interrupted."""
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    eps = {
        name: module.eps for name, module in model.named_modules() if isinstance(getattr(module, "eps", None), float)
    }
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
        for name, value in eps.items():
            model.get_submodule(name).eps = value
        raise
