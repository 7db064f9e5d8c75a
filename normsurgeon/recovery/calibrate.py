"""``calibrate``: match the converted norms' outputs to the original's mean and variance, on unlabelled images."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from normsurgeon._util.checks import check_at_least
from normsurgeon._util.progress import OnProgress, counter
from normsurgeon.data.splitting import open_split
from normsurgeon.distributed import gather, own_device, own_shard, together
from normsurgeon.errors import UsageError
from normsurgeon.inference.run import eval_mode, placed
from normsurgeon.inference.views import Data, open_views
from normsurgeon.models.checkpoint import add_record_
from normsurgeon.recovery.matching import held_images, match_in_order_, wanted_moments
from normsurgeon.recovery.observing import MAX_KEPT_IMAGES
from normsurgeon.recovery.pairs import norm_pairs, on_a_copy, originals_of
from normsurgeon.recovery.rebalancing import rebalance_
from normsurgeon.surgery.convert import Conversion

MAX_MATCHED_IMAGES = 128
"""Images that matching holds in memory at once: exact in graph order in one pass."""


@dataclass(frozen=True)
class CalibrationRecord:
    """What ``calibrate`` did.

    images          that balancing used
    matched_images  of them, images on which outputs were matched
    sites           norms that were matched
    balanced        of them, norms whose producer got new signs and weights
    forward_passes  of the original and of the converted network together
    worst_error     the largest over the sites, before its match, of the root mean square over channels of the mean's
                    error in standard deviations and of the logarithm of the standard deviation's error
    worst_site      where that was
    seconds         of wall-clock time
    skipped         images that could not be read
    """

    images: int
    matched_images: int
    sites: int
    balanced: int
    forward_passes: int
    worst_error: float
    worst_site: str | None
    seconds: float
    skipped: int = 0

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"calibrated {self.sites} norms ({self.balanced} balanced) on {self.images} images, "
            f"{self.forward_passes} forward passes, {self.seconds:.1f} s; "
            f"largest error before: {self.worst_error:.2f} at {self.worst_site}"
            + (f"; images that could not be read: {self.skipped}" if self.skipped else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"event": "calibrate", **asdict(self)}


def calibrate_(
    result: Conversion | nn.Module,
    data: Data,
    *,
    original: nn.Module | None = None,
    balance: bool = True,
    matched_images: int = MAX_MATCHED_IMAGES,
    batch_size: int = 32,
    max_images: int | None = None,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Match each converted norm's output to the original's, per channel in mean and variance, on unlabelled images.

    ``calibrate`` returns a new Conversion of a copy of the network, which takes as much memory again, and changes
    nothing that it is given. ``calibrate_`` works in place: it returns the Conversion that it is given, and an error
    or Ctrl-C leaves the weights as they were. ``history[-1]`` is the ``CalibrationRecord``. Two steps:

    * *balance*: the channels of the producer before each norm get new signs and weights, which keep the norm's
      pooled statistics steady from image to image (one pass of the original);
    * *match*: ``weight <- r * weight``, ``bias <- r * (bias - mean) + mean_BN`` with ``r = sd_BN / sd``, site by site
      in the order of the data, each seeing the prefix that has been matched already. All of ``matched_images`` go
      through as one batch, so that this takes one pass of the original and one of the converted network and not one
      for each site. (All sites at once, in several passes, diverges: each corrects again what earlier ones do.)

    result          a Conversion, or a converted model from a file (its plan came with it)
    data            a data spec (of data that comes in splits, the training one), an ImageSource, or batches
                    ``(images (N, C, H, W), …)``; labels are ignored
    original        the BatchNorm network; default: the one that ``result`` was converted from
    matched_images  the most images that are held at once, spread evenly over a source; of batches, the first
    max_images      the most images that are used to balance, spread evenly over a source; of batches, the first.
                    Default: 512, on which the norm's steadiness is measured
    on_progress     called with a ``Progress`` after each batch and each norm

    Memory does not grow with the number of images, and the answer does not depend on the batch size, up to rounding.
    Under ``torchrun`` or ``accelerate launch`` every process calls this alike, with the same networks: the images are
    shared, and every process ends with the weights that one alone would come to, up to rounding.

    :raises UsageError: no original, a model that is no conversion, or batches that can be passed over only once.
    :raises DataError: no images, or one that is not finite.
    :raises ProcessError: another of several processes failed.

    >>> import normsurgeon as ns, timm
    >>> result = ns.convert(timm.create_model("test_resnet").eval(), to="gn")
    >>> images = torch.randn(32, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    >>> record = calibrate(result, [(images, None)]).history[-1]
    >>> record.sites, record.forward_passes, result.history
    (15, 3, [])
    """
    check_at_least(1, matched_images=matched_images)
    result = Conversion.of(result)
    model, reference = originals_of(result, original)
    pairs = norm_pairs(result, reference)
    if isinstance(data, (str, os.PathLike)):
        data = open_split(data, None, training=True, labels="none")
    begin = time.perf_counter()
    shard = own_shard()
    with ExitStack() as stack:
        stack.enter_context(together())
        for each in (model, reference):
            stack.enter_context(placed(each, own_device(device)))
        stack.enter_context(eval_mode(model, reference))
        stack.enter_context(undone_on_error(model))
        images, balanced = 0, 0
        unread: set[str] = set()
        if balance:
            most = MAX_KEPT_IMAGES if max_images is None else max_images
            views = open_views(data, [model, reference], batch_size, most, workers, False, shard, labels="none")
            if not views.repeatable:
                raise UsageError(
                    "the batches are an iterator, which can be passed over only once; try a list, or a DataLoader"
                )
            images, balanced = rebalance_(reference, pairs, views, counter("balancing", views.total, on_progress))
            unread |= set(views.skipped)
        most = matched_images if max_images is None else min(matched_images, max_images)
        views = open_views(data, [model, reference], batch_size, most, workers, False, shard, labels="none")
        held, matched = held_images(views)
        unread |= set(views.skipped)
        count = counter("matching", 2 * len(pairs), on_progress)
        wanted = wanted_moments(reference, pairs, held[-1] if held else None, count)
        errors = match_in_order_(model, pairs, wanted, held[0] if held else None, count)
        unread = set().union(*gather(unread))
    worst = max(errors, key=errors.__getitem__, default=None)
    record = CalibrationRecord(
        images=max(images, matched),
        matched_images=matched,
        sites=len(errors),
        balanced=balanced,
        forward_passes=2 + bool(balance),
        worst_error=errors[worst] if worst else 0.0,
        worst_site=worst,
        seconds=time.perf_counter() - begin,
        skipped=len(unread),
    )
    return add_record_(result, record)


calibrate = on_a_copy(calibrate_)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """A model's parameters and eps as they were, if what is inside fails or is interrupted."""
    values = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    eps = [(module, module.eps) for module in model.modules() if isinstance(getattr(module, "eps", None), float)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        for module, own in eps:
            module.eps = own
        raise
