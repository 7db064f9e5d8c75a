"""The networks that a training can start from: the BatchNorm original, what others make of it, and our conversions."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import normsurgeon as ns
from normsurgeon.norms.batchnorm import is_batch_norm

STARTS = ("bn", "bn frozen", "affine", "swap", "gn", "ln", "rms", "gn calibrated", "ln calibrated", "rms calibrated")
"""``bn`` trains on batch statistics, ``bn frozen`` on running ones; ``swap`` is another class alone."""

CALIBRATION_IMAGES = 256


def start(model: nn.Module, name: str, images: Tensor) -> nn.Module:
    """A new network, made of ``model`` (in eval mode); a calibrated one has seen ``images``, without labels."""
    target, _, how = name.partition(" ")
    if target == "bn":
        return copy.deepcopy(model)
    if target == "swap":
        return ns.plain_swap(model, "gn")
    result = ns.convert(model, to=target, example_inputs=images[:2], verdict=False)
    if how == "calibrated":
        ns.calibrate_(result, [(images[:CALIBRATION_IMAGES], None)])
    return result.model


def training_mode(model: nn.Module, name: str) -> nn.Module:
    """Set a start to training; its batch norms stay as they are where they are frozen."""
    model.train()
    if name == "bn frozen":
        for module in model.modules():
            if is_batch_norm(module):
                module.eval()
    return model


@torch.no_grad()
def top1(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 250) -> float:
    """The share of right answers, in eval mode."""
    model.eval()
    pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return sum(int((model(a).argmax(1) == b).sum()) for a, b in pairs) / len(y)
