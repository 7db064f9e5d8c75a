"""What a training run is asked to do: one frozen record, checked when it is made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from normsurgeon.errors import UsageError

SCHEDULES = ("cosine", "tanh", "poly", "step", "constant")
HARMLESS = frozenset({"checkpoint_minutes", "trackers", "compile", "channels_last", "grad_accum"})
"""Settings that a resumed run may have otherwise: they change what a run costs, and not what it computes."""


@dataclass(frozen=True)
class Settings:
    """How to fine-tune. Names are timm's where timm has one.

    epochs, steps       how long: ``steps`` updates where given, else so many passes over the images
    batch_size          images an update, over all processes and micro-batches together
    grad_accum          micro-batches that a process's share of a batch goes through in; doubled when memory runs out
    opt, lr, momentum, weight_decay   timm's optimizers by name; norms and biases are never decayed
    layer_decay         the learning rate's factor from one layer group to the one before it; None: the same for all
    sched, warmup_epochs, min_lr      the learning rate's course, set at every update
    clip_grad           the largest norm of the gradient; None: not clipped
    train_what          ``all``, ``norms``, ``norms+biases``, or a glob of parameter names (``layer4.*``). The running
                        statistics of norms of which nothing trains stay as they are
    smoothing, mixup, cutmix          label smoothing; mixup's and cutmix's alpha
    drop, drop_path     rates of the classifier's dropout and of stochastic depth; None: as the network has them
    augment             whether training images are cropped, flipped and so on at random
    scale, ratio, hflip, vflip, color_jitter, aa, reprob   how. ``hflip`` None: 0.5, and 0 for grey drawings (digits)
    ema                 decay of the weights' moving average, which is then what is judged and kept; None: none
    precision           ``no``, ``bf16`` or ``fp16``
    ce                  weight of the cross-entropy on labels; None: 1 where there are labels
    kl, temperature     weight of the distillation of the teacher's logits; None: 1 where there is a teacher
    features            weight of the matching of block outputs; None: 1 where there is a teacher, and blocks
    distance, distance_layers   weight of the mean cosine between layers' sample-Gram matrices: above 0 moves the
                        layers' features apart. Of the layers that match a glob; None: the block outputs
    progressive         share of the run in which the norms are blended in, from the fixed affine; 0: not at all
    progressive_order   ``together``, or ``sites``: one after the other, from the input on
    keep                which network the run gives: ``best`` on the validation images, or the ``last`` (nothing is
                        picked, as a study needs it)
    checkpoint_minutes  how often the run's state is written; 0: after every update
    seed, compile, channels_last, trackers   the run's seed; torch.compile; memory format; Accelerate's trackers by name

    :raises UsageError: a value that cannot be.

    >>> Settings(lr=1e-3).opt
    'adamw'
    """

    epochs: int = 5
    steps: int | None = None
    batch_size: int = 64
    grad_accum: int = 1
    opt: str = "adamw"
    lr: float = 5e-5
    momentum: float = 0.9
    weight_decay: float = 0.02
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: float = 0.2
    min_lr: float = 0.0
    clip_grad: float | None = 1.0
    train_what: str = "all"
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    drop: float | None = None
    drop_path: float | None = None
    augment: bool = True
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float | None = None
    vflip: float = 0.0
    color_jitter: float = 0.2
    aa: str | None = None
    reprob: float = 0.0
    ema: float | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    ce: float | None = None
    kl: float | None = None
    temperature: float = 1.0
    features: float | None = None
    distance: float = 0.0
    distance_layers: str | None = None
    progressive: float = 0.0
    progressive_order: Literal["together", "sites"] = "together"
    keep: Literal["best", "last"] = "best"
    checkpoint_minutes: float = 10.0
    seed: int = 0
    compile: bool = False
    channels_last: bool = False
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "trackers"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("epochs", "batch_size", "grad_accum"):
            self._whole(name, 1)
        self._whole("seed", 0)
        if self.steps is not None:
            self._whole("steps", 1)
        for name in ("lr", "temperature"):
            self._within(name, 0, math.inf, above=True)
        for name in (
            "weight_decay",
            "warmup_epochs",
            "min_lr",
            "mixup",
            "cutmix",
            "color_jitter",
            "checkpoint_minutes",
        ):
            self._within(name, 0, math.inf)
        for name in ("momentum", "smoothing", "vflip", "hflip", "reprob", "drop", "drop_path", "progressive", "ema"):
            if getattr(self, name) is not None:
                self._within(name, 0, 1)
        for name in ("ce", "kl", "features"):
            if getattr(self, name) is not None:
                self._within(name, 0, math.inf)
        for name in ("clip_grad", "layer_decay"):
            if getattr(self, name) is not None:
                self._within(name, 0, math.inf, above=True)
        self._within("distance", -math.inf, math.inf)
        self._one_of("sched", SCHEDULES)
        self._one_of("precision", ("no", "bf16", "fp16"))
        self._one_of("progressive_order", ("together", "sites"))
        self._one_of("keep", ("best", "last"))
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(f"scale={self.scale} must be two shares of an image, the smaller first")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise UsageError(f"ratio={self.ratio} must be two aspect ratios, the smaller first")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name}={value!r} must be a whole number, at least {least}")

    def _within(self, name: str, least: float, most: float, above: bool = False) -> None:
        value = getattr(self, name)
        fits = isinstance(value, (int, float)) and math.isfinite(value) and least <= value <= most
        if not fits or (above and value == least):
            low = f"above {least:g}" if above else f"at least {least:g}"
            limits = "finite" if least == -math.inf else low if most == math.inf else f"{least:g} to {most:g}"
            raise UsageError(f"{name}={value!r} must be a number, {limits}")

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise UsageError(f"{name}={getattr(self, name)!r} is unknown; it is one of {', '.join(choices)}")

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """These settings with some of them otherwise.

        :raises UsageError: a setting that there is not; the nearest name is offered.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise UsageError(f"fine-tuning has no setting {name!r}; {offer}")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON keeps as they are."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resumed run was asked otherwise, one text a setting; what is harmless left out.

    >>> differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
    ['lr (0.1 → 0.2)']
    """
    names = [name for name in {**before, **now} if name not in HARMLESS]
    return [f"{n} ({before.get(n)} → {now.get(n)})" for n in names if before.get(n) != now.get(n)]
