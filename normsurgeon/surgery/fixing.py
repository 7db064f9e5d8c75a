"""The network of the proof: fixed affines in place of the new norms, and whitenings in the producers before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normsurgeon.graph.linearity import out_channels, row_factors
from normsurgeon.graph.skeleton import shadow_of
from normsurgeon.norms import batchnorm
from normsurgeon.norms.affine import Affine
from normsurgeon.norms.layers import laid_out, per_channel
from normsurgeon.surgery.deciding import Decision
from normsurgeon.surgery.replacing import replace_modules_


@dataclass(frozen=True)
class Shadow:
    """A model around the original's own weights, some of which are multiplied where they are read (by ``id``)."""

    module: nn.Module
    factors: dict[int, Tensor] = field(default_factory=dict)


def with_fixed_norms(
    model: nn.Module, decisions: Sequence[Decision], whitenings: Mapping[str, Affine], wide: bool
) -> Shadow:
    """A shadow of the model with fixed affines in place of the converted norms, and ``whitenings`` in the producers.

    wide  whether it is run in float64
    """
    shadow, factors = shadow_of(model), {}
    modules = dict(shadow.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    with torch.no_grad():
        for decision in decisions:
            if decision.status != "converted":
                continue
            reading = batchnorm.read(modules[decision.name])  # the shadow's: drop and act go into it
            fixed = reading.fixed
            if decision.folds:
                white = whitenings[decision.name]
                producer = modules[str(decision.site.producer)]
                factors[id(producer.weight)] = row_factors(producer, white.scale)
                producer.bias = _whitened_bias(producer, white, wide)
                fixed = fixed.behind(white)
            gone = decision.folds and decision.target == "fold"  # nothing is left there
            replacements[modules[decision.name]] = _Fixed(fixed, reading, nn.Identity() if gone else laid_out)
    replace_modules_(shadow, replacements)
    return Shadow(shadow.eval(), factors)


class _Fixed(nn.Module):
    """A batch norm in eval mode, in float64: ``act(drop(layout(scale * x + shift)))``."""

    def __init__(self, affine: Affine, reading: batchnorm.BatchNormReading, layout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.affine, self.reading, self.layout = affine, reading, layout
        self.drop, self.act = reading.drop, reading.act  # modules of this one, so that they are in eval mode

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape (N, C, *) to the same shape."""
        scale, shift = (per_channel(v.to(x.device), x) for v in (self.affine.scale, self.affine.shift))
        return self.reading.finished(self.layout((x * scale + shift).to(x.dtype)))


def random_whitening(producer: nn.Module, norm: nn.Module) -> Affine:
    """Signs and powers of two, about as large as the norm's own whitening; shifts of about one standard deviation."""
    channels = out_channels(producer)
    generator = torch.Generator().manual_seed(channels)
    device = batchnorm.read(norm).reference.device
    sign = torch.randint(0, 2, (channels,), generator=generator) * 2.0 - 1.0
    power = torch.randint(-1, 2, (channels,), generator=generator)
    scale = sign.double() * torch.pow(2.0, power.double())
    shift = torch.randn(channels, generator=generator, dtype=torch.float64)
    return Affine(scale.to(device), shift.to(device))


def _whitened_bias(producer: nn.Module, white: Affine, wide: bool) -> nn.Parameter:
    """The bias of a layer with ``white`` behind it; its weight is the model's own, and scaled where it is read."""
    weight = producer.weight
    assert isinstance(weight, Tensor)
    bias = producer.bias.double() if isinstance(producer.bias, Tensor) else torch.zeros_like(white.shift)
    whitened = (bias * white.scale + white.shift).to(weight.device, torch.float64 if wide else weight.dtype)
    return nn.Parameter(whitened, requires_grad=False)
