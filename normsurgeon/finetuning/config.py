"""The settings of fine-tuning: one frozen record, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from normsurgeon._util.config import setting
from normsurgeon.data.augmentation import AUGMENTATION, Augmentation

HARMLESS = frozenset({"checkpoint_minutes", "trackers", "compile", "channels_last", "grad_accum"})
"""Settings that may change when a run is resumed: they change what it costs, and not what it computes."""

LENGTH, OPTIMIZER, LOSS, RUN = "How long", "Optimizer", "What it learns from", "The run"


class FinetuneConfig(Augmentation):
    """How to fine-tune. Names are timm's where timm has one; ``help(normsurgeon.finetune)`` shows the defaults.

    :raises UsageError: if a setting does not exist, or cannot have that value.

    >>> FinetuneConfig(lr=1e-3).opt
    'adamw'
    """

    what = "fine-tuning"

    epochs: int = setting(5, "Passes over the images.", panel=LENGTH, ge=1)
    steps: int | None = setting(None, "Updates, instead of passes.", panel=LENGTH, ge=1)
    batch_size: int = setting(64, "Images in an update, over all processes together.", panel=LENGTH, ge=1)
    grad_accum: int = setting(
        1, "Micro-batches that a batch is split into. Doubled when memory runs out.", panel=LENGTH, ge=1
    )
    opt: str = setting("adamw", "timm's optimizer, by name.", panel=OPTIMIZER)
    lr: float = setting(5e-5, "Learning rate. The default is for pretrained weights.", panel=OPTIMIZER, gt=0)
    momentum: float = setting(0.9, "Of optimizers that have one.", panel=OPTIMIZER, ge=0, le=1)
    weight_decay: float = setting(0.02, "Weight decay; never of norms and biases.", panel=OPTIMIZER, ge=0)
    layer_decay: float | None = setting(
        None, "The learning rate's factor from a layer group to the one before it. None: 1.", panel=OPTIMIZER, gt=0
    )
    sched: Literal["cosine", "tanh", "poly", "step", "constant"] = setting(
        "cosine", "Schedule of the learning rate, set at every update.", panel=OPTIMIZER
    )
    warmup_epochs: float = setting(0.2, "Epochs in which the learning rate rises.", panel=OPTIMIZER, ge=0)
    min_lr: float = setting(0.0, "Learning rate at the end.", panel=OPTIMIZER, ge=0)
    clip_grad: float | None = setting(1.0, "Largest norm of the gradient. None: no limit.", panel=OPTIMIZER, gt=0)
    train_what: str = setting(
        "all",
        "What trains: all, norms, norms+biases, or a glob of parameter names (layer4.*). Norms of which nothing trains "
        "keep their running statistics.",
        panel=OPTIMIZER,
    )
    smoothing: float = setting(0.0, "Label smoothing.", panel=AUGMENTATION, ge=0, le=1)
    mixup: float = setting(0.0, "Mixup's alpha.", panel=AUGMENTATION, ge=0)
    cutmix: float = setting(0.0, "CutMix's alpha.", panel=AUGMENTATION, ge=0)
    drop: float | None = setting(
        None, "Rate of the classifier's dropout. None: the network's own.", panel=AUGMENTATION, ge=0, le=1
    )
    drop_path: float | None = setting(
        None, "Rate of stochastic depth. None: the network's own.", panel=AUGMENTATION, ge=0, le=1
    )
    ema: float | None = setting(
        None,
        "Decay of a moving average of the weights, which is then validated and saved. None: no average.",
        panel=OPTIMIZER,
        ge=0,
        le=1,
    )
    precision: Literal["no", "bf16", "fp16"] = setting("no", "Mixed precision.", panel=RUN)
    ce: float | None = setting(None, "Weight of the cross-entropy. None: 1 with labels.", panel=LOSS, ge=0)
    kl: float | None = setting(
        None, "Weight of the KL from the teacher's logits. None: 1 with a teacher.", panel=LOSS, ge=0
    )
    temperature: float = setting(1.0, "Temperature of the distillation.", panel=LOSS, gt=0)
    features: float | None = setting(
        None, "Weight of the distance from the teacher's block outputs. None: 1 with a teacher.", panel=LOSS, ge=0
    )
    distance: float = setting(
        0.0,
        "Weight of the mean cosine between layers' sample-Gram matrices: above 0 moves their features apart.",
        panel=LOSS,
    )
    distance_layers: str | None = setting(
        None, "Glob of the layers whose features are moved apart. None: the blocks.", panel=LOSS
    )
    progressive: float = setting(
        0.0, "Share of the run in which the norms are blended in, from the fixed affine.", panel=LOSS, ge=0, le=1
    )
    progressive_order: Literal["together", "sites"] = setting(
        "together", "Blend all norms in at once, or one site after the other.", panel=LOSS
    )
    keep: Literal["best", "last"] = setting(
        "best", "Which network the run gives: the best on the validation images, or the last.", panel=RUN
    )
    checkpoint_minutes: float = setting(
        10.0, "Minutes between two writes of the run's state. 0: after every update.", panel=RUN, ge=0
    )
    seed: int = setting(0, "The run's seed.", panel=RUN, ge=0)
    compile: bool = setting(False, "Use torch.compile.", panel=RUN)
    channels_last: bool = setting(False, "Use the memory format channels_last.", panel=RUN)
    trackers: Annotated[
        tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
    ] = setting((), "Accelerate's trackers: tensorboard, wandb, …", panel=RUN, strict=False)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which settings of a resumed run have changed, one text a setting; what is harmless left out.

    >>> differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
    ['lr (0.1 → 0.2)']
    """
    names = [name for name in {**before, **now} if name not in HARMLESS]
    return [f"{n} ({before.get(n)} → {now.get(n)})" for n in names if before.get(n) != now.get(n)]
