"""How far a changed network is from the original, image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from normsurgeon.graph.skeleton import tensors_in


@dataclass(frozen=True)
class Answers:
    """A network's outputs for a batch; ``classes``: whether of a classifier; ``labels`` (N,) where they are known."""

    outputs: tuple[Tensor, ...]
    classes: bool
    labels: Tensor | None = None

    @classmethod
    def of(cls, output: Any, images: int, classes: bool | None = None, labels: Tensor | None = None) -> Answers:
        """A network's output; ``classes`` None: a classifier is what gives (N, K) with at least two columns first."""
        found = tuple(t.detach() for t in tensors_in(output) if t.numel() and t.is_floating_point())
        if classes is None:
            classes = bool(found) and found[0].ndim == 2 and found[0].shape[1] > 1 and len(found[0]) == images
        return cls(found, classes, labels if classes else None)


def damages(before: Answers, after: Answers, images: int) -> tuple[Tensor, Tensor | None]:
    """For each of N images: KL(before ‖ after) in nats, and what of the answer is lost (see ``Damage``).

    Of what is no classifier: the squared error of the outputs relative to the squared deviation of the original's from
    their mean over the batch, and None. Both are about quadratic in the change, so that small ones add up. Not finite
    where outputs are not, or have another shape. Float64, on the CPU.
    """
    if [t.shape for t in before.outputs] != [t.shape for t in after.outputs]:
        return torch.full((images,), math.inf, dtype=torch.float64), None
    if before.classes:
        a_NK, b_NK = (x.outputs[0].double().cpu() for x in (before, after))
        kl_N = F.kl_div(F.log_softmax(b_NK, 1), F.log_softmax(a_NK, 1), reduction="none", log_target=True).sum(1)
        kl_N = torch.where(b_NK.isfinite().all(1), kl_N.clamp_min(0), math.inf)
        theirs_N, ours_N = a_NK.argmax(1), b_NK.argmax(1)
        if before.labels is None:
            return kl_N, (theirs_N != ours_N).double()
        labels_N = before.labels.cpu()
        return kl_N, (theirs_N == labels_N).double() - (ours_N == labels_N).double()
    squares_N, whole = torch.zeros(images, dtype=torch.float64), 0.0
    for a, b in zip(before.outputs, after.outputs, strict=True):
        own = a.ndim > 0 and len(a) == images  # else an output of the batch as a whole
        a_NF, b_NF = (t.double().cpu().reshape(images if own else 1, -1) for t in (a, b))
        squares_N += (a_NF - b_NF).square().sum(1)
        whole += float((a_NF - a_NF.mean(0) if own and images > 1 else a_NF).square().sum()) / images
    return squares_N / max(whole, 1e-30), None


@dataclass
class Damage:
    """The damages of the images seen so far: ``update`` with a batch, ``compute`` their mean.

    values  of each image
    lost    of a classifier, for each image: 1 where its answer is lost, 0 where it is kept; with labels, 1 where a
            right answer became wrong, -1 where a wrong one became right
    """

    values: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    def update(self, damages_N: Tensor, lost_N: Tensor | None) -> None:
        """Add a batch."""
        self.values += damages_N.tolist()
        self.lost += lost_N.tolist() if lost_N is not None else []

    def merge(self, other: Damage) -> None:
        """Add the damages of other images."""
        self.values += other.values
        self.lost += other.lost

    @property
    def images(self) -> int:
        """How many images it has seen."""
        return len(self.values)

    @property
    def classes(self) -> bool:
        """Whether the network is a classifier."""
        return bool(self.lost)

    def compute(self) -> tuple[float, float]:
        """The mean, and its standard error (inf for fewer than two images)."""
        return mean_and_error(self.values)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, inf for fewer than two values.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    if not values:
        return math.nan, math.inf
    mean = sum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.inf
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
