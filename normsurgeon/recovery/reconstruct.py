"""``reconstruct``: fit a converted network's blocks, then all of it, to the original, on unlabelled images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.plain import plain
from normsurgeon._util.progress import OnProgress
from normsurgeon.data.augmentation import Augmentation
from normsurgeon.data.batches import unpacked
from normsurgeon.data.feeding import make_feed
from normsurgeon.data.seeding import own_random_state
from normsurgeon.data.sources import ImageSource
from normsurgeon.data.splitting import open_split, split_numbers, split_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.distributed import alone
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.run import eval_mode, name_of, placed
from normsurgeon.inference.taps import shared_blocks
from normsurgeon.inference.views import Data, open_views
from normsurgeon.models.checkpoint import add_record_, plans_of
from normsurgeon.recovery.calibrate import undone_on_error
from normsurgeon.recovery.config import ReconstructionConfig
from normsurgeon.recovery.fitting import Fitting
from normsurgeon.recovery.matching import held_images
from normsurgeon.recovery.pairs import norm_pairs, on_a_copy, originals_of
from normsurgeon.surgery.convert import Conversion

MAX_HELD_OUT_IMAGES = 256
"""Images that decide which of the states on the way is kept."""


@dataclass(frozen=True)
class ReconstructionRecord:
    """What ``reconstruct`` did.

    images, held_out   images that were fitted, and images that only judged
    blocks             whose outputs were matched
    steps              updates made
    best_step          after which the state that was kept was reached; 0: the start was the best
    kl_before, kl      mean KL(original ‖ converted) on the held-out images in nats: at the start, and of what was kept
    logit_scale        what the classifier was multiplied by; 1 for a network without a last linear layer
    curve              (updates, held-out KL) at every check; the first one after that scaling
    seconds            of wall-clock time
    skipped            images that could not be read
    """

    images: int
    held_out: int
    blocks: int
    steps: int
    best_step: int
    kl_before: float
    kl: float
    logit_scale: float
    curve: tuple[tuple[int, float], ...]
    seconds: float
    skipped: int = 0

    @property
    def summary(self) -> str:
        """One line."""
        before, after = (f"{kl:.3f}" if math.isfinite(kl) else "not finite" for kl in (self.kl_before, self.kl))
        return (
            f"reconstructed on {self.images} images in {self.steps} updates, {self._kept}, {self.seconds:.0f} s; "
            f"KL from the original on {self.held_out} held-out images: {before} → {after} nats"
            + (f"; images that could not be read: {self.skipped}" if self.skipped else "")
        )

    @property
    def _kept(self) -> str:
        if self.best_step:
            return f"the best after {self.best_step}"
        return "none of which was kept" if self.logit_scale == 1 else "of which only the classifier's scale was kept"

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON, which knows no infinity: a KL that was not finite becomes None."""
        return {"event": "reconstruct", **plain(asdict(self))}


def reconstruct_(
    result: Conversion | nn.Module,
    data: Data,
    *,
    original: nn.Module | None = None,
    max_images: int | None = None,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_progress: OnProgress | None = None,
    local_steps: int = 40,
    local_lr: float = 5e-4,
    steps: int = 20,
    lr: float = 2e-5,
    batch_size: int = 32,
    features: float = 0.3,
    held_out: float = 0.15,
    check_every: int = 10,
    patience: int = 3,
    mix: float = 0.7,
    scale: float = 0.2,
    minutes: float | None = None,
    seed: int = 0,
) -> Conversion:
    """Fit a converted network to its original on unlabelled images, and keep what does best on held-out ones.

    ``reconstruct`` returns a new Conversion of a copy of the network, which takes as much memory again, and changes
    nothing that it is given. ``reconstruct_`` works in place: it returns the Conversion that it is given, and an error
    or Ctrl-C leaves the weights as they were. ``history[-1]`` is the ``ReconstructionRecord``.

    First the classifier is multiplied by the one number that brings the held-out logits nearest to the original's:
    conversions make them too small, which changes no answer and would be all that fitting learns at first. Then:

    * *local*: block by block in the order of the data (residual blocks, or else the network's children; BRECQ,
      arXiv:2102.05426), a block is fitted to give the original block's output for the input that the converted and
      fitted prefix gives it, mixed with the original's input. The weights with the least error on held-out images are
      kept, and only where the held-out logits come nearer, too;
    * *joint*: the whole network minimises ``KL(original ‖ converted)`` of the logits plus ``features`` times the
      relative squared error of the block outputs.

    Images are cropped, flipped and mixed in pairs at random: the original answers for any image, and a network overfits
    to few images within a hundred updates otherwise. A state takes the place of the one before, the start included, if
    its held-out KL is less by more than the gain's standard error over the images. A parameter that the caller froze
    stays as it is. Where the logits are the original's already (a KL of at most 1e-6 nats), no update is made.

    With ``minutes`` the updates end then, wherever they are: the weights depend on the machine's speed. The first and
    the last look at the held-out images are not counted.

    result    a Conversion, or a converted model from a file (its plan came with it)
    data      a data spec, an ImageSource, or batches ``(images (N, C, H, W), …)``; labels are ignored
    original  the BatchNorm network; default: the one that ``result`` was converted from
    max_images  the most images of a source that are used, chosen by the seed
    on_progress  called with a ``Progress`` after each block and each update
    local_steps, …  the settings, as ``ReconstructionConfig`` describes them

    :raises UsageError: no original, a model that is no conversion, or a setting that cannot have its value.
    :raises DataError: too few images, or one that is not finite.
    :raises TrainingError: a loss that is not finite.

    >>> import normsurgeon as ns, timm
    >>> result = ns.convert(timm.create_model("test_resnet").eval(), to="gn")
    >>> images = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> record = reconstruct(result, [images], steps=4, check_every=2, batch_size=8).history[-1]
    >>> record.kl <= record.kl_before
    True
    """
    config = ReconstructionConfig.of(locals())
    result = Conversion.of(result)
    model, reference = originals_of(result, original)
    norm_pairs(result, reference)  # raises for an original of another architecture
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"every parameter of {name_of(model)} is frozen; try result.model.requires_grad_(True)")
    begin = time.perf_counter()
    with ExitStack() as stack:
        for each in (model, reference):
            stack.enter_context(placed(each, device))
        stack.enter_context(eval_mode(model, reference))
        stack.enter_context(own_random_state())
        stack.enter_context(alone())
        stack.enter_context(undone_on_error(model))
        stack.enter_context(_gradients_put_back(model))
        if not isinstance(data, ImageSource):
            data = open_split(data, None, training=True, labels="none")
        fit, judge = _split(data, config, max_images)
        shape = DataConfig.of(model)
        augmentation = Augmentation(scale=(config.scale, 1.0))
        feed = make_feed(fit, shape, augmentation, config.batch_size, config.seed, workers=workers)
        blocks = shared_blocks(model, reference, plans_of(result), shape, required=False)
        views = open_views(judge, [model, reference], labels="none")
        held, _ = held_images(views)
        assert held is not None
        fitting = Fitting(model, reference, blocks, config, feed, held, on_progress)
        fitting.run()
    record = ReconstructionRecord(
        images=feed.images,
        held_out=len(held[0]),
        blocks=len(blocks),
        steps=fitting.step,
        best_step=fitting.best_step,
        kl_before=fitting.kl_before,
        kl=fitting.best,
        logit_scale=fitting.logit_scale,
        curve=tuple(fitting.curve),
        seconds=time.perf_counter() - begin,
        skipped=len(fitting.skipped | set(views.skipped)),
    )
    return add_record_(result, record)


reconstruct = on_a_copy(reconstruct_)


def _split(data: Any, config: ReconstructionConfig, max_images: int | None) -> tuple[Any, Any]:
    """The images to fit on and those to judge by, batches as one tensor each."""
    if isinstance(data, ImageSource):
        if data.streamed:
            raise DataError(f"{data.name} is a stream: its images have no numbers to choose by; try a folder")
        if max_images is not None and max_images < len(data):
            data = split_source(data, max_images, config.seed)[1]
        count = len(data)
    else:
        pool: list[Any] = []
        for batch in data:
            pool.append(unpacked(batch, sum(map(len, pool)))[0])
        if not pool:
            raise DataError("there are no images to fit on; the batches are empty (was an iterator used up before?)")
        if not all(isinstance(images, Tensor) for images in pool):
            raise UsageError(
                "the batches hold dicts or tuples of a model's arguments, and reconstruction takes images; "
                "try calibrate, which takes them"
            )
        images = torch.cat(pool)
        count = len(images)
    second = min(MAX_HELD_OUT_IMAGES, max(1, round(config.held_out * count)))
    if count - second < 2:
        raise DataError(f"{count} images are too few to fit on and to judge by; try at least 32")
    if isinstance(data, ImageSource):
        return split_source(data, second, config.seed)
    first, rest = split_numbers(count, second, config.seed)
    return [images[list(first)]], [images[list(rest)]]


@contextmanager
def _gradients_put_back(model: nn.Module) -> Iterator[None]:
    """The gradients that the caller had, afterwards."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
