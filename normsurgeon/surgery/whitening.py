"""The mathematics of keeping the function: what goes into the producer, what into the new norm's affine.

A BatchNorm in eval mode is the fixed map ``y = gamma * (x - mean) / sqrt(var + eps) + beta``. A per-sample norm T
stands in for it well where it sees the whitened ``xhat = (x - mean) / sqrt(var + eps)``. Either the producer absorbs
the whitening (``fold_``), or T's weight and bias are solved for from the running statistics (``matching_affine``).
Everything is computed in float64 and cast once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from normsurgeon.norms.affine import Affine, Moments
from normsurgeon.norms.targets import Target

GAIN = 2.0
"""Folding multiplies the L2 norm of a pool's weights by this.

Behind a batch norm, a gradient has no part along each channel's mean and scale over the batch. Behind a per-sample norm
it has, and is about twice as large on the data that the network was trained on, and more on other data. A weight twice
as large moves a quarter as far (docs/decisions.md 13).
"""

CHUNK = 2**17
"""Weights that are scaled at a time: 1 MiB in float64."""


def give_bias_(producer: nn.Module) -> None:
    """Give a layer without bias one of zeros, in place; it requires a gradient where the weight does."""
    weight: nn.Parameter = producer.weight  # type: ignore[assignment]
    if producer.bias is None:
        channels = weight.shape[1] * producer.groups if isinstance(producer, _ConvTransposeNd) else weight.shape[0]
        producer.bias = nn.Parameter(weight.new_zeros(channels), requires_grad=weight.requires_grad)


def fold_(producer: nn.Module, affine: Affine) -> None:
    """Put ``affine`` behind a convolution or linear layer, in place, by changing its weight and bias.

    A layer without bias gains one. Exact: zero padding concerns the layer's input, not its output.
    """
    give_bias_(producer)
    weight: nn.Parameter = producer.weight  # type: ignore[assignment]
    scale = affine.scale
    bias: nn.Parameter = producer.bias  # type: ignore[assignment]
    with torch.no_grad():
        if isinstance(producer, _ConvTransposeNd):
            # The weight is (in, out / groups, *kernel): output channels run over groups first, then dimension 1.
            factors = scale.view(producer.groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
            blocks = weight.double().reshape(producer.groups, -1, *weight.shape[1:])
            weight.copy_((blocks * factors).reshape(weight.shape))
        else:
            # In float64, a few output channels at a time: a second copy of a large weight would be the peak of memory.
            rows = max(1, CHUNK // max(1, weight[0].numel()))
            for part, factors in zip(weight.split(rows), scale.split(rows), strict=True):
                part.copy_(part.double().mul_(factors.view(-1, *[1] * (weight.ndim - 1))))
        bias.copy_(bias.double() * scale + affine.shift)


def at_scale(producer: nn.Module, affine: Affine, target: Target, groups: int, gain: float) -> Affine:
    """``affine`` times one positive factor a pool of T, so that folding it multiplies the L2 norm of each pool's
    weights by ``gain``.

    T, which divides by the scale of its pools, takes the factor out again (up to eps). Training does not: behind a
    norm, the effective learning rate of W goes with 1 / ||W||² (van Laarhoven, arXiv:1706.05350), and folding alone
    divides each row of W by a standard deviation, whatever that is.
    """
    rows_C = _row_squares(producer)
    pools = groups if target.pools == "groups" else 1
    before_G = rows_C.view(pools, -1).sum(1)
    after_G = (rows_C * affine.scale.square().to(rows_C.device)).view(pools, -1).sum(1)
    factor_G = torch.where((before_G > 0) & (after_G > 0), gain * torch.sqrt(before_G / after_G), 1.0)
    factor_C = factor_G.repeat_interleave(len(rows_C) // pools).to(affine.scale.device)
    return Affine(factor_C * affine.scale, factor_C * affine.shift)


def change_of_producer(old: nn.Module, new: nn.Module) -> Affine:
    """The scale and shift per channel by which a layer's output changed, from its weights: least squares in float64.

    The inverse of ``fold_``; of a layer that was trained since, the nearest such map.

    >>> old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> _ = new.load_state_dict({"weight": old.weight * torch.tensor([[2.0], [-0.5]]), "bias": old.bias})
    >>> [round(factor, 5) for factor in change_of_producer(old, new).scale.tolist()]
    [2.0, -0.5]
    """
    a, b = _rows(old), _rows(new)
    norm = (a * a).sum(1)
    scale = torch.where(norm > 0, (a * b).sum(1) / norm.clamp_min(1e-300), 1.0)
    scale = torch.where(scale == 0, 1.0, scale)

    def bias_of(layer: nn.Module) -> Tensor:
        bias = layer.bias
        return bias.detach().double() if isinstance(bias, Tensor) else torch.zeros_like(scale)

    return Affine(scale, bias_of(new) - scale * bias_of(old))


def _rows(layer: nn.Module) -> Tensor:
    """The weights of each output channel, (C, number of weights), float64."""
    weight: Tensor = layer.weight.detach().double()  # type: ignore[operator]
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, *kernel)
        blocks = weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)
        return blocks.permute(0, 2, 1, 3).reshape(layer.groups * weight.shape[1], -1)
    return weight.flatten(1)


def _row_squares(layer: nn.Module) -> Tensor:
    """The squared L2 norm of each output channel's weights, (C,), float64; a few rows at a time, as ``fold_``."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if isinstance(layer, _ConvTransposeNd):
        return _rows(layer).square().sum(1)
    rows = max(1, CHUNK // max(1, weight[0].numel()))
    return torch.cat([part.double().square().flatten(1).sum(1) for part in weight.split(rows)])


def matching_affine(
    wanted: Affine, moments: Moments, target: Target, groups: int, eps: float, softening: float | None
) -> tuple[Affine, float]:
    """The weight and bias with which the norm T best stands in for ``wanted(x)``, and the eps to give T.

    For an input of the given per-channel ``moments``, T's expected pool has mean M (0 for a norm that does not
    centre) and mean square deviation V, so T(x) ≈ (x - M) / sqrt(V + eps) before its affine, and

        weight = wanted.scale * sqrt(V + eps)        bias = wanted.shift + wanted.scale * M

    make the two sides equal for a sample of average statistics. On whitened input M = 0 and V ≈ 1: this copies gamma
    and beta, but for channels that never vary, which make V smaller than 1.

    ``softening`` E replaces eps by E times the average V, so that it means the same on any input.
    """
    pools = groups if target.pools == "groups" else 1
    mean_G = moments.mean.view(pools, -1)
    square_G = moments.var.view(pools, -1) + mean_G.square()
    M_G = mean_G.mean(1) if target.centres else torch.zeros_like(mean_G[:, 0])
    V_G = (square_G.mean(1) - M_G.square()).clamp(min=0)
    if softening is not None:
        eps = softening * max(float(V_G.mean()), torch.finfo(torch.float32).tiny)
    width = moments.mean.numel() // pools
    spread = torch.sqrt(V_G + eps).repeat_interleave(width)
    centre = M_G.repeat_interleave(width)
    return Affine(wanted.scale * spread, wanted.shift + wanted.scale * centre), eps
