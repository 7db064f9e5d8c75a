"""The few norm layers that neither torch nor timm has.

Each works on any input with its channels in dimension 1, carries a per-channel weight and bias, and, like timm's
norm+act layers, ends in ``drop`` and ``act`` (``nn.Identity`` where there is none).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def per_channel(values_C: Tensor, like: Tensor) -> Tensor:
    """A view of a vector of length C that broadcasts along dimension 1 of ``like``."""
    return values_C.view(-1, *[1] * (like.ndim - 2))


def wide(x: Tensor) -> Tensor:
    """``x`` in at least float32: half precision overflows, and loses small terms of sums."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def laid_out(y: Tensor) -> Tensor:
    """``y`` in the memory layout in which a batch norm gives it: contiguous, or channels last.

    Code behind a batch norm may count on it (``view``), also where the input was permuted. Elementwise operations keep
    their input's layout.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.ndim)
    return y if last is not None and y.is_contiguous(memory_format=last) else y.contiguous()


class _ChannelNorm(nn.Module):
    """What the layers of this file share: weight and bias of shape (C,), eps, and a closing drop and act."""

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        if affine:
            self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def normalize(self, x: Tensor) -> Tensor:
        """The norm itself, without the affine."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape (N, C, *) to the same shape."""
        y = self.normalize(x)
        if self.affine:
            y = y * per_channel(self.weight, x) + per_channel(self.bias, x)
        return self.act(self.drop(laid_out(y)))

    def extra_repr(self) -> str:
        """Channels, eps, affine."""
        return f"{self.num_channels}, eps={self.eps:g}, affine={self.affine}"


class ChannelAffine(_ChannelNorm):
    """``y = weight * x + bias`` per channel: a BatchNorm in eval mode, frozen into two vectors.

    >>> import torch
    >>> layer = ChannelAffine(3)
    >>> layer(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Nothing: the affine is all there is."""
        return x

    def extra_repr(self) -> str:
        """Channels."""
        return f"{self.num_channels}"


class RmsNormChw(_ChannelNorm):
    """RMSNorm over all of a sample, channels and positions: ``y = x / sqrt(mean(x²) + eps) * weight + bias``.

    RMSNorm (Zhang & Sennrich, arXiv:1910.07467) over the axes that the GroupNorm paper (arXiv:1803.08494) gives
    to LayerNorm on images. timm's RmsNorm has no bias; a BatchNorm's beta needs one.

        >>> import torch
        >>> layer = RmsNormChw(8, eps=0.0)
        >>> x = torch.randn(2, 8, 5, 5)
        >>> bool(torch.allclose(layer(x).square().mean((1, 2, 3)), torch.ones(2), atol=1e-5))
        True
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Divide each sample by the root of its mean square."""
        return F.rms_norm(x, x.shape[1:], None, self.eps)


class RmsNormC(_ChannelNorm):
    """RMSNorm over the channels at each position, with a bias: ``y = x / sqrt(mean_c(x²) + eps) * weight + bias``."""

    def normalize(self, x: Tensor) -> Tensor:
        """Divide each position by the root of its channels' mean square."""
        return (wide(x) * torch.rsqrt(wide(x).square().mean(1, keepdim=True) + self.eps)).to(x.dtype)


class LayerNormC(_ChannelNorm):
    """LayerNorm over the channels at each position, for any number of positions' dimensions (timm has 2-D only)."""

    def normalize(self, x: Tensor) -> Tensor:
        """Centre and scale each position over its channels."""
        return F.layer_norm(x.movedim(1, -1), (self.num_channels,), None, None, self.eps).movedim(-1, 1)


class DropAct(nn.Module):
    """What is left of a norm+act module when its norm has gone: ``act(drop(x))``."""

    def __init__(self, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.drop = drop
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape to the same shape."""
        return self.act(self.drop(x))
