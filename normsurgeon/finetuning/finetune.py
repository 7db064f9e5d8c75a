"""``finetune``: train a converted network on images, from a teacher, from labels, or from both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from normsurgeon._util.progress import OnProgress
from normsurgeon._util.stopping import Stop, stopped_by_signals
from normsurgeon.data.feeding import make_feed
from normsurgeon.data.label_ways import Labels
from normsurgeon.data.labels import Head, names_by_output
from normsurgeon.data.seeding import HEAD, own_random_state, seed_everything
from normsurgeon.data.sources import ImageSource
from normsurgeon.data.splitting import open_split
from normsurgeon.data.transforms import DataConfig
from normsurgeon.distributed import Shard
from normsurgeon.errors import TrainingError, TrainingStopped, UsageError
from normsurgeon.finetuning import checking
from normsurgeon.finetuning.blending import blend_
from normsurgeon.finetuning.checkpointing import CheckpointManager
from normsurgeon.finetuning.config import FinetuneConfig
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
from normsurgeon.finetuning.validator import validator_on
from normsurgeon.inference.heads import name_classes_, reset_head_
from normsurgeon.inference.run import eval_mode, head_classes, placed
from normsurgeon.inference.taps import block_names, matching_layers, shared_blocks
from normsurgeon.models.checkpoint import plans_of
from normsurgeon.surgery.convert import Conversion
from normsurgeon.surgery.replacing import copy_model


def finetune(
    result: Conversion | nn.Module,
    train: Any,
    val: Any = None,
    *,
    teacher: nn.Module | Literal["original"] | None = "original",
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    num_classes: int | None = None,
    labels: Labels = "by-name",
    device: str | torch.device | None = None,
    workers: int = 0,
    on_message: Callable[[str], None] = warnings.warn,
    on_progress: OnProgress | None = None,
    # The settings: names, defaults and meaning are those of FinetuneConfig; tests compare the two.
    epochs: int = 5,
    steps: int | None = None,
    batch_size: int = 64,
    grad_accum: int = 1,
    opt: str = "adamw",
    lr: float = 5e-5,
    momentum: float = 0.9,
    weight_decay: float = 0.02,
    layer_decay: float | None = None,
    sched: Literal["cosine", "tanh", "poly", "step", "constant"] = "cosine",
    warmup_epochs: float = 0.2,
    min_lr: float = 0.0,
    clip_grad: float | None = 1.0,
    train_what: str = "all",
    smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    drop: float | None = None,
    drop_path: float | None = None,
    augment: bool = True,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
    hflip: float | None = None,
    vflip: float = 0.0,
    color_jitter: float = 0.2,
    aa: str | None = None,
    reprob: float = 0.0,
    ema: float | None = None,
    precision: Literal["no", "bf16", "fp16"] = "no",
    ce: float | None = None,
    kl: float | None = None,
    temperature: float = 1.0,
    features: float | None = None,
    distance: float = 0.0,
    distance_layers: str | None = None,
    progressive: float = 0.0,
    progressive_order: Literal["together", "sites"] = "together",
    keep: Literal["best", "last"] = "best",
    checkpoint_minutes: float = 10.0,
    seed: int = 0,
    compile: bool = False,
    channels_last: bool = False,
    trackers: Sequence[str] = (),
) -> Conversion:
    """Train a copy of a network; nothing that is given is changed.

    Returns a new Conversion: its ``model`` is the best network on the validation images (as it came, if training only
    made it worse), the last one without them or with ``keep="last"``, or its moving average with ``ema``. Its
    ``history[-1]`` is the ``FinetuneRecord``: the curves, and what was measured before and after. The run holds three
    copies of the weights besides what the optimizer keeps.

    result       a Conversion, or any classifier
    train        a data spec (see ``normsurgeon.data.sources.open_source``), an ImageSource, batches ``(images (N, C,
                 H, W), labels (N,) or None)`` that are pre-processed already, or a torch Dataset with a length whose
                 items are ``(image (C, H, W), label or None)``, pre-processed and augmented
    val          the same, to validate on after every pass over the training images. Data that comes in splits gives
                 its training split as ``train`` and its held-out one as ``val``
    teacher      what to distil from; default: the conversion's original, if it has one. None: no teacher
    output       the folder of the run: its state, ``best.safetensors``, ``last.safetensors``, ``history.json``
    resume       go on with the run in ``output``, if there is one: the result is that of an uninterrupted run
    num_classes  give the network a new head first; the original is then no teacher
    labels       as for ``evaluate``; a new head takes as many classes as it has in their order, and held-out images
                 must have the same ones
    device       where to train; default: Accelerate's choice (a GPU where there is one)
    workers      processes that read images
    on_message   called with one line on what was assumed or changed on the way; default: a warning
    on_progress  called with a ``Progress`` after each update and each validation
    epochs, …    the settings, as ``FinetuneConfig`` describes them

    Norms of which no parameter trains keep their running statistics, and so do those that the caller put in eval mode
    in a network that as a whole is in training mode. Under ``accelerate launch`` or ``torchrun`` every process calls
    this alike. The caller's random state is put back.

    :raises UsageError: if settings or arguments are wrong, or do not go together.
    :raises DataError: if there are no images, or labels that the head cannot have.
    :raises TrainingError: if a batch norm that trains gets one value a channel, or one image does not fit in memory.
    :raises DivergedError: if a loss is not finite.
    :raises TrainingStopped: if SIGINT or SIGTERM stopped it.
    :raises CheckpointError: if a file cannot be written or read.

    >>> import timm
    >>> net = timm.create_model("test_resnet", num_classes=2)
    >>> batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))]
    >>> tuned = finetune(net, batches, steps=2, device="cpu")
    >>> tuned.history[-1].steps, [row["step"] for row in tuned.history[-1].curves.steps]
    (2, [1, 2])
    """
    config = FinetuneConfig.of(locals())
    found_device = checking.find_device(device)
    folder = None if output is None else RunFolder(Path(output))
    if resume and folder is None:
        raise UsageError("resume=True goes on with the run in a folder; give output=FOLDER")
    given = Conversion.of(result)
    if isinstance(teacher, str):
        if teacher != "original":
            raise UsageError(
                f"teacher={teacher!r} must be a network, 'original' or None; try teacher=load({teacher!r})"
            )
        teacher = given.original if num_classes is None else None
    with ExitStack() as stack:
        stack.enter_context(own_random_state())
        stack.enter_context(on_device(found_device))
        accelerator = launch(config, found_device, None if folder is None else folder.path)
        main = accelerator.is_main_process
        if folder is not None and main:
            stack.enter_context(folder.held())
        shard = Shard(accelerator.process_index, accelerator.num_processes)
        plain, _ = copy_model(given.model, None)
        if num_classes is not None:
            seed_everything(HEAD, config.seed)
            reset_head_(plain, num_classes)
            name_classes_(plain, None)  # those of the old one, which may have had as many
        stack.enter_context(single_values_named(plain, teacher))
        shape = DataConfig.of(plain)
        classes = head_classes(plain, shape)
        if teacher is not None:
            checking.check_teacher(plain, teacher, classes, head_classes(teacher, shape))
        head = Head.of(classes, plain) if num_classes is None else Head(classes, {})
        # Without a loss that takes them, labels of other classes do no harm.
        data = open_split(train, head, training=True, labels=labels if config.ce != 0 else "none")
        if isinstance(data, ImageSource) and data.labelled and data.class_names is not None:
            if not head.numbers:
                name_classes_(plain, names_by_output(data.class_names, data.numbers, classes))
            head = head.taught(data.class_names, data.numbers)  # the held-out images must have the same classes
        pinned = accelerator.device.type == "cuda"
        feed = make_feed(data, shape, config, config.batch_size, config.seed, shard, workers, pinned)
        held_out = None if val is None else open_split(val, head, training=False, labels=labels)
        weights = checking.settle_weights(config, feed.labelled, teacher is not None, feed.name)
        if weights.ce:
            checking.check_labels(data, classes)
        if (config.mixup or config.cutmix) and (feed.batch_size // shard.world) % 2:
            raise UsageError(f"mixup and cutmix mix pairs: batch_size={feed.batch_size} must be even in every process")
        updates = config.steps or config.epochs * feed.per_epoch
        blocks: tuple[str, ...] = ()
        if teacher is not None and weights.features:
            blocks = shared_blocks(plain, teacher, plans_of(given), shape, required=config.features is not None)
            weights = weights if blocks else replace(weights, features=0.0)
        length = updates, feed.per_epoch
        student = _student(plain, config, weights, given, teacher, length, accelerator, classes, blocks)
        message = on_message if main else (lambda text: None)
        asleep = all_asleep(student.core)
        if asleep:
            message(
                f"all {asleep} batch norms are in eval mode in a network in training mode, and keep their "
                "running statistics; call its train() first to have them move"
            )
        if teacher is not None:
            stack.enter_context(placed(teacher, accelerator.device))
            stack.enter_context(eval_mode(teacher))
        validator = None
        if held_out is not None:
            validator = validator_on(held_out, teacher, accelerator.device, min(64, config.batch_size), workers)
        size = sum(parameter.numel() for parameter in plain.parameters())
        identity = {"data": {"name": feed.name, "images": feed.images}, "network": {"parameters": size}}
        manager = CheckpointManager(
            accelerator, student, plain, given, folder, validator, Stop(), config, identity, message
        )
        loop = Loop(
            accelerator, student, teacher, feed, config, weights, updates, message, on_progress, manager.after_update
        )
        manager.begin(loop, resume)
        manager.stop = stack.enter_context(stopped_by_signals())  # so far nothing would be lost
        if config.trackers:
            accelerator.init_trackers("normsurgeon", _flat(config.to_dict()))
        try:
            loop.run()
        except TrainingStopped:
            raise
        except TrainingError as error:
            raise type(error)(f"{error}{manager.kept}") from error
        finally:
            if config.trackers:
                accelerator.end_training()
        return manager.finish()


def _student(
    plain: nn.Module,
    config: FinetuneConfig,
    weights: checking.Weights,
    given: Conversion,
    teacher: nn.Module | None,
    length: tuple[int, int],
    accelerator: Accelerator,
    classes: int,
    blocks: tuple[str, ...],
) -> Student:
    """A copy of the network, prepared for training; ``length``: updates in all, and in one pass over the images."""
    core, _ = copy_model(plain, None)
    choose_trainable_(core, config.train_what)
    frozen = frozen_norms(core)
    set_drops_(core, config.drop, config.drop_path)
    optimizer = make_optimizer(core, config)
    scheduler = make_scheduler(optimizer, config, *length)
    blends: tuple[str, ...] = ()
    if config.progressive:
        original = given.original or teacher
        if given.plan is None or original is None:
            raise UsageError(
                "progressive conversion starts from the batch norm original: give it what convert returned"
            )
        blends = blend_(core, given.plan, original)
    apart: tuple[str, ...] = ()
    if weights.distance:
        apart = matching_layers(plain, config.distance_layers) if config.distance_layers else block_names(plain)
    core.to(accelerator.device)
    if config.channels_last:
        core.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(core, config.ema, use_warmup=True) if config.ema is not None else None
    model, prepared = accelerator.prepare(core, optimizer)
    return Student(core, model, prepared, scheduler, ema, blends, blocks, apart, classes, frozen)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
