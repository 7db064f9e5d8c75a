"""Pre-processing that takes out what pixels tell of each other, learned from the training images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from normsurgeon.errors import UsageError
from normsurgeon.study.pointwise import SMALLEST, Preprocessing, along


@dataclass(frozen=True, eq=False)
class LinearPrediction(Preprocessing):
    """y[i, j] = (x[i, j] - b - Σ_k a_k x[(i, j) + k]) / s: what a linear predictor leaves over, of each channel.

    k runs over the non-symmetric half-plane of the 12 pixels that come before (i, j) in the order of reading and lie
    at most 2 rows and columns away: the causal support of 2-D linear prediction and DPCM (Jain, Fundamentals of
    Digital Image Processing, 1989, chapters 6 and 11; Lim, Two-Dimensional Signal and Image Processing, 1990,
    chapters 5 and 6). a and b solve the normal equations of least squares, AᵀA c = Aᵀx, over all pixels of the
    training images; beyond its border an image goes on with its outermost pixels. s is the standard deviation of the
    residual over the training images, which has the mean 0 and is uncorrelated with the 12 neighbours there.

    coefficients_CK  a, in the order of ``NEIGHBOURS``
    bias_C, std_C    b and s
    """

    coefficients_CK: Tensor
    bias_C: Tensor
    std_C: Tensor
    name = "linear-prediction"
    REACH: ClassVar[int] = 2
    NEIGHBOURS: ClassVar[tuple[tuple[int, int], ...]] = tuple(
        (row, column) for row in (-2, -1, 0) for column in (-2, -1, 0, 1, 2) if (row, column) < (0, 0)
    )

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> LinearPrediction:
        """The coefficients of each channel, from the sums AᵀA of the normal equations."""
        gram_CKK = torch.zeros(())  # of (neighbours, 1, the pixel itself)
        for x in batches:
            columns = torch.stack([*cls._neighbours(x), torch.ones_like(x), x], dim=-1)  # N, C, H, W, K + 2
            a_CPK = columns.transpose(0, 1).flatten(1, 3)
            gram_CKK = gram_CKK + a_CPK.mT @ a_CPK
        normal, right, energy = gram_CKK[:, :-1, :-1], gram_CKK[:, :-1, -1:], gram_CKK[:, -1, -1]
        # Neighbours that are all alike (a black border) leave directions open: the pseudo-inverse puts them to 0.
        solved_CK = (torch.linalg.pinv(normal, hermitian=True, rtol=1e-12) @ right)[..., 0]
        left_over = energy - (solved_CK * right[..., 0]).sum(1)
        std_C = (left_over / normal[:, -1, -1]).clamp(min=0).sqrt()
        return cls(solved_CK[:, :-1], solved_CK[:, -1], torch.where(std_C > SMALLEST, std_C, 1))

    @classmethod
    def _neighbours(cls, x_NCHW: Tensor) -> list[Tensor]:
        reach, (height, width) = cls.REACH, x_NCHW.shape[2:]
        padded = F.pad(x_NCHW, (reach, reach, reach, 0), mode="replicate")
        return [
            padded[:, :, reach + row : reach + row + height, reach + column : reach + column + width]
            for row, column in cls.NEIGHBOURS
        ]

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The residual, of variance 1 over the training images."""
        predicted = along(self.bias_C, x_NCHW)
        for number, neighbour in enumerate(self._neighbours(x_NCHW)):
            predicted = predicted + along(self.coefficients_CK[:, number], x_NCHW) * neighbour
        return (x_NCHW - predicted) / along(self.std_C, x_NCHW)

    def describe(self) -> str:
        """What it does."""
        stds = ", ".join(f"{float(s):.4g}" for s in self.std_C)
        return f"what 12 earlier neighbours do not predict, by least squares (residual's training std {stds})"


@dataclass(frozen=True, eq=False)
class Zca(Preprocessing):
    """y = W (x - mean), W = U (Λ + ε I)^(-1/2) Uᵀ, of images as vectors of all their D = C·H·W values.

    U and Λ are the eigenvectors and eigenvalues of the training images' covariance: of all linear maps that whiten,
    the one that stays closest to the image (Bell & Sejnowski, The independent components of natural scenes are edge
    filters, 1997; Krizhevsky, Learning multiple layers of features from tiny images, 2009, appendix A). ε keeps
    directions without variance from being blown up: where Λ ≫ ε, the covariance of y is the identity.

    mean_D, whitening_DD  in float32
    eps                   ε, for pixels of 0 to 1
    """

    mean_D: Tensor
    whitening_DD: Tensor
    eps: float
    name = "zca"
    MOST_VALUES: ClassVar[int] = 3 * 32 * 32

    @classmethod
    def fit(cls, batches: Iterable[Tensor], eps: float = 1e-2) -> Zca:
        """The mean and the whitening matrix, from the sums of x and of x xᵀ in one pass.

        :raises UsageError: images of more than 3·32·32 values: W would have the square of that.
        """
        count, mean, scatter = 0, torch.zeros(()), torch.zeros(())
        for x in batches:
            cls.check_size(tuple(x.shape[1:]))
            x_ND = x.flatten(1)
            mean_D, more = x_ND.mean(0), len(x_ND)
            delta, total = mean_D - mean, count + more
            centred_ND = x_ND - mean_D
            scatter = scatter + centred_ND.mT @ centred_ND + torch.outer(delta, delta) * (count * more / total)
            mean, count = mean + delta * (more / total), total
        values, vectors = torch.linalg.eigh(scatter / count)
        whitening = (vectors * (values.clamp(min=0) + eps).rsqrt()) @ vectors.mT
        return cls(mean.float(), whitening.float(), eps)

    @classmethod
    def check_size(cls, shape: tuple[int, ...]) -> None:
        """Whether images of that shape, (C, H, W), can be whitened.

        :raises UsageError: when they have too many values.
        """
        values = math.prod(shape)
        if values > cls.MOST_VALUES:
            raise UsageError(
                f"zca takes images of at most {cls.MOST_VALUES} values, and {'×'.join(map(str, shape))} has {values}; "
                f"try image_size: {int((cls.MOST_VALUES / shape[0]) ** 0.5)}, or linear-prediction"
            )

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Whitened images."""
        centred_ND = x_NCHW.flatten(1) - self.mean_D.to(x_NCHW)
        return (centred_ND @ self.whitening_DD.to(x_NCHW)).reshape(x_NCHW.shape)

    def describe(self) -> str:
        """What it does."""
        return f"ZCA whitening of {len(self.mean_D)} values an image, eps {self.eps:g}"
