"""Per-channel moments of a stream of feature maps, in one pass and in float64.

The state is a table of one row a channel; its columns are named below. Chunks of images are reduced to such a table
and tables are merged by the update formulas of Chan, Golub & LeVeque (1979) and Pébay (Sandia report SAND2008-6212),
so that any batch size, any order and any number of processes give the same answer up to rounding.

Values that are not finite are counted and left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normsurgeon.inference import fused
from normsurgeon.norms.layers import wide

Table: TypeAlias = NDArray[np.float64]

COUNT, MEAN, M2, M3, M4, ABS, ZEROS, LOW, HIGH, NAN, INF, IMAGES, IMAGE_MEAN, IMAGE_M2, WITHIN = range(15)
"""Columns: number of finite values; their mean; sums of the 2nd to 4th powers of deviations from it; Σ|x|; number of
zeros; least and greatest; number of nan and of inf; images with a finite value; mean of the images' means, and sum of
squared deviations from it; sum over images of the variance within the image."""
COLUMNS = 15

Picks: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]

NO_PICKS: Picks = (np.empty(0, np.int64), np.empty(0, np.int64))

CHUNK = 2**22
"""Values that the torch path turns over at a time: bounds its temporaries."""


def empty(channels: int) -> Table:
    """The table of nothing, for ``channels`` channels: merging it in changes nothing."""
    table = np.zeros((channels, COLUMNS))
    table[:, LOW], table[:, HIGH] = np.inf, -np.inf
    return table


@dataclass(frozen=True)
class Seen:
    """What one update saw: each image's channel means and variances, (N, C) float64, and the vectors picked out."""

    means_NC: NDArray[np.float64]
    variances_NC: NDArray[np.float64]
    picked_MC: NDArray[np.float32]


def update(table: Table, x_NCP: Tensor, picks: Picks = NO_PICKS) -> Seen:
    """Take features in, ``table`` changed in place.

    x_NCP  N images, C channels, P positions, of any floating dtype, on any device
    picks  numbers of images, ascending, and of positions in them: the features there come back as they are

    >>> table = empty(1)
    >>> means = update(table, torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])).means_NC
    >>> means.tolist(), table[0, MEAN].item(), table[0, M2].item()
    ([[2.0], [5.0]], 3.5, 17.5)
    """
    x_NCP = wide(x_NCP.detach())
    if x_NCP.device.type == "cpu" and x_NCP.dtype == torch.float32 and fused.available():
        return Seen(*fused.update(table, x_NCP.contiguous().numpy(), *picks))
    images = max(1, CHUNK // max(1, x_NCP[0].numel())) if len(x_NCP) else 1
    rows = [_update(table, chunk) for chunk in x_NCP.split(images)]
    at = [torch.from_numpy(numbers).to(x_NCP.device) for numbers in picks]
    picked = x_NCP[at[0], :, at[1]].float().cpu().numpy()
    return Seen(np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows]), picked)


def merge(table: Table, other: Table) -> None:
    """Take another table's counts in, in place: ``table`` becomes that of both streams together.

    >>> a, b, both = empty(1), empty(1), empty(1)
    >>> x = torch.arange(12.0).view(4, 1, 3)
    >>> _ = update(a, x[:1]), update(b, x[1:]), update(both, x)
    >>> merge(a, b)
    >>> bool(np.allclose(a, both))
    True
    """
    n, m = table[:, COUNT], other[:, COUNT]
    total = np.maximum(n + m, 1)
    delta = other[:, MEAN] - table[:, MEAN]
    m2a, m2b, m3a, m3b = table[:, M2], other[:, M2], table[:, M3], other[:, M3]
    both = np.empty_like(table)
    both[:, M4] = (
        table[:, M4]
        + other[:, M4]
        + delta**4 * n * m * (n * n - n * m + m * m) / total**3
        + 6 * delta**2 * (n * n * m2b + m * m * m2a) / total**2
        + 4 * delta * (n * m3b - m * m3a) / total
    )
    both[:, M3] = m3a + m3b + delta**3 * n * m * (n - m) / total**2 + 3 * delta * (n * m2b - m * m2a) / total
    both[:, M2] = m2a + m2b + delta**2 * n * m / total
    both[:, MEAN] = table[:, MEAN] + delta * m / total
    images = (IMAGES, IMAGE_MEAN, IMAGE_M2)
    both[:, IMAGE_MEAN], both[:, IMAGE_M2] = chan(*table[:, images].T, *other[:, images].T)
    for column in (COUNT, ABS, ZEROS, NAN, INF, IMAGES, WITHIN):
        both[:, column] = table[:, column] + other[:, column]
    both[:, LOW] = np.minimum(table[:, LOW], other[:, LOW])
    both[:, HIGH] = np.maximum(table[:, HIGH], other[:, HIGH])
    table[:] = both


def chan(n: Any, mean: Any, m2: Any, other_n: Any, other_mean: Any, other_m2: Any) -> tuple[Any, Any]:
    """Mean, and sum of squared deviations from it, of two parts together, from their sizes, means and sums.

    >>> [float(value) for value in chan(2, 1.5, 0.5, 1, 6.0, 0.0)]
    [3.0, 14.0]
    """
    total, apart = np.maximum(n + other_n, 1), other_mean - mean
    return mean + apart * other_n / total, m2 + other_m2 + np.square(apart) * n * other_n / total


def pooled(table: Table) -> Table:
    """All channels together, as a table of one row; the image columns are left at 0.

    >>> table = empty(2)
    >>> _ = update(table, torch.tensor([[[1.0], [3.0]]]))
    >>> pooled(table)[0, [COUNT, MEAN, M2]].tolist()
    [2.0, 2.0, 2.0]
    """
    result = empty(1)
    row = result[0]
    counts = table[:, COUNT]
    row[COUNT] = counts.sum()
    if row[COUNT]:
        row[MEAN] = counts @ table[:, MEAN] / row[COUNT]
        means, m2, m3, m4 = table[:, [MEAN, M2, M3, M4]].T
        row[M2], row[M3], row[M4] = _about(row[MEAN], counts, means, m2, m3, m4, axis=None)
    for column in (ABS, ZEROS, NAN, INF):
        row[column] = table[:, column].sum()
    row[LOW], row[HIGH] = table[:, LOW].min(initial=np.inf), table[:, HIGH].max(initial=-np.inf)
    return result


def _about(mean: Any, counts: Any, means: Any, m2: Any, m3: Any, m4: Any, axis: int | None) -> tuple[Any, Any, Any]:
    """Sums of powers of deviations from ``mean``, of parts whose own are given (Pébay, eqs. 2.1 to 2.9)."""
    d = means - mean
    second = (m2 + counts * d**2).sum(axis)
    third = (m3 + 3 * d * m2 + counts * d**3).sum(axis)
    fourth = (m4 + 4 * d * m3 + 6 * d**2 * m2 + counts * d**4).sum(axis)
    return second, third, fourth


def _update(table: Table, x_NCP: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The torch path: any device and dtype; a few temporaries of the chunk's size."""
    finite = x_NCP.isfinite()
    whole = bool(finite.all())
    nan_C = inf_C = torch.zeros(x_NCP.shape[1])
    if not whole:
        nan_C, inf_C = x_NCP.isnan().sum((0, 2)), x_NCP.isinf().sum((0, 2))
    x = x_NCP if whole else torch.where(finite, x_NCP, 0)
    # float64 on the CPU; where that would be slow (accelerators), deviations in float32 and their sums in float64.
    x = x.double() if x.device.type == "cpu" else x.float()
    counts_NC = torch.full(x.shape[:2], x.shape[2], device=x.device) if whole else finite.sum(2)
    counts_NC = counts_NC.double() if x.device.type != "mps" else counts_NC.float()
    wide = counts_NC.dtype
    somewhere = counts_NC.clamp_min(1)
    mean_NC = x.sum(2, dtype=wide) / somewhere
    d = x - mean_NC.to(x.dtype)[:, :, None]
    if not whole:
        d.mul_(finite)
    # What the rounding of the mean in float32 left over, put right at once.
    left_NC = d.sum(2, dtype=wide) / somewhere
    mean_NC = mean_NC.to(x.dtype).to(wide) + left_NC
    q = d * d
    s2, s3, s4 = q.sum(2, dtype=wide), (q * d).sum(2, dtype=wide), q.mul_(q).sum(2, dtype=wide)
    m2 = s2 - counts_NC * left_NC**2
    m3 = s3 - 3 * left_NC * s2 + 2 * counts_NC * left_NC**3
    m4 = s4 - 4 * left_NC * s3 + 6 * left_NC**2 * s2 - 3 * counts_NC * left_NC**4
    low_C = torch.where(finite, x, torch.inf).amin((0, 2)) if not whole else x.amin((0, 2))
    high_C = torch.where(finite, x, -torch.inf).amax((0, 2)) if not whole else x.amax((0, 2))
    zeros_C = ((x == 0) & finite).sum((0, 2))
    abs_C = x.abs().sum((0, 2), dtype=wide)

    def host(tensor: Tensor) -> NDArray[np.float64]:
        return tensor.cpu().double().numpy()

    counts, means, m2, m3, m4 = map(host, (counts_NC, mean_NC, m2, m3, m4))  # type: ignore[assignment]
    batch = empty(table.shape[0])
    batch[:, COUNT] = counts.sum(0)
    batch[:, MEAN] = (counts * means).sum(0) / np.maximum(batch[:, COUNT], 1)
    batch[:, M2], batch[:, M3], batch[:, M4] = _about(batch[:, MEAN], counts, means, m2, m3, m4, axis=0)
    for column, values in ((ABS, abs_C), (ZEROS, zeros_C), (LOW, low_C), (HIGH, high_C), (NAN, nan_C), (INF, inf_C)):
        batch[:, column] = host(values)
    seen = counts > 0
    batch[:, IMAGES] = seen.sum(0)
    some = np.maximum(batch[:, IMAGES], 1)
    batch[:, IMAGE_MEAN] = (means * seen).sum(0) / some
    batch[:, IMAGE_M2] = (seen * (means - batch[:, IMAGE_MEAN]) ** 2).sum(0)
    variances = np.asarray(m2) / np.maximum(counts, 1)
    batch[:, WITHIN] = variances.sum(0)
    merge(table, batch)
    return means, variances
