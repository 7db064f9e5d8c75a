"""From a cell to the network that it trains: loaded or new, with its activation and its norm."""

from __future__ import annotations

import copy
import os

from torch import nn

from normsurgeon.data.seeding import HEAD, own_random_state, seed_everything
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import UsageError
from normsurgeon.inference.heads import reset_head_
from normsurgeon.inference.run import head_classes
from normsurgeon.models.load import load
from normsurgeon.models.registry import ModelSource
from normsurgeon.models.small_resnets import SMALL
from normsurgeon.study.records import Cell
from normsurgeon.surgery.convert import convert
from normsurgeon.surgery.plain_swap import plain_swap
from normsurgeon.surgery.swap_activations import with_activation


def build_network(cell: Cell, classes: int, channels: int, original: nn.Module | None = None) -> nn.Module:
    """The network of a cell before it is trained, a function of the cell alone.

    From scratch: random weights, the same for every norm of one seed, and every BatchNorm swapped for the norm.
    Converted: the trained weights, a new head where it has other classes, and ``normsurgeon.convert``; of ``bn``, the
    trained network itself.

    classes, channels  of the data set: 1 for grey images
    original           the BatchNorm network that a converted cell starts from, with the cell's activation; None: the
                       one with published weights, or a file's

    :raises UsageError: if the network cannot have this: groups that do not divide, an activation where it has none.
    :raises NormSurgeonError: if a network cannot be loaded.

    >>> net = build_network(Cell("resnet8", "digits", norm="gn:4"), classes=10, channels=1)
    >>> net.bn1.num_groups
    4
    """
    with own_random_state():
        seed_everything(HEAD, cell.seed)
        if original is not None:
            model = _with_head(copy.deepcopy(original), classes)
        else:
            model = _loaded(cell, classes, channels)
            if cell.activation != "default":
                model = with_activation(model, cell.activation)
        norm, _, groups = cell.norm.partition(":")
        if norm == "bn":
            return model
        if cell.start == "scratch":
            return plain_swap(model.train(), norm, int(groups) if groups else None)
        return convert(model.eval(), to=norm, groups=int(groups) if groups else "auto").model


def _loaded(cell: Cell, classes: int, channels: int) -> nn.Module:
    if cell.model in SMALL:
        if cell.start == "converted":
            raise UsageError(
                f"there are no pretrained weights of {cell.model}; try start: scratch, or a file that finetune wrote"
            )
        return SMALL[cell.model](num_classes=classes, in_chans=channels)
    if cell.start == "scratch":
        if os.path.isfile(cell.model):
            raise UsageError(f"{cell.model} is a file, whose weights are not random; try start: converted")
        return load(cell.model, pretrained=False, num_classes=classes, in_chans=channels)
    if _is_timm(cell.model):
        return load(cell.model, num_classes=classes, in_chans=channels)
    return _with_head(load(cell.model), classes)


def _with_head(model: nn.Module, classes: int) -> nn.Module:
    """A trained network with a new head, in place, if its classes are others."""
    if head_classes(model, DataConfig.of(model)) != classes:
        reset_head_(model, classes)
    return model


def _is_timm(name: str) -> bool:
    try:
        return ModelSource.parse(name).kind == "timm" and not name.endswith((".safetensors", ".pt", ".pth"))
    except Exception:
        return False
