"""What is differentiated: the cross-entropy of a classifier over a data set, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.run import home_of, name_of

Loss = Literal["auto", "labels", "prediction"]
Batches = Callable[[], Iterable[Any]] | Iterable[Any]
Progress = Callable[[str, int], None]


class Objective:
    """The mean cross-entropy over all images, with the data's labels or with the network's own answers.

    batches      ``(images (N, C, H, W), labels (N,) or None)``: something that can be iterated again and again, or a
                 function that returns an iterable; every method makes one pass
    loss         ``labels``, ``prediction`` (the class that the unchanged network puts first), or ``auto``: labels
                 where the data has them
    max_batches  only the first ones
    on_progress  is told, after every batch, the method's name and how many images it has seen

    ``kind`` is ``labels`` or ``prediction`` as soon as the first batch is there; ``images`` counts the last pass.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss = "auto",
        max_batches: int | None = None,
        on_progress: Progress | None = None,
    ):
        if loss not in get_args(Loss):
            raise UsageError(f"loss={loss!r} is unknown; choose one of: {', '.join(get_args(Loss))}")
        if max_batches is not None and max_batches < 1:
            raise UsageError(f"max_batches={max_batches} must be at least 1, or None for all batches")
        if isinstance(batches, Iterator):
            raise UsageError(
                "the batches can be iterated only once; give a list, a loader, or a function that opens one"
            )
        self.model = model
        self.kind = "" if loss == "auto" else loss
        self.images = 0
        self._batches = batches
        self._max_batches = max_batches
        self._on_progress = on_progress

    def run(self, method: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One pass: images where the model is, and their labels (None where its own answers are to be used).

        :raises DataError: no images, or labels in some batches only.
        :raises UsageError: batches that are no batches, or no labels where they were asked for.
        """
        device, dtype = home_of(self.model)
        self.images = 0
        for batch in islice(self._batches() if callable(self._batches) else self._batches, self._max_batches):
            images, labels = _parts(batch)
            if not len(images):
                continue
            self._settle(labels)
            images = _usable(images.to(device, dtype if images.is_floating_point() else None))
            yield images, _usable(labels.to(device).long()) if labels is not None and self.kind == "labels" else None
            self.images += len(images)
            if self._on_progress is not None:
                self._on_progress(method, self.images)
        if not self.images:
            raise DataError(f"there are no images to measure {method} on; the batches are empty")

    def targets(self, logits_NK: Tensor, labels_N: Tensor | None) -> Tensor:
        """The classes (N,) that the loss is taken with; ``logits_NK`` are the unchanged network's.

        :raises DataError: labels that the network cannot have.
        """
        images, classes = logits_NK.shape
        if labels_N is None:
            return logits_NK.detach().argmax(dim=1)
        if labels_N.shape != (images,):
            raise DataError(
                f"labels of shape {tuple(labels_N.shape)} for {images} images; give one class number an image"
            )
        wrong = labels_N[(labels_N < 0) | (labels_N >= classes)].tolist()
        if wrong:
            raise DataError(
                f"there is a label {wrong[0]}, and the network's {classes} classes are 0 to {classes - 1}; "
                "try the data set that the network was made for, or loss='prediction'"
            )
        return labels_N

    def loss_sum(self, logits_NK: Tensor, targets_N: Tensor) -> Tensor:
        """The unchanged network's loss, summed over the images (nats).

        :raises DataError: a loss that is not finite: no measure of it would mean anything.
        """
        total = cross_entropies(logits_NK, targets_N).sum()
        if not bool(total.isfinite()):
            raise DataError(
                f"the loss of {name_of(self.model)} is {total.item()} on images {self.images} to "
                f"{self.images + len(logits_NK) - 1}; try the statistics, which find the layer where it begins"
            )
        return total

    def _settle(self, labels: Tensor | None) -> None:
        if not self.kind:
            self.kind = "prediction" if labels is None else "labels"
        if self.kind == "labels" and labels is None:
            raise DataError(
                "there are images without labels; try loss='prediction', or data that is labelled throughout"
            )


def cross_entropies(logits_NK: Tensor, targets_N: Tensor) -> Tensor:
    """Each image's cross-entropy in nats, (N,), never in less than single precision.

    >>> cross_entropies(torch.zeros(1, 4), torch.tensor([2])).exp().item()
    4.0
    """
    narrow = logits_NK.dtype in (torch.float16, torch.bfloat16)
    return F.cross_entropy(logits_NK.float() if narrow else logits_NK, targets_N, reduction="none")


def _usable(tensor: Tensor) -> Tensor:
    # A tensor made in inference mode cannot take part in a gradient.
    return tensor.clone() if tensor.is_inference() else tensor


def _parts(batch: Any) -> tuple[Tensor, Tensor | None]:
    images, labels = (*batch, None)[:2] if isinstance(batch, (tuple, list)) else (batch, None)
    if not isinstance(images, Tensor) or images.ndim < 2 or not (labels is None or isinstance(labels, Tensor)):
        raise UsageError(
            f"a batch is {type(batch).__name__} of {type(images).__name__} and {type(labels).__name__}; "
            "give batches of tensors (images (N, C, H, W), labels (N,) or None)"
        )
    return images, labels
