"""Unlabelled images, minutes: fit a converted network's blocks, then all of it, to the original: ``reconstruct``."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn

from normsurgeon.checkpoints import origin_of
from normsurgeon.data.preprocessing import DataConfig
from normsurgeon.data.sources import ImageSource
from normsurgeon.data.splitting import split_numbers, split_source
from normsurgeon.errors import DataError, TrainingError, UsageError
from normsurgeon.inference import classifier_logits, eval_mode, head_classes, home_of, placed
from normsurgeon.recovery.block_fitting import fit_block
from normsurgeon.recovery.calibration import held_images, undone_on_error
from normsurgeon.recovery.pairs import norm_pairs, originals_of
from normsurgeon.recovery.recipe import Recipe
from normsurgeon.surgery.rewriting import Conversion
from normsurgeon.training.feeding import make_feed, open_split
from normsurgeon.training.objectives import distillation, feature_matching
from normsurgeon.training.seeding import STEP, own_random_state, seed_everything
from normsurgeon.training.settings import Settings
from normsurgeon.training.taps import shared_blocks
from normsurgeon.training.taps import tapped as outputs_of
from normsurgeon.views import Data, open_views

MOST_CACHED = 256
"""Images whose features at one block are held in memory."""

MOST_HELD_OUT = 256
"""Images that decide which of the states on the way is kept."""


@dataclass(frozen=True)
class Reconstruction:
    """What ``reconstruct`` did.

    images, held_out   fitted on, and judged by
    blocks             whose outputs were followed
    steps              updates made
    best_step          after which the state that was kept was reached; 0: the start was the best
    kl_before, kl      mean KL(original ‖ converted) on the held-out images in nats: at the start, and of what was kept
    logit_scale        what the classifier was multiplied by; 1 for a network without a last linear layer
    curve              (updates, held-out KL) at every look; the first one after that scaling
    seconds            of wall-clock time
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

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON, which knows no infinity: a KL that was not finite becomes None."""
        values = asdict(self)
        for key in ("kl_before", "kl"):
            values[key] = values[key] if math.isfinite(values[key]) else None
        curve = [[step, kl if math.isfinite(kl) else None] for step, kl in self.curve]
        return {"event": "reconstruct", **values, "curve": curve}


def reconstruct(
    result: Conversion | nn.Module,
    data: Data,
    *,
    original: nn.Module | None = None,
    recipe: Recipe | None = None,
    max_images: int | None = None,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_progress: Callable[[str, int, int | None], None] | None = None,
    **changes: Any,
) -> Reconstruction:
    """Fit a converted network to its original on unlabelled images, and keep what does best on held-out ones.

    Changes ``result.model``'s weights in place; an error or Ctrl-C leaves them as they were. First the classifier is
    multiplied by the one number that brings the held-out logits nearest to the original's: conversions make them too
    small, which changes no answer and would be all that fitting learns at first. Then two parts:

    * *local*: block by block in the order of the data (residual blocks, or else the network's children; BRECQ,
      arXiv:2102.05426), a block is fitted to give the original block's output for the input that the converted and
      fitted prefix gives it, mixed with the original's input. The weights with the least error on held-out images are
      kept, and only where the held-out logits come nearer, too;
    * *joint*: the whole network minimises ``KL(original ‖ converted)`` of the logits plus ``features`` times the
      relative squared error of the block outputs.

    Images are cropped, flipped and mixed in pairs at random: the original answers for any image, and few images are
    fitted by heart within a hundred updates otherwise. The state of least held-out KL is kept, the start included.

    result    a Conversion, or a converted model from a file (its plan came with it)
    data      a data spec, an ImageSource, or batches ``(images (N, C, H, W), …)``; labels are not looked at
    original  the BatchNorm network; default: the one that ``result`` was converted from
    max_images  at most so many of a source's images, chosen by the seed
    recipe    a Recipe, or single settings of one as keywords (``steps=60``)

    :raises UsageError: no original, a model that is no conversion, or a setting that there is not.
    :raises DataError: too few images.
    :raises TrainingError: a loss that is not finite.

    >>> import normsurgeon as ns, timm
    >>> result = ns.convert(timm.create_model("test_resnet").eval(), to="gn")
    >>> images = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> done = reconstruct(result, [images], steps=4, check_every=2, batch_size=8)
    >>> done.kl <= done.kl_before
    True
    """
    recipe = _recipe(recipe, changes)
    model, reference = originals_of(result, original)
    norm_pairs(result, reference)  # raises for an original of another architecture
    begin = time.perf_counter()
    with ExitStack() as stack:
        for each in (model, reference):
            stack.enter_context(placed(each, device))
        stack.enter_context(eval_mode(model, reference))
        stack.enter_context(own_random_state())
        stack.enter_context(undone_on_error(model))
        stack.enter_context(_all_trainable(model))
        if not isinstance(data, ImageSource):
            data = open_split(data, head_classes(model), training=True)
        fit, judge = _split(data, recipe, max_images)
        config = DataConfig.of(model)
        settings = Settings(batch_size=recipe.batch_size, scale=(recipe.scale, 1.0), seed=recipe.seed)
        feed = make_feed(fit, config, settings, 0, 1, workers)
        plans = (*origin_of(model).plans, *([result.plan] if isinstance(result, Conversion) else []))
        blocks = shared_blocks(model, reference, plans, config, required=False)
        held = held_images(open_views(judge, [model, reference], classifiers=True))
        fitting = _Fitting(model, reference, blocks, recipe, feed, held, on_progress)
        fitting.run()
    done = Reconstruction(
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
    )
    if isinstance(result, Conversion):
        result.history.append(done.to_dict())
    return done


class _Fitting:
    """The two parts, one after the other, and the best state so far."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        blocks: Sequence[str],
        recipe: Recipe,
        feed: Any,
        held: tuple[Tensor, ...],
        on_progress: Callable[[str, int, int | None], None] | None,
    ) -> None:
        self.model, self.reference, self.blocks, self.recipe, self.feed = model, reference, blocks, recipe, feed
        self.on_progress = on_progress
        self.held, self.held_reference = held[0], held[-1]
        self.held_logits = self._logits(reference, held[-1])
        self.step, self.best_step = 0, 0
        self.kl_before = self._held_out_kl()
        self.logit_scale = self._scale_classifier_()
        self.best = self._held_out_kl()
        self.curve = [(0, self.best)]
        self.kept = copy.deepcopy(model.state_dict())
        mixes = {"switch_prob": 0.5, "prob": recipe.mix, "label_smoothing": 0.0, "num_classes": 2}
        self.mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, **mixes) if recipe.mix else None

    def run(self) -> None:
        """Both parts; the model is left in the best state."""
        recipe = self.recipe
        if self.blocks and recipe.local_steps:
            self._blocks()
        if recipe.steps:
            self._jointly(recipe.steps, recipe.lr)
        self.model.load_state_dict(self.kept)

    def _blocks(self) -> None:
        """Fit one block after the other; of the network, the state of least held-out KL is kept."""
        recipe, feed = self.recipe, self.feed
        passes = max(1, min(2, MOST_CACHED // feed.images)) * feed.per_epoch
        images = torch.cat([batch[0] for batch in feed.batches(0, passes)])[:MOST_CACHED]
        for number, name in enumerate(self.blocks):
            fitted = fit_block(self.model, self.reference, name, images, (self.held, self.held_reference), recipe)
            self.step += fitted
            if self.on_progress is not None:
                self.on_progress("fitting blocks", number + 1, len(self.blocks))
            if fitted and not self._look():
                self.model.load_state_dict(self.kept)  # nearer at the block and further at the logits: by heart

    def _jointly(self, steps: int, lr: float) -> None:
        self.model.load_state_dict(self.kept)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        warm = max(1, min(10, steps // 4))
        stale, first = 0, self.step
        batches = self.feed.batches(0, steps)
        for number, (images, _, _) in enumerate(batches):
            rate = min(1, (number + 1) / warm) * 0.5 * (1 + math.cos(math.pi * number / steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            self._update(images, optimizer)
            self.step = first + number + 1
            if self.on_progress is not None:
                self.on_progress("fitting the network", number + 1, steps)
            if (number + 1) % self.recipe.check_every == 0 or number + 1 == steps:
                stale = 0 if self._look() else stale + 1
                if stale >= self.recipe.patience:
                    break

    def _update(self, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
        seed_everything(STEP, self.recipe.seed, self.step)
        if self.mixup is not None and len(images) > 1:
            even = len(images) - len(images) % 2
            images = self.mixup(images[:even].contiguous(), torch.zeros(even, dtype=torch.int64))[0]
        device, dtype = home_of(self.model)
        images = images.to(device, dtype)
        with outputs_of(self.reference, self.blocks) as theirs, outputs_of(self.model, self.blocks) as ours:
            with torch.no_grad():
                teacher = classifier_logits(self.reference, images)
            loss = distillation(classifier_logits(self.model, images), teacher)
            if self.blocks and self.recipe.features:
                pairs = [ours[name] for name in self.blocks], [theirs[name] for name in self.blocks]
                loss = loss + self.recipe.features * feature_matching(*pairs)
        _require_finite(loss, f"update {self.step + 1}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _look(self) -> bool:
        """Judge the present state; whether it is the best so far, which is then kept."""
        kl = self._held_out_kl()
        self.curve.append((self.step, kl))
        if kl < self.best:
            self.best, self.best_step = kl, self.step
            self.kept = copy.deepcopy(self.model.state_dict())
            return True
        return False

    def _scale_classifier_(self) -> float:
        """Multiply the last linear layer, in place, by what makes the held-out KL least."""
        head = classifier_of(self.model)
        if head is None:
            return 1.0
        logits = self._logits(self.model, self.held)
        scale = best_scale(logits, self.held_logits)
        with torch.no_grad():
            for parameter in head.parameters(recurse=False):
                parameter.mul_(scale)
        return scale

    def _held_out_kl(self) -> float:
        logits = self._logits(self.model, self.held)
        kl = float(distillation(logits, self.held_logits))
        return max(kl, 0.0) if math.isfinite(kl) else math.inf

    @torch.no_grad()
    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        device, dtype = home_of(model)
        parts = images.split(self.recipe.batch_size)
        return torch.cat([classifier_logits(model, part.to(device, dtype)).double().cpu() for part in parts])


def best_scale(logits_NK: Tensor, reference_NK: Tensor) -> float:
    """The factor t, 0.5 to 2, that makes mean KL(reference ‖ softmax(t * logits)) least: convex in t, by bisection.

    The inverse of the temperature of Guo et al. (arXiv:1706.04599), fitted to another network instead of labels.

    >>> x = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    >>> round(best_scale(x / 1.5, x), 3)
    1.5
    """
    wanted = reference_NK.softmax(1)
    low, high = 0.5, 2.0
    for _ in range(40):
        t = (low + high) / 2
        slope = (((t * logits_NK).softmax(1) - wanted) * logits_NK).sum(1).mean()
        low, high = (low, t) if slope > 0 else (t, high)
    return (low + high) / 2


def classifier_of(model: nn.Module) -> nn.Module | None:
    """timm's ``get_classifier()``, or else the last linear layer of the module tree; None where that is none."""
    getter = getattr(model, "get_classifier", None)
    found = getter() if callable(getter) else next((m for m in reversed(list(model.modules())) if m is not model), None)
    return found if isinstance(found, nn.Linear) else None


def _recipe(recipe: Recipe | None, changes: dict[str, Any]) -> Recipe:
    known = Recipe.__dataclass_fields__
    for name in changes:
        if name not in known:
            raise UsageError(f"reconstruction has no setting {name!r}; there are {', '.join(known)}")
    return replace(recipe or Recipe(), **changes)


def _split(data: Any, recipe: Recipe, max_images: int | None) -> tuple[Any, Any]:
    """The images to fit on and those to judge by, batches as one tensor each."""
    if isinstance(data, ImageSource):
        if data.streamed:
            raise DataError(f"{data.name} is a stream: its images have no numbers to choose by; try a folder")
        if max_images is not None and max_images < len(data):
            data = split_source(data, max_images, recipe.seed)[1]
        count = len(data)
    else:
        pool = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in data]
        if not pool or not all(isinstance(images, Tensor) for images in pool):
            raise UsageError("give batches of tensors (images (N, C, H, W), labels or None); there are none, or others")
        images = torch.cat(pool)
        count = len(images)
    second = min(MOST_HELD_OUT, max(1, round(recipe.held_out * count)))
    if count - second < 2:
        raise DataError(f"{count} images are too few to fit on and to judge by; try at least 32")
    if isinstance(data, ImageSource):
        return split_source(data, second, recipe.seed)
    first, rest = split_numbers(count, second, recipe.seed)
    return [images[list(first)]], [images[list(rest)]]


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Every parameter takes a gradient meanwhile; afterwards none has one, and each requires what it required."""
    wanted = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in wanted:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, required, gradient in wanted:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _require_finite(loss: Tensor, where: str) -> None:
    if not loss.isfinite():
        raise TrainingError(
            f"the loss is not finite at {where} of the reconstruction, and nothing was changed; try a lower lr"
        )
