"""The swap that everyone does, as the baseline to compare with: same shapes, another function."""

from __future__ import annotations

import torch
from torch import nn

from normsurgeon.errors import TargetError
from normsurgeon.graph.sites import NormSite
from normsurgeon.norms import batchnorm
from normsurgeon.norms.targets import auto_groups, find_target
from normsurgeon.surgery.building import new_layer_
from normsurgeon.surgery.deciding import Decision
from normsurgeon.surgery.swap_layers import swap_layers


def plain_swap(model: nn.Module, to: str, groups: int | None = None) -> nn.Module:
    """A copy of ``model`` with every batch norm replaced by ``to``, gamma, beta and eps copied, nothing whitened.

    The new norm sees channels of wildly different means and scales where gamma and beta were learned for whitened
    ones: a pretrained network is destroyed (top-1 0.0 % on ImageNet). A network with random weights has no function to
    keep: for training from scratch this is all there is to do.

    groups  of ``gn``; default: as many as ``convert`` chooses

    :raises TargetError: for an unknown target, or groups that do not divide a layer's channels.

    >>> import timm
    >>> type(plain_swap(timm.create_model("test_resnet"), "gn").bn1).__name__
    'GroupNorm'
    """
    find_target(to)
    if groups is not None and to != "gn":
        raise TargetError(f"{to} has no groups to choose; leave out groups={groups}, or try to='gn'")

    def build(old: nn.Module, name: str) -> nn.Module:
        reading = batchnorm.read(old)
        if groups is not None and (groups < 1 or reading.channels % groups):
            raise TargetError(
                f"{groups} groups do not divide the {reading.channels} channels of {name}; try a divisor of them"
            )
        chosen = {"gn": groups or auto_groups(reading.channels), "in": reading.channels}.get(to)
        site = NormSite(name, type(old).__name__, reading.channels, reading.eps)
        with torch.no_grad():
            layer = new_layer_(old, Decision(site, "converted", to, chosen, whitening="none"), None).layer
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_()
        return layer

    return swap_layers(model, lambda name, module: batchnorm.is_batch_norm(module), build).model
