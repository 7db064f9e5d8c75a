"""A layer's output as images × channels × positions, whatever layout the network uses."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normsurgeon.analysis.choosing import Layer
from normsurgeon.norms.families import family_of, width_of
from normsurgeon.norms.layers import LayerNormC, RmsNormC, RmsNormChw


def features(layer: Layer, x: Tensor, images: int) -> Tensor:
    """``x`` as (N, C, P) with N = ``images``: a view where the layout allows one.

    Where a network folds positions or windows into the batch dimension (as LeViT and Swin do), they are taken out of
    it again; where the first dimension is no multiple of ``images``, its rows count as images.
    """
    if x.ndim == 1:
        x = x[:, None]
    axis = _axis(layer, tuple(x.shape[1:]))
    if axis == 1 and x.ndim > 2 and len(x) == images:
        return x.flatten(2)
    x_NPC = x.flatten(1) if x.ndim == 2 else x.movedim(axis, -1)
    if len(x) != images and len(x) % images == 0:
        x_NPC = x_NPC.reshape(images, -1, x.shape[axis])
    elif x.ndim == 2:
        x_NPC = x_NPC[:, None]
    return x_NPC.flatten(1, -2).movedim(-1, 1)


@lru_cache(maxsize=4096)
def _axis(layer: Layer, shape: tuple[int, ...]) -> int:
    return channel_axis(layer.module, (1, *shape))


def channel_axis(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Which dimension of an output of this shape holds the channels.

    Layers that say so are asked; a block is asked through the layers inside it. Otherwise: the last of three
    dimensions (tokens), else the second.

    >>> channel_axis(nn.Conv2d(3, 8, 1), (2, 8, 4, 4)), channel_axis(nn.Linear(3, 8), (2, 49, 8))
    (1, -1)
    """
    if len(shape) == 2:
        return 1
    own = _own_axis(module)
    if own is not None:
        return own
    for inner in reversed(list(module.modules())):
        axis, width = _own_axis(inner), width_of(inner)
        if axis is not None and width == shape[axis]:
            return axis
    return -1 if len(shape) == 3 else 1


def _own_axis(module: nn.Module) -> int | None:
    if isinstance(module, _ConvNd):
        return 1
    if isinstance(module, nn.Linear):
        return -1
    family = family_of(module)
    if family in ("BatchNorm", "GroupNorm", "InstanceNorm", "affine"):
        return 1
    if isinstance(module, (LayerNormC, RmsNormC, RmsNormChw)):
        return 1
    if family is None:
        return None
    return 1 if "2d" in type(module).__name__.lower() else -1  # timm: LayerNorm2d, RmsNorm2d; else the last
