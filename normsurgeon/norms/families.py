"""Which kind of norm a layer is, for counting."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normsurgeon.norms.batchnorm import is_batch_norm
from normsurgeon.norms.layers import ChannelAffine, LayerNormC, RmsNormC, RmsNormChw


def family_of(module: nn.Module) -> str | None:
    """The norm's family by name, or None for a layer that is no norm.

    >>> from timm.layers import GroupNorm1, RmsNorm
    >>> [family_of(m) for m in (nn.BatchNorm1d(4), GroupNorm1(4), nn.LayerNorm(4), RmsNorm(4), nn.ReLU())]
    ['BatchNorm', 'GroupNorm', 'LayerNorm', 'RmsNorm', None]
    """
    if is_batch_norm(module):
        return "BatchNorm"
    if isinstance(module, nn.GroupNorm):
        return "GroupNorm"
    if isinstance(module, (nn.LayerNorm, LayerNormC)):
        return "LayerNorm"
    if isinstance(module, _InstanceNorm):
        return "InstanceNorm"
    if isinstance(module, (RmsNormChw, RmsNormC)) or type(module).__name__.lower().startswith("rmsnorm"):
        return "RmsNorm"
    if isinstance(module, ChannelAffine):
        return "affine"
    return None


def width_of(module: nn.Module) -> int | None:
    """How many channels a norm, convolution or linear layer gives; None where it does not say.

    >>> width_of(nn.Conv2d(3, 8, 1)), width_of(nn.LayerNorm(4)), width_of(nn.ReLU())
    (8, 4, None)
    """
    for attribute in ("out_channels", "out_features", "num_features", "num_channels"):
        found = getattr(module, attribute, None)
        if isinstance(found, int):
            return found
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else None
