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
from normsurgeon.recovery.calibration import held_images, undone_on_error
from normsurgeon.recovery.pairs import norm_pairs, originals_of, tapped
from normsurgeon.surgery.rewriting import Conversion
from normsurgeon.training.feeding import make_feed, open_split
from normsurgeon.training.objectives import distillation, feature_matching
from normsurgeon.training.seeding import STEP, own_random_state, seed_everything
from normsurgeon.training.settings import Settings
from normsurgeon.training.taps import shared_blocks
from normsurgeon.training.taps import tapped as outputs_of
from normsurgeon.views import Data, open_views

MOST_HELD_OUT = 256
"""Images that decide which of the states on the way is kept."""


@dataclass(frozen=True)
class Recipe:
    """How to reconstruct; the defaults were measured (docs/decisions.md).

    local_steps, local_lr   updates of the first part, in which every block follows the original's block
    steps, lr               updates of the second part, in which the whole network follows the original's logits, too
    batch_size              images an update
    features                weight of the block outputs beside the logits, in the second part
    held_out                share of the images that is only judged by; at most 256
    check_every             updates between two looks at the held-out images
    patience                looks without progress after which a part ends
    mix                     share of updates on images mixed in pairs (mixup and cutmix, half each)
    scale                   the least share of an image that a random crop keeps
    seed                    of the split, the order, the crops and the mixing
    """

    local_steps: int = 0
    local_lr: float = 3e-4
    steps: int = 120
    lr: float = 5e-5
    batch_size: int = 32
    features: float = 0.3
    held_out: float = 0.15
    check_every: int = 15
    patience: int = 3
    mix: float = 0.7
    scale: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("local_steps", 0), ("steps", 0), ("batch_size", 1), ("check_every", 1), ("patience", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("local_lr", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("held_out", "mix", "scale"):
            if not 0 <= getattr(self, name) <= 1 or (name != "mix" and getattr(self, name) in (0, 1)):
                raise UsageError(f"{name}={getattr(self, name)} must be a share, between 0 and 1")


@dataclass(frozen=True)
class Reconstruction:
    """What ``reconstruct`` did.

    images, held_out   fitted on, and judged by
    blocks             whose outputs were followed
    steps              updates made
    best_step          after which the state that was kept was reached; 0: the start was the best
    kl_before, kl      mean KL(original ‖ converted) on the held-out images in nats: at the start, and of what was kept
    curve              (updates, held-out KL) at every look
    seconds            of wall-clock time
    """

    images: int
    held_out: int
    blocks: int
    steps: int
    best_step: int
    kl_before: float
    kl: float
    curve: tuple[tuple[int, float], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"event": "reconstruct", **asdict(self), "curve": [list(point) for point in self.curve]}


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

    Changes ``result.model``'s weights in place; an error or Ctrl-C leaves them as they were. In two parts:

    * *local*: every block (residual blocks, or else the network's children) follows the original's block, all at once:
      its input is the converted prefix's or, in half of the updates, the original's, and no gradient leaves it (the
      idea of BRECQ, arXiv:2102.05426, and AdaRound, arXiv:2004.10568, who go block by block);
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
        kl_before=fitting.curve[0][1],
        kl=fitting.best,
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
        self.held = held[0]
        self.held_logits = self._logits(reference, held[-1])
        self.step, self.best_step = 0, 0
        self.best = self._held_out_kl()
        self.curve = [(0, self.best)]
        self.kept = copy.deepcopy(model.state_dict())
        self.total = recipe.local_steps + recipe.steps
        mixes = {"switch_prob": 0.5, "prob": recipe.mix, "label_smoothing": 0.0, "num_classes": 2}
        self.mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, **mixes) if recipe.mix else None

    def run(self) -> None:
        """Both parts; the model is left in the best state."""
        recipe = self.recipe
        if self.blocks and recipe.local_steps:
            self._part("fitting blocks", recipe.local_steps, recipe.local_lr, local=True)
        if recipe.steps:
            self._part("fitting the network", recipe.steps, recipe.lr, local=False)
        self.model.load_state_dict(self.kept)

    def _part(self, name: str, steps: int, lr: float, local: bool) -> None:
        self.model.load_state_dict(self.kept)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        warm = max(1, min(10, steps // 4))
        stale, first = 0, self.step
        batches = self.feed.batches(first, first + steps)
        for number, (images, _, _) in enumerate(batches):
            rate = min(1, (number + 1) / warm) * 0.5 * (1 + math.cos(math.pi * number / steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            self._update(images, optimizer, local)
            self.step += 1
            if self.on_progress is not None:
                self.on_progress(name, self.step, self.total)
            if (number + 1) % self.recipe.check_every == 0 or number + 1 == steps:
                stale = 0 if self._look() else stale + 1
                if stale >= self.recipe.patience:
                    break

    def _update(self, images: Tensor, optimizer: torch.optim.Optimizer, local: bool) -> None:
        seed_everything(STEP, self.recipe.seed, self.step)
        if self.mixup is not None and len(images) > 1:
            even = len(images) - len(images) % 2
            images = self.mixup(images[:even].contiguous(), torch.zeros(even, dtype=torch.int64))[0]
        device, dtype = home_of(self.model)
        images = images.to(device, dtype)
        swap = local and bool(torch.rand(()) < 0.5)
        with ExitStack() as stack:
            inputs: dict[str, Tensor] = {}
            if local:
                stack.enter_context(_inputs_read(self.reference, self.blocks, inputs))
            theirs = stack.enter_context(outputs_of(self.reference, self.blocks))
            with torch.no_grad():
                teacher = classifier_logits(self.reference, images)
            if local:
                stack.enter_context(_inputs_cut(self.model, self.blocks, inputs if swap else {}))
            ours = stack.enter_context(outputs_of(self.model, self.blocks))
            student = classifier_logits(self.model, images)
            loss = distillation(student, teacher)
            if self.blocks:
                weight = 1.0 if local else self.recipe.features
                loss = loss + weight * feature_matching(
                    [ours[name] for name in self.blocks], [theirs[name] for name in self.blocks]
                )
        if not loss.isfinite():
            raise TrainingError(
                f"the loss is not finite at update {self.step + 1} of the reconstruction, and nothing was changed; "
                "try a lower lr"
            )
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

    def _held_out_kl(self) -> float:
        logits = self._logits(self.model, self.held)
        kl = float(distillation(logits, self.held_logits))
        return max(kl, 0.0) if math.isfinite(kl) else math.inf

    @torch.no_grad()
    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        device, dtype = home_of(model)
        parts = images.split(self.recipe.batch_size)
        return torch.cat([classifier_logits(model, part.to(device, dtype)).double().cpu() for part in parts])


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


def _inputs_read(model: nn.Module, names: Sequence[str], into: dict[str, Tensor]) -> Any:
    def keeping(name: str) -> Callable[[Tensor], None]:
        return lambda x: into.__setitem__(name, x)

    return tapped([(model.get_submodule(name), "input", keeping(name)) for name in names])


def _inputs_cut(model: nn.Module, names: Sequence[str], instead: dict[str, Tensor]) -> Any:
    """Let no gradient out of a block by its input, and put what is ``instead`` in that input's place."""

    def cutting(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: instead.get(name, x).detach()

    return tapped([(model.get_submodule(name), "input", cutting(name)) for name in names])
