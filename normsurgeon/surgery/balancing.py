"""A per-channel pre-scale that lets a per-sample norm follow the batch norm more closely, at no run-time cost.

The producer may hand T the features ``alpha * xhat`` instead of ``xhat`` when T's weight is divided by ``alpha``: for
the fixed affine nothing changes, but T's pooled statistics do. Two uses:

sign of alpha       Half of GroupNorm's damage is the removed group mean, which moves from sample to sample because
                    channels rise and fall together. With signs chosen so that co-varying channels cancel, the group
                    mean hardly moves: a local minimum of a'Ka, K the covariance of the channels' means.
magnitude of alpha  Heavy-tailed channels make the pooled variance jump; they get a smaller say in it.

Neither changes what kind of norm T is, nor its groups. Measured in docs/decisions.md.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from normsurgeon.norms.targets import Target
from normsurgeon.surgery.probing import FeatureProbe

TAIL_POWER = {True: 0.25, False: 0.4}
"""How strongly tails are weighed down, for norms that remove a mean and for those that do not (docs/decisions.md)."""

MOST = 4.0
SWEEPS = 2


def balance(probe: FeatureProbe, target: Target, groups: int) -> Tensor:
    """The pre-scale alpha of shape (C,), float64, for one site.

    Its magnitudes average (in the square) 1 in each pool; its signs are +1 for a norm that removes no mean.
    """
    pools = groups if target.pools == "groups" else 1
    kurtosis = torch.nan_to_num(probe.kurtosis_C.double(), nan=0.0).clamp(-1.5, 200.0)
    weight_GC = (kurtosis + 2).pow(-TAIL_POWER[target.centres]).view(pools, -1)
    alpha_GC = (weight_GC / weight_GC.mean(1, keepdim=True)).sqrt().clamp(1 / MOST, MOST)
    if target.centres and alpha_GC.shape[1] > 1:
        means_NGC = probe.means_NC.double().view(len(probe.means_NC), pools, -1)
        alpha_GC = alpha_GC * cancelling_signs((means_NGC * alpha_GC).permute(1, 2, 0))
    return alpha_GC.reshape(-1)


def cancelling_signs(means_GCN: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """Signs (G, C) that make the sum over C of ``sign * means`` small over the N samples, for each group.

    Greedy from the most to the least variable channel, then sweeps of coordinate descent: each channel takes the sign
    against the rest's sum. The objective never rises.

    >>> cancelling_signs(torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])).prod().item()
    -1.0
    """
    means = torch.nan_to_num(means_GCN).numpy()
    order = np.argsort(-np.square(means).sum(2), axis=1, kind="stable")
    ordered = np.ascontiguousarray(np.take_along_axis(means, order[:, :, None], axis=1).transpose(1, 0, 2))
    signs = np.zeros((*ordered.shape[:2], 1))
    total = np.zeros_like(ordered[0])
    for sweep in range(1 + sweeps):
        before = signs.copy()
        for mean, sign in zip(ordered, signs, strict=True):  # each (G, N) and (G, 1), views
            total -= sign * mean
            sign[:] = np.where((total * mean).sum(1, keepdims=True) > 0, -1.0, 1.0)
            total += sign * mean
        if sweep and np.array_equal(signs, before):
            break
    found = np.empty(order.shape)
    np.put_along_axis(found, order, signs[:, :, 0].T, axis=1)
    return torch.from_numpy(found)
