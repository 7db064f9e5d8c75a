"""Whether a convolution or linear layer is linear in its weight and bias: a test of each instance."""

from __future__ import annotations

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normsurgeon.graph.skeleton import HOOKS, deepcopy_module

_KNOWN_FORWARDS = {
    cls.forward
    for cls in (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Linear,
        Conv2dSame,
    )
}
_KNOWN_CONVOLUTIONS = {None, nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward}


def channel_axis(layer: nn.Module, dims: int) -> int:
    """The dimension of a layer's output, of ``dims`` dimensions, that holds its channels."""
    if isinstance(layer, nn.Linear):
        return dims - 1
    assert isinstance(layer, _ConvNd)
    return 1 if dims == len(layer.kernel_size) + 2 else 0  # without a batch dimension


def out_channels(layer: nn.Module) -> int:
    """How many channels a convolution or linear layer gives."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def scale_rows_(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Multiply each output channel's weights and bias by ``scale`` (C,) and add ``shift`` (C,) to the bias, in place.

    What folding does, written once more and in the plainest way, so that the test is of the layer alone.
    """
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    weight.mul_(row_factors(layer, scale))
    bias.mul_(scale).add_(shift)


def row_factors(layer: nn.Module, scale: Tensor) -> Tensor:
    """The ``scale`` (C,) of each output channel in a shape that the layer's weight can be multiplied by."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, *kernel)
        per_group = scale.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
        return per_group.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))
    return scale.view(-1, *[1] * (weight.ndim - 1))


def is_linear_in_its_weights(layer: nn.Module) -> bool:
    """Whether scaling and shifting a layer's weight and bias does exactly that to its output, for this instance.

    ``y(s * W, s * b + t) == s * y(W, b) + t`` for random signed s and t per output channel. Torch's own layers are
    known; a subclass, or a ``forward`` of the instance's own, is put to the test on a random float64 copy. Weight
    standardisation, an activation inside, or a bias that is never added fail it. False where it cannot be tested.
    """
    own_forward = "forward" in vars(layer)
    known = type(layer).forward in _KNOWN_FORWARDS
    if not own_forward and known and getattr(type(layer), "_conv_forward", None) in _KNOWN_CONVOLUTIONS:
        return True
    try:
        return _passes(layer)
    except Exception:  # a foreign forward may raise anything; then nothing is proven
        return False


@torch.no_grad()
def _passes(layer: nn.Module) -> bool:
    probe = deepcopy_module(layer).to_empty(device="cpu").double().eval()
    for hooks in HOOKS:
        getattr(probe, hooks, {}).clear()
    generator = torch.Generator().manual_seed(0)
    channels = out_channels(layer)
    if probe.bias is None:
        probe.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float64))
    for tensor in [*probe.parameters(), *probe.buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.4)
    if isinstance(probe, nn.Linear):
        shape: tuple[int, ...] = (2, 3, probe.in_features)
    else:
        assert isinstance(probe, _ConvNd)
        side = max(8, *(d * (k - 1) + 2 for d, k in zip(probe.dilation, probe.kernel_size, strict=True)))
        shape = (2, probe.in_channels, *[side] * len(probe.kernel_size))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = probe(x)
        scale = torch.randn(channels, generator=generator, dtype=torch.float64)
        shift = torch.randn(channels, generator=generator, dtype=torch.float64)
        scale_rows_(probe, scale, shift)
        torch.manual_seed(1)
        after = probe(x)
    axis = channel_axis(layer, before.ndim)
    view = [1] * before.ndim
    view[axis] = channels
    expected = before * scale.view(view) + shift.view(view)
    tolerance = 1e-10 * float(before.abs().max())
    return before.shape[axis] == channels and torch.allclose(after, expected, rtol=1e-10, atol=tolerance)
