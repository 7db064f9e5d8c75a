"""The updates of a reconstruction, and the state that is best on held-out images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from timm.data import Mixup
from torch import Tensor, nn

from normsurgeon.data.feeding import Feed
from normsurgeon.data.seeding import STEP, seed_everything, seed_of
from normsurgeon.errors import TrainingError
from normsurgeon.inference.heads import classifier_of
from normsurgeon.inference.objectives import distillation, feature_matching
from normsurgeon.inference.run import classifier_logits, home_of
from normsurgeon.inference.taps import tapped
from normsurgeon.recovery.block_fitting import fit_block
from normsurgeon.recovery.config import ReconstructionConfig

MOST_CACHED = 256
"""Images whose features at one block are held in memory."""


class Fitting:
    """The two parts, one after the other, and the best state so far.

    held  the held-out images in the converted network's pre-processing first, in the original's last
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        blocks: Sequence[str],
        recipe: ReconstructionConfig,
        feed: Feed,
        held: tuple[Tensor, ...],
        on_progress: Callable[[str, int, int | None], None] | None,
    ) -> None:
        self.model, self.reference, self.blocks, self.recipe, self.feed = model, reference, blocks, recipe, feed
        self.on_progress = on_progress
        self.held, self.held_reference = held[0], held[-1]
        self.held_logits = self._logits(reference, held[-1])
        self.step, self.best_step = 0, 0
        self.kl_before = _mean(self._held_out_kls())
        self.logit_scale = self._scale_classifier_()
        self.best_kls = self._held_out_kls()
        self.best = _mean(self.best_kls)
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
        """Fit one block after the other; a block stays fitted where ``_look`` finds the network better."""
        recipe, feed = self.recipe, self.feed
        batches = min(2 * feed.per_epoch, -(-MOST_CACHED // feed.batch_size))
        images = torch.cat([batch[0] for batch in feed.batches(0, batches)])[:MOST_CACHED]
        held = self.held, self.held_reference
        for number, name in enumerate(self.blocks):
            seed = seed_of(recipe.seed, number)
            fitted = fit_block(self.model, self.reference, name, images, held, recipe, seed)
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
        with tapped(self.reference, self.blocks) as theirs, tapped(self.model, self.blocks) as ours:
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
        """Judge the present state; whether it is the best so far, which is then kept.

        Better by more than the gain's standard error over the images: few of them are a noisy judge, and the best of
        many looks is otherwise the luckiest.
        """
        kls = self._held_out_kls()
        kl, gain = _mean(kls), self.best_kls - kls
        self.curve.append((self.step, kl))
        error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
        if kl < self.best and not self.best - kl <= error:  # any finite KL is better than none
            self.best, self.best_kls, self.best_step = kl, kls, self.step
            self.kept = copy.deepcopy(self.model.state_dict())
            return True
        return False

    def _scale_classifier_(self) -> float:
        """Multiply the last linear layer, in place, by what makes the held-out KL least."""
        head = classifier_of(self.model)
        if head is None or not all(parameter.requires_grad for parameter in head.parameters()):
            return 1.0
        before = copy.deepcopy(head.state_dict())
        scale = best_scale(self._logits(self.model, self.held), self.held_logits)
        with torch.no_grad():
            for parameter in head.parameters(recurse=False):
                parameter.mul_(scale)
        if _mean(self._held_out_kls()) >= self.kl_before:  # what was found does not give the logits alone
            head.load_state_dict(before)
            return 1.0
        return scale

    def _held_out_kls(self) -> Tensor:
        """KL(original ‖ converted) of each held-out image, (N,), in nats."""
        ours, theirs = self._logits(self.model, self.held).log_softmax(1), self.held_logits.log_softmax(1)
        return (theirs.exp() * (theirs - ours)).sum(1)

    @torch.no_grad()
    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        device, dtype = home_of(model)
        parts = images.split(self.recipe.batch_size)
        return torch.cat([classifier_logits(model, part.to(device, dtype)).double().cpu() for part in parts])


def _mean(kls: Tensor) -> float:
    kl = float(kls.mean())
    return max(kl, 0.0) if math.isfinite(kl) else math.inf


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


def _require_finite(loss: Tensor, where: str) -> None:
    if not loss.isfinite():
        raise TrainingError(
            f"the loss is not finite at {where} of the reconstruction, and nothing was changed; try a lower lr"
        )
