"""``finetune``: from a converted network, images and a teacher to a recovered network and its history."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from normsurgeon.data.feeding import make_feed
from normsurgeon.data.seeding import HEAD, own_random_state, seed_everything
from normsurgeon.data.splitting import open_split
from normsurgeon.data.transforms import DataConfig
from normsurgeon.distributed import Shard
from normsurgeon.errors import TrainingError, TrainingStopped, UsageError
from normsurgeon.finetuning import checking
from normsurgeon.finetuning.blending import blend_
from normsurgeon.finetuning.checkpointing import Keeper, network_shape
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.finetuning.history import History
from normsurgeon.finetuning.launching import launch, on_device
from normsurgeon.finetuning.loop import Loop, Student
from normsurgeon.finetuning.runstate import RunFolder
from normsurgeon.finetuning.singles import single_values_named
from normsurgeon.finetuning.trainable import (
    all_asleep,
    choose_trainable_,
    frozen_norms,
    make_optimizer,
    make_scheduler,
    set_drops_,
)
from normsurgeon.finetuning.validator import Judge
from normsurgeon.finetuning.watching import stopped_by_signals
from normsurgeon.inference.evaluate import Evaluation
from normsurgeon.inference.heads import reset_head_
from normsurgeon.inference.run import eval_mode, head_classes, placed
from normsurgeon.inference.taps import block_names, matching_layers, shared_blocks
from normsurgeon.models.checkpoint import origin_of
from normsurgeon.surgery.convert import Conversion
from normsurgeon.surgery.replacing import copy_model

UNSET: Any = object()


@dataclass(frozen=True)
class Finetuned:
    """What ``finetune`` returns.

    model       the fine-tuned network: the best on the validation images (as it came, if training made it only worse),
                without them, or with ``keep="last"``, the last; its moving average where one was kept
    conversion  the Conversion that was handed in, now of that model and its history one event longer, or None
    history     the curves
    before      how the network did on the validation images before it was trained; None without them
    after       how ``model`` does
    best        of the best network: ``step``, ``epoch`` and what was measured; None where none was looked for
    steps       updates done; ``images`` seen in them, ``seconds`` spent, over all the times it was resumed
    skipped     names of the training images that could not be read
    path        the file that holds ``model``, or None
    settings    what was asked for
    stopped     the signal that came too late to stop the run, with its last update; else None
    """

    model: nn.Module
    conversion: Conversion | None
    history: History
    before: Evaluation | None
    after: Evaluation | None
    best: dict[str, Any] | None
    steps: int
    images: int
    seconds: float
    skipped: tuple[str, ...]
    path: Path | None
    settings: FinetuneConfig = field(repr=False)
    stopped: str | None = None

    @property
    def result(self) -> Conversion | nn.Module:
        """What ``normsurgeon.save`` takes: the conversion, or the model where there was none."""
        return self.conversion if self.conversion is not None else self.model

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "before": self.before.to_dict() if self.before else None,
            "after": self.after.to_dict() if self.after else None,
            "best": self.best,
            "steps": self.steps,
            "images": self.images,
            "seconds": self.seconds,
            "skipped": len(self.skipped),
            "output": str(self.path) if self.path else None,
            "settings": self.settings.to_dict(),
            "history": self.history.to_dict(),
        }


def finetune(
    result: Conversion | nn.Module,
    train: Any,
    val: Any = None,
    *,
    teacher: nn.Module | None = UNSET,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    num_classes: int | None = None,
    settings: FinetuneConfig | None = None,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_message: Callable[[str], None] = warnings.warn,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Finetuned:
    """Train a copy of a network. A Conversion that is handed in holds the trained one afterwards; no module that was
    handed in is changed.

    result       a Conversion, or any classifier
    train        a data spec (see ``normsurgeon.data.sources.open_source``), an ImageSource, batches ``(images (N, C,
                 H, W), labels (N,) or None)`` that are pre-processed already, or a torch Dataset with a length whose
                 items are ``(image (C, H, W), label or None)``, pre-processed and augmented
    val          the same, to judge on after every pass over the training images. Data that comes in splits gives its
                 training split as ``train`` and its held-out one as ``val``
    teacher      what to distil from; default: the conversion's original. None: nobody
    output       the folder of the run: its state, ``best.safetensors``, ``last.safetensors``, ``history.json``
    resume       go on with the run in ``output``, if one was begun there: the result is that of an uninterrupted run
    num_classes  give the network a new head first; the original is then no teacher
    settings     a ``FinetuneConfig``; single ones can be given by name: ``finetune(…, epochs=3, lr=1e-3)``
    device       where to train; default: Accelerate's choice (a GPU where there is one)
    workers      processes that read images
    say          is told, in one line, of what was assumed or changed on the way; default: a warning
    on_progress  is told of every update, in a dict of plain types

    Norms of which no parameter trains keep their running statistics, and so do those that the caller put in eval mode
    in a network that as a whole is in training mode. Under ``accelerate launch`` or ``torchrun`` every process calls
    this alike. The caller's random state is put back.

    :raises UsageError: what was asked for cannot be, or not together.
    :raises DataError: no images, or labels that the head cannot have.
    :raises TrainingError: a batch norm that trains is given one value a channel; memory does not hold one image.
    :raises DivergedError: a loss that is not finite. ``TrainingStopped``: SIGINT or SIGTERM asked it to stop.
    :raises CheckpointError: a file that cannot be written or read.

    >>> import timm
    >>> net = timm.create_model("test_resnet", num_classes=2)
    >>> batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))]
    >>> tuned = finetune(net, batches, steps=2, device="cpu")
    >>> tuned.steps, [row["step"] for row in tuned.history.steps]
    (2, [1, 2])
    """
    asked = (settings or FinetuneConfig()).replace(**changes)
    found_device = checking.find_device(device)
    folder = None if output is None else RunFolder(Path(output))
    if resume and folder is None:
        raise UsageError("resume=True goes on with the run in a folder; give output=FOLDER")
    conversion = result if isinstance(result, Conversion) else None
    given = conversion.model if conversion is not None else result
    assert isinstance(given, nn.Module)
    if teacher is UNSET:
        teacher = conversion.original if conversion is not None and num_classes is None else None
    original = conversion.original if conversion is not None else None
    with ExitStack() as stack:
        stack.enter_context(own_random_state())
        stack.enter_context(on_device(found_device))
        accelerator = launch(asked, found_device, None if folder is None else folder.path)
        main = accelerator.is_main_process
        shard = Shard(accelerator.process_index, accelerator.num_processes)
        plain, _ = copy_model(given, None)
        if num_classes is not None:
            seed_everything(HEAD, asked.seed)
            reset_head_(plain, num_classes)
        stack.enter_context(single_values_named(plain, teacher))
        config = DataConfig.of(plain)
        classes = head_classes(plain, config)
        if teacher is not None:
            checking.check_teacher(plain, teacher, classes, head_classes(teacher, config))
        if asked.ce != 0:
            checking.check_classes(train, classes)
        data = open_split(train, classes, training=True)
        feed = make_feed(
            data, config, asked, asked.batch_size, asked.seed, shard, workers, accelerator.device.type == "cuda"
        )
        held_out = None if val is None else open_split(val, classes, training=False)
        weights = checking.settle_weights(asked, feed.labelled, teacher is not None, feed.name)
        if weights.ce:
            checking.check_labels(data, classes)
        if (asked.mixup or asked.cutmix) and (feed.batch_size // shard.world) % 2:
            raise UsageError(f"mixup and cutmix mix pairs: batch_size={feed.batch_size} must be even in every process")
        steps = asked.steps or asked.epochs * feed.per_epoch
        blocks: tuple[str, ...] = ()
        if teacher is not None and weights.features:
            plans = (*origin_of(plain).plans, *([conversion.plan] if conversion is not None else []))
            blocks = shared_blocks(plain, teacher, plans, config, required=asked.features is not None)
            weights = weights if blocks else replace(weights, features=0.0)
        student = _student(
            plain,
            asked,
            weights,
            conversion,
            original or teacher,
            (steps, feed.per_epoch),
            accelerator,
            classes,
            blocks,
        )
        tell = on_message if main else (lambda text: None)
        asleep = all_asleep(student.core)
        if asleep:
            tell(
                f"all {asleep} batch norms are in eval mode in a network in training mode, and keep their "
                "running statistics; call its train() first to have them move"
            )
        if teacher is not None:
            stack.enter_context(placed(teacher, accelerator.device))
            stack.enter_context(eval_mode(teacher))
        judge = None
        if held_out is not None:
            judge = Judge(held_out, teacher, accelerator.device, min(64, asked.batch_size), workers)
        stop = stack.enter_context(stopped_by_signals())
        keeper = Keeper(
            accelerator,
            student,
            plain,
            conversion,
            folder,
            judge,
            stop,
            asked,
            {"data": {"name": feed.name, "images": feed.images}, "network": network_shape(plain)},
            tell,
        )
        loop = Loop(accelerator, student, teacher, feed, asked, weights, steps, tell, on_progress, keeper.after_update)
        keeper.begin(loop, resume)
        if asked.trackers:
            accelerator.init_trackers("normsurgeon", _flat(asked.to_dict()))
        try:
            loop.run()
        except TrainingStopped:
            raise
        except TrainingError as error:
            raise type(error)(f"{error}{keeper.kept}") from error
        finally:
            if asked.trackers:
                accelerator.end_training()
        keeper.finish()
    if conversion is not None:
        trained = keeper.conversion_of(plain)
        assert trained is not None
        conversion.model, conversion.history, conversion.optimizer = trained.model, trained.history, None
    return Finetuned(
        model=plain,
        conversion=conversion,
        history=loop.history,
        before=keeper.before,
        after=keeper.after,
        best=keeper.best,
        steps=loop.step,
        images=loop.step * feed.batch_size,
        seconds=keeper.seconds,
        skipped=tuple(sorted(loop.skipped)),
        path=keeper.path,
        settings=asked,
        stopped=stop.signal,
    )


def _student(
    plain: nn.Module,
    settings: FinetuneConfig,
    weights: checking.Weights,
    conversion: Conversion | None,
    original: nn.Module | None,
    length: tuple[int, int],
    accelerator: Accelerator,
    classes: int,
    blocks: tuple[str, ...],
) -> Student:
    """A copy of the network, dressed for training; ``length``: updates in all, and in one pass over the images."""
    core, _ = copy_model(plain, None)
    choose_trainable_(core, settings.train_what)
    frozen = frozen_norms(core)
    set_drops_(core, settings.drop, settings.drop_path)
    optimizer = make_optimizer(core, settings)
    scheduler = make_scheduler(optimizer, settings, *length)
    blends: tuple[str, ...] = ()
    if settings.progressive:
        if conversion is None or original is None:
            raise UsageError(
                "progressive conversion starts from the batch norm original: hand in what convert returned"
            )
        blends = blend_(core, conversion.plan, original)
    apart: tuple[str, ...] = ()
    if weights.distance:
        apart = matching_layers(plain, settings.distance_layers) if settings.distance_layers else block_names(plain)
    core.to(accelerator.device)
    if settings.channels_last:
        core.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(core, settings.ema, use_warmup=True) if settings.ema is not None else None
    model, prepared = accelerator.prepare(core, optimizer)
    return Student(core, model, prepared, scheduler, ema, blends, blocks, apart, classes, frozen)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
