"""What all cells of a study share: how long, with which optimizer, on how many images."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from normsurgeon.errors import UsageError
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.study import fields as check
from normsurgeon.study.fields import GridError, within
from normsurgeon.study.names import OPTIMIZERS, offer

DEFAULTS = FinetuneConfig()
JUDGED = ("last", "epoch")
REGULARIZERS = ("weight_decay", "drop", "drop_path", "smoothing", "mixup", "cutmix", "distance", "reprob")
"""Settings that are the axis ``regularization``, and are not shared."""

_STUDY_ONLY = ("lr_batch_size", "train_images", "test_images", "image_size", "judge")
_OTHER_NAMES = {"optimizer": "opt"}
_AXES = {"lr": "learning_rates", "learning_rate": "learning_rates", "batch_size": "batch_sizes", "seed": "seeds"}


@dataclass(frozen=True)
class Training:
    """How every cell is trained. A name that ``FinetuneConfig`` has, too, means the same here.

    epochs, steps   how long: one of the two; 8 epochs where neither is given
    lr_batch_size   the learning rates of the grid are for batches of so many images, and scaled linearly for others
                    (Goyal et al., arXiv:1706.02677): lr · batch_size / lr_batch_size. None: not scaled
    train_images, test_images   at most so many, chosen by a fixed seed; None: all
    image_size      height and width in pixels; None: the network's own
    augment         timm's augmentation of the training images, as ``scale``, ``ratio``, ``hflip``, … say
    judge           when the held-out images are looked at: ``epoch`` (after every one) or ``last`` (at the end)

    :raises UsageError: a value that cannot be.

    >>> Training().epochs, Training(steps=100).epochs, Training().opt
    (8, None, 'sgd')
    """

    epochs: int | None = None
    steps: int | None = None
    opt: str = "sgd"
    momentum: float = DEFAULTS.momentum
    layer_decay: float | None = DEFAULTS.layer_decay
    sched: str = DEFAULTS.sched
    warmup_epochs: float = DEFAULTS.warmup_epochs
    min_lr: float = DEFAULTS.min_lr
    clip_grad: float | None = None
    train_what: str = DEFAULTS.train_what
    grad_accum: int = DEFAULTS.grad_accum
    lr_batch_size: int | None = 32
    train_images: int | None = None
    test_images: int | None = None
    image_size: int | None = None
    augment: bool = False
    scale: tuple[float, float] = DEFAULTS.scale
    ratio: tuple[float, float] = DEFAULTS.ratio
    hflip: float | None = DEFAULTS.hflip
    vflip: float = DEFAULTS.vflip
    color_jitter: float = DEFAULTS.color_jitter
    aa: str | None = DEFAULTS.aa
    distance_layers: str | None = DEFAULTS.distance_layers
    precision: str = DEFAULTS.precision
    channels_last: bool = DEFAULTS.channels_last
    compile: bool = DEFAULTS.compile
    judge: str = "last"

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            with within("steps"):
                raise UsageError("give epochs or steps, and not both")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 8)
        for field in fields(self):
            with within(field.name):
                object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Training:
        """The inverse of ``to_dict``; what is missing takes its default, and ``optimizer`` is another name of ``opt``.

        :raises UsageError: an unknown key, or a value that cannot be.

        >>> Training.from_dict({"optimizer": "adamw", "steps": 20}).opt
        'adamw'
        """
        if not isinstance(values, Mapping):
            raise GridError(f"training={check.shown(values)} must be a mapping, such as training: {{epochs: 8}}")
        known = [field.name for field in fields(cls)]
        found: dict[str, Any] = {}
        for key, value in values.items():
            name = _OTHER_NAMES.get(key, key)
            with within(key):
                if name in found:
                    raise UsageError("'optimizer' and 'opt' are the same; give one of them")
                if name in REGULARIZERS or name == "dropout":
                    raise UsageError(f"{key!r} is no key of training; it goes under regularization")
                if name in _AXES:
                    raise UsageError(f"{key!r} is no key of training; it is the axis {_AXES[name]}, beside training")
                if name not in known:
                    raise UsageError(f"unknown key {key!r} under training; {offer(str(key), [*known, *_OTHER_NAMES])}")
            found[name] = value
        try:
            return cls(**found)
        except GridError as error:  # about a setting: said of the key that it was given by
            given = next((key for key in values if _OTHER_NAMES.get(key) == error.path[0]), error.path[0])
            raise GridError(str(error), (given, *error.path[1:])) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON keeps as they are."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def settings(self) -> dict[str, Any]:
        """What of this ``FinetuneConfig`` has, by its names."""
        length = ("epochs",) if self.steps is not None else ("steps",)
        return {key: value for key, value in asdict(self).items() if key not in (*_STUDY_ONLY, *length)}

    def scaled(self, lr: float, batch_size: int) -> float:
        """The learning rate for batches of that size.

        >>> Training(lr_batch_size=32).scaled(0.1, 64), Training(lr_batch_size=None).scaled(0.1, 64)
        (0.2, 0.1)
        """
        return lr if self.lr_batch_size is None else lr * (batch_size / self.lr_batch_size)


def _checked(name: str, value: Any) -> Any:
    """One value, in the type that it should have. The limits of a setting are those of ``FinetuneConfig``."""
    default = Training.__dataclass_fields__[name].default
    if value is None:
        if default is None or name in ("epochs", "lr_batch_size"):
            return None
        raise GridError(f"{name} is empty; leave the line out for {default!r}")
    if name in ("lr_batch_size", "train_images", "test_images", "image_size"):
        return check.whole(name, value, 1)
    if name == "judge":
        if value not in JUDGED:
            raise GridError(f"{name}={check.shown(value)} is unknown; it is one of {', '.join(JUDGED)}")
        return value
    if isinstance(default, bool):
        return check.flag(name, value)
    if name in ("scale", "ratio"):
        value = check.pair(name, value)
    elif isinstance(default, str) or name in ("aa", "distance_layers"):
        value = check.text("optimizer" if name == "opt" else name, value)
    elif name not in ("epochs", "steps", "grad_accum"):
        value = check.number(name, value)
    if name == "opt":
        _check_optimizer(value)
    DEFAULTS.replace(**{name: value})
    return value


def _check_optimizer(name: str) -> None:
    if name in OPTIMIZERS:
        return
    from timm.optim import list_optimizers  # slow, and needed for the rare names only

    known = [str(each) for each in list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 1)
        raise GridError(f"unknown optimizer {name!r}; {offer(name, near or OPTIMIZERS)}")


def regularizers(values: Any) -> tuple[tuple[str, float], ...]:
    """One value of the axis: ``none``, or a mapping of training settings; what is 0 anyway is left out.

    :raises UsageError: an unknown setting, or a value that cannot be.

    >>> regularizers({"weight_decay": "5e-4", "dropout": 0.1, "mixup": 0}), regularizers("none")
    ((('drop', 0.1), ('weight_decay', 0.0005)), ())
    """
    if values is None or (isinstance(values, str) and values.lower() == "none"):
        return ()
    if isinstance(values, (tuple, list)) and all(isinstance(v, (tuple, list)) and len(v) == 2 for v in values):
        values = dict(values)
    if not isinstance(values, Mapping):
        raise GridError(
            f"regularization={check.shown(values)} must be none or a mapping, such as {{weight_decay: 5.0e-4}}"
        )
    found: dict[str, float] = {}
    for key, value in values.items():
        with within(key):
            name = "drop" if key == "dropout" else key
            if name in found:
                raise UsageError("'dropout' and 'drop' are the same; give one of them")
            if name not in REGULARIZERS:
                raise UsageError(f"unknown regularization {key!r}; {offer(str(key), (*REGULARIZERS, 'dropout'))}")
            found[name] = check.number(key, value)
            DEFAULTS.replace(**{name: found[name]})
    # A network may have a dropout of its own, which 0 takes away; all others are 0 by themselves.
    return tuple(sorted((name, v) for name, v in found.items() if v or name in ("drop", "drop_path")))
