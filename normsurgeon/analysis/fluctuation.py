"""How far the statistics that a per-sample norm divides by vary from image to image: what such a norm will do there.

A batch norm divides by a constant, a group norm by what it finds in each image. Where that hardly varies, the two do
the same; the coefficient of variation says how nearly. Both figures come from the channels' means and variances in
each image, which the statistics hold already.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from normsurgeon.inference.moments import chan
from normsurgeon.norms import batchnorm
from normsurgeon.norms.families import family_of
from normsurgeon.norms.layers import RmsNormChw
from normsurgeon.norms.targets import auto_groups

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GroupView:
    """How a norm's input is seen: in how many groups, and after which whitening of the channels."""

    groups: int
    mean_C: Array | float = 0.0
    std_C: Array | float = 1.0
    centred: bool = True


def group_view(module: nn.Module) -> GroupView | None:
    """For a batch norm: its whitened input in the groups that ``--to gn`` would choose; for a per-sample norm over
    positions: its input in its own groups. None for norms that work position by position, or on nothing.
    """
    family = family_of(module)
    if family == "BatchNorm":
        reading = batchnorm.read(module)
        groups = auto_groups(reading.channels)
        if reading.mean is None or reading.var is None or reading.mean.is_meta:
            return GroupView(groups)
        std = (reading.var.detach().double() + reading.eps).sqrt()
        return GroupView(groups, reading.mean.detach().double().cpu().numpy(), std.cpu().numpy())
    if family == "GroupNorm" and isinstance(module, nn.GroupNorm):
        return GroupView(module.num_groups)
    if family == "InstanceNorm":
        return GroupView(int(getattr(module, "num_features", 1)))
    return GroupView(1, centred=False) if isinstance(module, RmsNormChw) else None


class Fluctuation:
    """Sums over images, for one site.

    The rows of ``sums``: mean and squared deviations of the groups' std, the same of their mean, mean of their
    variance.
    """

    def __init__(self, view: GroupView, images: int = 0, sums: Array | None = None):
        self.view = view
        self.images = images
        self.sums: Array = np.zeros((5, view.groups)) if sums is None else sums

    def update(self, means_NC: Array, variances_NC: Array) -> None:
        """The channels' means and (population) variances in each of N images."""
        view = self.view
        means = (means_NC - view.mean_C) / view.std_C
        seconds = variances_NC / np.square(view.std_C) + np.square(means)
        images, channels = means.shape
        if channels % view.groups:
            return
        group_mean = means.reshape(images, view.groups, -1).mean(2)
        second = seconds.reshape(images, view.groups, -1).mean(2)
        variance = np.maximum(second - np.square(group_mean) if view.centred else second, 0.0)
        finite = (np.isfinite(variance) & np.isfinite(group_mean)).all(1)
        std, group_mean, variance = np.sqrt(variance[finite]), group_mean[finite], variance[finite]
        if len(std):
            sums = np.stack([*_moments(std), *_moments(group_mean), variance.mean(0)])
            self.merge(Fluctuation(view, len(std), sums))

    def merge(self, other: Fluctuation) -> None:
        """Add another part of the stream."""
        n, m, own, others = self.images, other.images, self.sums, other.sums
        nothing = np.zeros(self.view.groups)
        self.sums = np.stack(
            [
                *chan(n, own[0], own[1], m, others[0], others[1]),
                *chan(n, own[2], own[3], m, others[2], others[3]),
                chan(n, own[4], nothing, m, others[4], nothing)[0],
            ]
        )
        self.images = n + m

    def compute(self) -> tuple[float | None, float | None]:
        """Mean over groups of: the std's coefficient of variation; the mean's deviation over the root mean variance."""
        if self.images < 2:
            return None, None
        std, std_squares, _, mean_squares, variance = self.sums
        alive = variance > 0
        if not alive.any():
            return None, None
        of_std = np.sqrt(std_squares / self.images)[alive] / std[alive]
        of_mean = np.sqrt(mean_squares / self.images)[alive] / np.sqrt(variance[alive])
        return float(of_std.mean()), float(of_mean.mean())


def _moments(values_NG: Array) -> tuple[Array, Array]:
    mean = values_NG.mean(0)
    return mean, np.square(values_NG - mean).sum(0)
