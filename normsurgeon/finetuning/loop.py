"""The loop: one update after the other, with validations, checkpoints and stops in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon.data.feeding import Feed
from normsurgeon.data.seeding import STEP, seed_everything
from normsurgeon.errors import DivergedError, TrainingError
from normsurgeon.finetuning.blending import set_shares_
from normsurgeon.finetuning.checking import Weights, check_label
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.finetuning.record import MAX_ROWS, Curves, Window
from normsurgeon.finetuning.singles import ONE_VALUE, larger_batch, one_value
from normsurgeon.finetuning.watching import FirstUpdates, where_nonfinite
from normsurgeon.inference import objectives
from normsurgeon.inference.run import classifier_logits, home_of
from normsurgeon.inference.taps import tapped


@dataclass
class Student:
    """The network that trains, and what trains it.

    core       the network itself, blends and drops included
    model      the same as Accelerate has wrapped it
    blends     the sites that are blended in, in order
    blocks     whose outputs are matched with the teacher's
    apart      whose outputs are kept apart
    frozen     norms whose running statistics stay as they are
    """

    core: nn.Module
    model: nn.Module
    optimizer: Any
    scheduler: Any
    ema: ModelEmaV3 | None
    blends: tuple[str, ...]
    blocks: tuple[str, ...]
    apart: tuple[str, ...]
    classes: int
    frozen: tuple[str, ...] = ()

    def train(self) -> None:
        """Training mode, but for what is frozen."""
        self.model.train()
        for name in self.frozen:
            self.core.get_submodule(name).training = False  # it alone: a fused drop goes on dropping


@dataclass(eq=False)
class Loop:
    """Trains a student from ``step`` to ``steps``.

    after_update  called after each update with whether it ends a pass over the images (or the run)
    on_progress   called after each update
    """

    accelerator: Accelerator
    student: Student
    teacher: nn.Module | None
    feed: Feed
    config: FinetuneConfig
    weights: Weights
    steps: int
    on_message: Callable[[str], None]
    on_progress: OnProgress | None
    after_update: Callable[[bool], None]

    def __post_init__(self) -> None:
        feed, student, config = self.feed, self.student, self.config
        self.step = 0
        self.curves, self.window = Curves(), Window()
        self.parameters = list(student.model.parameters())
        _, self.dtype = home_of(student.core)
        self.first_updates = FirstUpdates(feed.batch_size)
        self.skipped: set[str] = set()
        self.micro = -(-(feed.batch_size // feed.shard.world) // config.grad_accum)
        self.every = max(1, self.steps // MAX_ROWS)
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=student.classes
            )
        self._part: Tensor | None = None
        self._taps: dict[str, Tensor] = {}
        self._teacher_taps: dict[str, Tensor] = {}

    def run(self) -> None:
        """Train until the last update.

        :raises TrainingError: a loss that is not finite, or a machine that does not hold even one image.
        """

        def attempt(micro: int) -> None:
            self.micro = micro
            self._updates()

        reads = self.student.blocks if self.weights.features else ()
        with ExitStack() as stack:
            both = dict.fromkeys((*reads, *(self.student.apart if self.weights.distance else ())))
            self._taps = stack.enter_context(tapped(self.student.core, list(both)))
            if self.teacher is not None and reads:
                self._teacher_taps = stack.enter_context(tapped(self.teacher, reads))
            try:
                find_executable_batch_size(attempt, self.micro, self._halve)()
            except (RuntimeError, ValueError) as error:
                if ONE_VALUE in str(error):
                    raise TrainingError(self._one_value(error)) from error
                if "No executable batch size" not in str(error):
                    raise
                raise TrainingError(
                    f"out of memory with one image at once on {self.accelerator.device}; "
                    "try a smaller network or image, or another device"
                ) from error

    def _halve(self) -> int:
        if self.accelerator.num_processes > 1:
            raise TrainingError(
                f"out of memory with {self.micro} images at once in process {self.accelerator.process_index}; "
                f"try grad_accum={2 * self.config.grad_accum} (--grad-accum {2 * self.config.grad_accum})"
            )
        fewer = self.micro // 2
        if fewer:
            self.on_message(
                f"out of memory with {self.micro} images at once: going on with {fewer}, "
                f"and the same {self.feed.batch_size} an update"
            )
        return fewer

    def _updates(self) -> None:
        self.student.train()
        batches: Iterator[Any] = self.feed.batches(self.step, self.steps)
        begin = time.perf_counter()
        while self.step < self.steps:
            images, labels, skipped = next(batches)
            self.skipped |= set(skipped)
            values = self._update(images, labels)
            self.step += 1
            self._warn_if_risen(values["loss"])
            if self.student.ema is not None:
                self.student.ema.update(self.student.core, step=self.step)
            now = time.perf_counter()
            self.window.add(**values, images=self.feed.batch_size, seconds=now - begin)
            begin = now
            self._note(values)
            ends = self.step % self.feed.per_epoch == 0 or self.step == self.steps
            try:
                self.after_update(ends)
            except RuntimeError as error:
                if should_reduce_batch_size(error):  # smaller micro-batches would not help
                    raise TrainingError(
                        f"out of memory while validating; try batch_size below {self.config.batch_size}"
                    ) from error
                raise
            if not self.student.model.training:  # a validation was
                self.student.train()
            begin = time.perf_counter()

    def _update(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """One update of the weights; the mean losses over this process's share, and the gradient's norm."""
        student, config = self.student, self.config
        labels = labels if self.weights.ce else None
        if labels is not None:
            for label in (int(labels.min()), int(labels.max())):
                check_label(label, student.classes)
        student.scheduler.step_update(self.step)
        blend = None
        if student.blends:
            blend = self.progress
            set_shares_(student.core, student.blends, blend, config.progressive_order)
        images, targets = self._placed(images, labels)
        sums = self._gradients(images, targets)
        names, totals = list(sums), torch.stack(list(sums.values()))
        norm = self.accelerator.clip_grad_norm_(
            self.parameters,
            config.clip_grad if config.clip_grad is not None else float("inf"),
        )
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP's
        norm = torch.as_tensor(0.0 if norm is None else norm).to(totals)
        *numbers, norm_value = torch.cat([totals, norm.reshape(1)]).tolist()  # waits for the device, once an update
        values = dict(zip(names, numbers, strict=True))
        overflow = self.accelerator.scaler is not None  # fp16: such an update is skipped, and the scale lowered
        if not _finite(values["loss"]) or not (_finite(norm_value) or overflow):
            self._diverged(images, targets)
        try:
            student.optimizer.step()
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise TrainingError(
                    f"out of memory in the optimizer {config.opt} on {self.accelerator.device}; "
                    "try sgd, which keeps less, or train_what=norms"
                ) from error
            raise
        values["grad_norm"] = norm_value if _finite(norm_value) else 0.0
        if blend is not None:
            values["blend"] = blend
        return values

    @property
    def progress(self) -> float:
        """How much of the blending is done before this update: 0 to 1."""
        until = max(1, round(self.config.progressive * (self.steps - 1)))
        return min(1.0, self.step / until)

    def _placed(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A batch on the device, mixed if the settings say so."""
        device, dtype = self.accelerator.device, self.dtype
        images = images.to(device, dtype if images.is_floating_point() else None, non_blocking=True)
        targets = None if labels is None else labels.to(device, non_blocking=True)
        if self.mixup is not None:
            seed_everything(STEP, self.config.seed, self.step, self.accelerator.process_index, 0)
            blank = torch.zeros(len(images), dtype=torch.int64, device=device)
            images, mixed = self.mixup(images.clone(), blank if targets is None else targets)
            targets = None if targets is None else mixed
        if self.config.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def _gradients(self, images: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The gradients of a batch, left in the parameters, micro-batch by micro-batch; and the mean losses."""
        accelerator, student = self.accelerator, self.student
        seed_everything(STEP, self.config.seed, self.step, accelerator.process_index, 1)
        student.optimizer.optimizer.zero_grad(set_to_none=True)
        parts = images.split(self.micro)
        goals = (None,) * len(parts) if targets is None else targets.split(self.micro)
        accelerator.gradient_accumulation_steps = len(parts)
        accelerator.step = 0  # its count of micro-batches: memory may have run out within an update
        sums: dict[str, Tensor] = {}
        for part, goal in zip(parts, goals, strict=True):
            self._part = part
            with accelerator.accumulate(student.model):
                losses = self._losses(part, goal)
                share = len(part) / len(images)
                accelerator.backward(losses["loss"] * share * len(parts))  # which divides by the number of parts
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() * share
        return sums

    def _losses(self, images: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The weighted sum of the objectives, as ``loss``, and each of them unweighted."""
        weights, found = self.weights, {}
        wanted: Tensor | None = None
        if self.teacher is not None and (weights.kl or weights.features):
            with torch.no_grad(), self.accelerator.autocast():
                wanted = classifier_logits(self.teacher, images)
        logits = classifier_logits(self.student.model, images)
        if weights.ce:
            assert targets is not None
            found["ce"] = objectives.cross_entropy(logits, targets, self.config.smoothing)
        if weights.kl:
            assert wanted is not None
            found["kl"] = objectives.distillation(logits, wanted, self.config.temperature)
        if weights.features:
            blocks = [name for name in self.student.blocks if name in self._taps and name in self._teacher_taps]
            found["features"] = objectives.feature_matching(
                [self._taps[name] for name in blocks], [self._teacher_taps[name] for name in blocks]
            )
        if weights.distance:
            apart = [self._taps[name] for name in self.student.apart if name in self._taps]
            found["distance"] = objectives.layer_similarity([x for x in apart if len(x) == len(images)])
        loss = 0.0 * logits.sum()  # every parameter takes part, which DDP counts on
        for name, value in found.items():
            loss = loss + getattr(weights, name) * value
        self._taps.clear()
        self._teacher_taps.clear()
        return {"loss": loss, **found}

    def _warn_if_risen(self, loss: float) -> None:
        risen = self.first_updates.add(self.step, loss)
        if risen is not None:
            lower = self._rate() / 3
            self.on_message(
                f"the loss rose from {risen[0]:.2g} to {risen[1]:.2g} in the first {self.step} updates: the learning "
                f"rate is too high for this network; try lr={lower:.1g} (--lr {lower:.1g}), or a longer warm-up"
            )

    def _rate(self) -> float:
        return max(group["lr"] for group in self.student.optimizer.param_groups)

    def _diverged(self, images: Tensor, targets: Tensor | None) -> None:
        single = self.accelerator.num_processes == 1
        with nullcontext() if single else self.accelerator.no_sync(self.student.model):
            where = where_nonfinite(self.student.core, lambda: self._gradients(images, targets)["loss"], images)
        raise DivergedError(
            f"the loss is not finite at update {self.step + 1} of {self.steps}; it began {where}; "
            f"try a learning rate below {self.config.lr:g}, or precision bf16 or no"
        )

    def _one_value(self, error: Exception) -> str:
        """The error text for a norm that was given one value a channel."""
        core, part, feed, given, larger = self.student.core, self._part, self.feed, "", None
        if part is not None and len(part) == 1:
            share, parts = feed.batch_size // feed.shard.world, self.config.grad_accum
            how = [f"{feed.shard.world} processes"] if feed.shard.world > 1 else []
            how += [f"{self.micro} at once"] if self.micro < share else []
            given = f" from one image of a batch of {feed.batch_size}" + (f" ({', '.join(how)})" if how else "")
            most = self.micro if self.micro < -(-share // parts) else None
            wanted = larger_batch(feed.batch_size, feed.shard.world, parts, most)
            if wanted is not None:
                larger = f"batch_size={wanted} (--batch-size {wanted})"
                larger = larger if wanted <= feed.images else f"more images than {feed.images}"
        with torch.no_grad(), self.accelerator.autocast():
            return one_value(error, core, self.teacher, given, larger, lambda: core(part))

    def _note(self, values: dict[str, float]) -> None:
        rate = self._rate()
        epoch = self.step / self.feed.per_epoch
        if self.step % self.every == 0 or self.step == self.steps:
            row = self.window.take()
            if self.accelerator.num_processes > 1:
                numbers = torch.tensor(list(row.values()), dtype=torch.float32, device=self.accelerator.device)
                row = dict(zip(row, self.accelerator.reduce(numbers, "mean").tolist(), strict=True))
            row = {"step": self.step, "epoch": epoch, "lr": rate, **row}
            self.curves.steps.append(row)
            if self.accelerator.trackers:
                self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.step)
        if self.on_progress is not None and self.accelerator.is_main_process:
            details = {"epoch": epoch, "images": self.feed.batch_size, "lr": rate, **values}
            self.on_progress(Progress("fine-tuning", self.step, self.steps, details))


def _finite(value: float) -> bool:
    return value - value == 0
