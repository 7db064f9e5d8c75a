"""The two parts of a reconstruction, and the state that is best on held-out images."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from time import monotonic

import torch
from timm.data import Mixup
from torch import Tensor, nn

from normsurgeon._util.progress import OnProgress, counter
from normsurgeon.data.feeding import Batch, Feed
from normsurgeon.data.seeding import STEP, seed_everything, seed_of
from normsurgeon.inference.heads import classifier_of
from normsurgeon.inference.objectives import distillation, feature_matching
from normsurgeon.inference.run import classifier_logits, home_of
from normsurgeon.inference.taps import tapped
from normsurgeon.recovery.block_fitting import fit_block
from normsurgeon.recovery.config import ReconstructionConfig
from normsurgeon.recovery.updates import fit_

SAME = 1e-6
"""Nats of KL from which on there is something to gain."""
LOCAL_SHARE = 0.7
"""Of the minutes, for the blocks; the rest is for the whole network."""
MAX_CACHED_IMAGES = 256
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
        config: ReconstructionConfig,
        feed: Feed,
        held: tuple[Tensor, ...],
        on_progress: OnProgress | None,
    ) -> None:
        self.model, self.reference, self.blocks, self.config, self.feed = model, reference, blocks, config, feed
        self.on_progress, self.began = on_progress, monotonic()
        self.held, self.held_reference = held[0], held[-1]
        self.held_logits = self._logits(reference, held[-1])
        self.step, self.best_step = 0, 0
        self.skipped: set[str] = set()
        self.kl_before = _mean(self._held_out_kls())
        self.logit_scale = self._scale_classifier_()
        self.best_kls = self._held_out_kls()
        self.best = _mean(self.best_kls)
        self.curve = [(0, self.best)]
        self.kept = copy.deepcopy(model.state_dict())
        mixes = {"switch_prob": 0.5, "prob": config.mix, "label_smoothing": 0.0, "num_classes": 2}
        self.mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, **mixes) if config.mix else None

    def run(self) -> None:
        """Both parts, where there is something to gain; the model is left in the best state."""
        if self.best > SAME:
            if self.blocks and self.config.local_steps:
                self._fit_blocks()
            if self.config.steps and not self._is_over():
                self._fit_network()
        self.model.load_state_dict(self.kept)

    def _is_over(self, share: float = 1.0) -> bool:
        """Whether that share of the minutes has passed."""
        minutes = self.config.minutes
        return minutes is not None and monotonic() - self.began > 60 * share * minutes

    def _fit_blocks(self) -> None:
        """Fit one block after the other; a block stays fitted if ``_improved`` finds the network better."""
        feed = self.feed
        batches = min(2 * feed.per_epoch, -(-MAX_CACHED_IMAGES // feed.batch_size))
        images = torch.cat([self._images(batch) for batch in feed.batches(0, batches)])[:MAX_CACHED_IMAGES]
        held = self.held, self.held_reference
        count = counter("fitting blocks", len(self.blocks), self.on_progress)
        share = LOCAL_SHARE if self.config.steps else 1.0
        for number, name in enumerate(self.blocks):
            if self._is_over(share):
                break
            seed = seed_of(self.config.seed, number)
            made = fit_block(
                self.model, self.reference, name, images, held, self.config, seed, lambda: self._is_over(share)
            )
            self.step += made
            count(1)
            if made and not self._improved():
                self.model.load_state_dict(self.kept)  # nearer at the block but not at the logits: overfitted

    def _images(self, batch: Batch) -> Tensor:
        """A batch's images; the names of those that could not be read are kept."""
        self.skipped |= set(batch[2])
        return batch[0]

    def _fit_network(self) -> None:
        config, first = self.config, self.step
        self.model.load_state_dict(self.kept)
        batches = self.feed.batches(0, config.steps)

        def improved(updates: int) -> bool:
            self.step = first + updates
            return self._improved()

        made = fit_(
            torch.optim.AdamW(self.model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0),
            lambda update: self._loss(self._images(next(batches)), first + update),
            improved,
            steps=config.steps,
            check_every=config.check_every,
            patience=config.patience,
            warmup=max(1, min(10, config.steps // 4)),
            part="the reconstruction",
            setting="lr",
            count=counter("fitting the network", config.steps, self.on_progress),
            is_over=self._is_over,
        )
        self.step = first + made

    def _loss(self, images: Tensor, step: int) -> Tensor:
        seed_everything(STEP, self.config.seed, step)
        if self.mixup is not None and len(images) > 1:
            even = len(images) - len(images) % 2
            images = self.mixup(images[:even].contiguous(), torch.zeros(even, dtype=torch.int64))[0]
        device, dtype = home_of(self.model)
        images = images.to(device, dtype)
        with tapped(self.reference, self.blocks) as theirs, tapped(self.model, self.blocks) as ours:
            with torch.no_grad():
                teacher = classifier_logits(self.reference, images)
            loss = distillation(classifier_logits(self.model, images), teacher)
            if self.blocks and self.config.features:
                pairs = [ours[name] for name in self.blocks], [theirs[name] for name in self.blocks]
                loss = loss + self.config.features * feature_matching(*pairs)
        return loss

    def _improved(self) -> bool:
        """Whether the present state is the best so far on the held-out images; it is then kept.

        Better by more than the gain's standard error over the images: a measure of few images is noisy, and the best
        of many looks is otherwise the luckiest.
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
        parts = images.split(self.config.batch_size)
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
