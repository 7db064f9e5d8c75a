"""Checks before a run begins: labels and head, teacher and student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from normsurgeon.data.sources import ImageSource
from normsurgeon.errors import DataError, UsageError
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.inference.run import device_called, name_of
from normsurgeon.norms.families import family_of


@dataclass(frozen=True)
class Weights:
    """The weight of each objective, all of them settled; 0 is none."""

    ce: float
    kl: float
    features: float
    distance: float


def settle_weights(config: FinetuneConfig, labelled: bool, teacher: bool, name: str) -> Weights:
    """The objectives' weights for data with or without labels, with or without a teacher.

    :raises UsageError: an objective without what it takes, or none at all.
    """
    ce = config.ce if config.ce is not None else float(labelled)
    kl = config.kl if config.kl is not None else float(teacher)
    features = config.features if config.features is not None else float(teacher)
    if ce and not labelled:
        raise UsageError(f"ce={ce:g} takes labels, and {name} has none; try ce=0 with a teacher")
    if (kl or features) and not teacher:
        which = f"kl={kl:g}" if kl else f"features={features:g}"
        raise UsageError(f"{which} takes a teacher, and there is none; give one, as in teacher=the batch norm original")
    if not (ce or kl or features):
        raise UsageError(
            f"there is nothing to learn from: {name} has no labels{' to use' if labelled else ''} and there is no "
            "teacher; give one, as in teacher=the batch norm original"
        )
    return Weights(ce, kl, features, config.distance)


def check_labels(data: Any, classes: int) -> None:
    """Whether the labels that are known without reading images are among the head's classes.

    :raises DataError: a label that the head does not have; the head can be reset.
    """
    if isinstance(data, ImageSource):
        known = data.known_labels or []
    elif isinstance(data, Dataset):
        known = [int(label) for label in getattr(data, "targets", ())]  # torchvision's name for them
    else:
        known = [int(n) for b in data if isinstance(b, (tuple, list)) and len(b) > 1 and b[1] is not None for n in b[1]]
    for label in known:
        check_label(label, classes)


def check_label(label: int, classes: int) -> None:
    """Whether one label is among the head's classes.

    :raises DataError: when it is not.
    """
    if not 0 <= label < classes:
        more = f"; num_classes={label + 1} (--num-classes {label + 1}) resets the head" if label >= 0 else ""
        raise DataError(f"there is a label {label}, and the network's {classes} classes are 0 to {classes - 1}{more}")


def check_teacher(model: nn.Module, teacher: nn.Module, classes: int, teacher_classes: int) -> None:
    """Whether a teacher is of the student's architecture: the same layers, whatever the norms, and the same classes.

    :raises UsageError: when it is not.
    """
    if classes != teacher_classes:
        raise UsageError(
            f"the teacher {name_of(teacher)} has {teacher_classes} classes and the network {classes}; "
            "try a teacher with the same head, or none (kl=0, features=0)"
        )
    ours, theirs = _layers(model), _layers(teacher)
    for name in sorted({**ours, **theirs}):
        if ours.get(name) != theirs.get(name):
            raise UsageError(
                f"the teacher {name_of(teacher)} is of another architecture: {name} is {_shape(theirs.get(name))} "
                f"there and {_shape(ours.get(name))} in the network; try the batch norm original"
            )


def _layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that is no norm's."""
    norms = {name for name, module in model.named_modules() if family_of(module) is not None}
    return {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if p.ndim > 1 and name.rpartition(".")[0] not in norms
    }


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape))


def find_device(device: str | torch.device | None) -> torch.device | None:
    """The given device, or None for Accelerate's choice.

    :raises UsageError: a device that is not here.
    """
    if device is None:
        return None
    found = device_called(device)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }.get(found.type, True)
    if not available:
        raise UsageError(f"there is no device {device} on this machine; try --device cpu, or leave it out")
    return found
