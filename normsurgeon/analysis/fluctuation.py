"""How far the statistics that a per-sample norm divides by vary from image to image: what such a norm will do there.

A batch norm divides by a constant, a group norm by what it finds in each image. Where that hardly varies, the two do
the same; the coefficient of variation says how nearly. Both figures come from the channels' means and variances in
each image, which the statistics hold already.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from normsurgeon.inference import moments
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
    """One site's groups over the images: moments of their standard deviation, of their mean, and of their variance."""

    def __init__(self, view: GroupView):
        self.view = view
        self.table = moments.empty(3 * view.groups)

    def update(self, means_NC: Array, variances_NC: Array) -> None:
        """The channels' means and (population) variances in each of N images."""
        view = self.view
        means = (means_NC - view.mean_C) / view.std_C
        seconds = variances_NC / np.square(view.std_C) + np.square(means)
        images, channels = means.shape
        if not images or channels % view.groups:
            return
        mean = means.reshape(images, view.groups, -1).mean(2)
        second = seconds.reshape(images, view.groups, -1).mean(2)
        variance = np.maximum(second - np.square(mean) if view.centred else second, 0.0)
        values = np.concatenate([np.sqrt(variance), mean, variance], 1)
        moments.update(self.table, torch.from_numpy(values)[:, :, None])

    def merge(self, other: Fluctuation) -> None:
        """Add another part of the stream."""
        moments.merge(self.table, other.table)

    def compute(self) -> tuple[float | None, float | None]:
        """Mean over groups of: the std's coefficient of variation; the mean's deviation over the root mean variance."""
        std, mean, variance = self.table.reshape(3, self.view.groups, -1)
        alive = (std[:, moments.COUNT] > 1) & (variance[:, moments.MEAN] > 0)
        if not alive.any():
            return None, None
        std, mean, variance = std[alive], mean[alive], variance[alive]
        spread, shift = (np.sqrt(each[:, moments.M2] / each[:, moments.COUNT]) for each in (std, mean))
        of_std, of_mean = spread / std[:, moments.MEAN], shift / np.sqrt(variance[:, moments.MEAN])
        return float(of_std.mean()), float(of_mean.mean())
