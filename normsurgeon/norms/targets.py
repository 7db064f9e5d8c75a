"""The norms that a BatchNorm can become.

A ``Target`` says which elements a norm pools (``pools``: one sample's groups of channels with all positions, or the
channels at one position) and whether it removes the mean (``centres``); that is all the mathematics needs.
Building goes to timm's and torch's own layers wherever they exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import (
    GroupNorm,
    GroupNorm1,
    GroupNorm1Act,
    GroupNormAct,
    LayerNorm,
    LayerNorm2d,
    LayerNormAct,
    LayerNormAct2d,
)
from torch import nn

from normsurgeon.norms.layers import ChannelAffine, DropAct, LayerNormC, RmsNormC, RmsNormChw
from normsurgeon.norms.target_names import check_target

Pools = Literal["groups", "channels", "nothing"]


@dataclass(frozen=True)
class LayerSpec:
    """All that is needed to build one norm layer; ``rank`` is the number of dimensions of its input, if known."""

    channels: int
    groups: int
    eps: float
    affine: bool
    rank: int | None
    drop: nn.Module | None
    act: nn.Module | None
    device: torch.device
    dtype: torch.dtype

    @property
    def fused(self) -> bool:
        """Whether a norm+act layer is wanted."""
        return self.act is not None or self.drop is not None

    @property
    def factory(self) -> dict[str, Any]:
        """Where to make tensors."""
        return {"device": self.device, "dtype": self.dtype}


@dataclass(frozen=True)
class Target:
    """One norm of the catalogue.

    ``pools``: "groups" (a sample's channel groups over all positions), "channels" (all channels at one position) or
    "nothing" (a fixed map). ``centres``: whether the pooled mean is removed. ``exact``: whether the network's
    function stays the same.
    """

    name: str
    title: str
    pools: Pools
    centres: bool
    build: Callable[[LayerSpec], nn.Module]

    @property
    def exact(self) -> bool:
        """Whether the converted layer computes what the BatchNorm computed in eval mode."""
        return self.pools == "nothing"


def _finish(layer: nn.Module, spec: LayerSpec) -> nn.Module:
    """Put the original's own drop and act modules behind the new norm."""
    if spec.fused:
        layer.drop = spec.drop if spec.drop is not None else nn.Identity()
        layer.act = spec.act if spec.act is not None else nn.Identity()
    return layer


def _timms(spec: LayerSpec, plain: type[nn.Module], fused: type[nn.Module], **more: Any) -> nn.Module:
    """timm's norm, or its norm+act layer."""
    options = {"eps": spec.eps, "affine": spec.affine, **spec.factory, **more}
    if spec.fused:
        return _finish(fused(spec.channels, apply_act=False, **options), spec)
    return plain(spec.channels, **options)


def _group_norm(spec: LayerSpec) -> nn.Module:
    return _timms(spec, GroupNorm, GroupNormAct, num_groups=spec.groups)


def _layer_norm(spec: LayerSpec) -> nn.Module:
    return _timms(spec, GroupNorm1, GroupNorm1Act)


def _layer_norm_2d(spec: LayerSpec) -> nn.Module:
    if spec.rank == 4:
        return _timms(spec, LayerNorm2d, LayerNormAct2d)
    if spec.rank == 2:
        return _timms(spec, LayerNorm, LayerNormAct)
    return _ours(LayerNormC)(spec)


def _instance_norm(spec: LayerSpec) -> nn.Module:
    cls = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}.get(spec.rank or 0)
    if spec.fused or cls is None:  # timm has no instance norm + act; one group a channel is the same norm
        return _group_norm(spec)
    return cls(spec.channels, eps=spec.eps, affine=spec.affine, **spec.factory)


def _ours(cls: type[nn.Module]) -> Callable[[LayerSpec], nn.Module]:
    def build(spec: LayerSpec) -> nn.Module:
        return _finish(cls(spec.channels, eps=spec.eps, affine=spec.affine, **spec.factory), spec)

    return build


def _nothing(spec: LayerSpec) -> nn.Module:
    if not spec.fused:
        return nn.Identity()
    return DropAct(spec.drop or nn.Identity(), spec.act or nn.Identity())


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("gn", "GroupNorm", "groups", True, _group_norm),
        Target("ln", "LayerNorm over C,H,W (GroupNorm with one group)", "groups", True, _layer_norm),
        Target("ln2d", "LayerNorm over C at each position", "channels", True, _layer_norm_2d),
        Target("in", "InstanceNorm", "groups", True, _instance_norm),
        Target("rms", "RMSNorm over C,H,W", "groups", False, _ours(RmsNormChw)),
        Target("rms2d", "RMSNorm over C at each position", "channels", False, _ours(RmsNormC)),
        Target("affine", "fixed scale and shift per channel (exact)", "nothing", False, _ours(ChannelAffine)),
        Target("fold", "folded into the producer (exact)", "nothing", False, _nothing),
    )
}


def find_target(name: str) -> Target:
    """The catalogue's entry of that name.

    :raises TargetError: for a name that the catalogue does not have.

    >>> find_target("ln").title
    'LayerNorm over C,H,W (GroupNorm with one group)'
    """
    check_target(name)
    return TARGETS[name]


def auto_groups(channels: int, most: int = 32, least_width: int = 16) -> int:
    """The most groups, at most ``most``, that divide the channels and leave at least ``least_width`` in each.

    Fewer, wider groups keep more of the pretrained function (the group statistics fluctuate less from sample to
    sample); 32 groups and 16 channels a group are the two settings that the GroupNorm paper found good
    (Wu & He, arXiv:1803.08494, table 3).

    >>> auto_groups(256), auto_groups(2048), auto_groups(24), auto_groups(72)
    (16, 32, 1, 4)
    """
    fitting = (groups for groups in range(most, 0, -1) if channels % groups == 0 and channels // groups >= least_width)
    return next(fitting, 1)
