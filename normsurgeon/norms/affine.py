"""Fixed maps of channels, and moments of channels: what a batch norm in eval mode is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normsurgeon.norms.layers import per_channel


@dataclass(frozen=True)
class Moments:
    """Per-channel mean and variance of a norm's input over the data, each of shape (C,), float64."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Affine:
    """``y = scale * x + shift`` per channel; both of shape (C,), float64."""

    scale: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to ``x`` of shape (N, C, *), in the precision of ``x``."""
        scale, shift = (per_channel(values.to(x.device, x.dtype), x) for values in (self.scale, self.shift))
        return x * scale + shift

    def after(self, moments: Moments) -> Moments:
        """The moments of the output for an input of the given moments."""
        return Moments(self.scale * moments.mean + self.shift, self.scale.square() * moments.var)

    def compose(self, inner: Affine) -> Affine:
        """``self(inner(x))`` as one map."""
        return Affine(self.scale * inner.scale, self.scale * inner.shift + self.shift)

    def behind(self, inner: Affine) -> Affine:
        """What has to follow ``inner`` to make up this map: ``whole.behind(inner).compose(inner) == whole``."""
        scale = self.scale / inner.scale
        return Affine(scale, self.shift - scale * inner.shift)
