"""What is differentiated: the cross-entropy of a classifier over a data set, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from normsurgeon._util.checks import check_at_least
from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon.data.batches import unpacked
from normsurgeon.data.labels import check_labels
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.run import classifier_logits, home_of, name_of
from normsurgeon.norms.layers import wide

Loss = Literal["auto", "labels", "prediction"]
Batches = Callable[[], Iterable[Any]] | Iterable[Any]


class Objective:
    """The mean cross-entropy over all images, with the data's labels or with the network's own answers.

    batches      ``(images (N, C, H, W), labels (N,) or None)``: something that can be iterated again and again, or a
                 function that returns an iterable; every method makes one pass
    loss         ``labels``, ``prediction`` (the class that the unchanged network puts first), or ``auto``: labels
                 where the data has them
    max_batches  only the first ones
    on_progress  called with a Progress after each batch: the method and how many images it has seen

    ``kind`` is ``labels`` or ``prediction`` as soon as the first batch is there; ``images`` counts the last pass.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss = "auto",
        max_batches: int | None = None,
        on_progress: OnProgress | None = None,
    ):
        if loss not in get_args(Loss):
            raise UsageError(f"loss={loss!r} is unknown; choose one of: {', '.join(get_args(Loss))}")
        check_at_least(1, max_batches=max_batches)
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
            images, labels = unpacked(batch)
            if not isinstance(images, Tensor):
                raise UsageError("sensitivity takes batches of tensors: (images (N, C, H, W), labels (N,) or None)")
            if not len(images):
                continue
            self._settle(labels)
            images = _usable(images.to(device, dtype if images.is_floating_point() else None))
            yield images, _usable(labels.to(device).long()) if labels is not None and self.kind == "labels" else None
            self.images += len(images)
            if self._on_progress is not None:
                self._on_progress(Progress(method, self.images))
        if not self.images:
            raise DataError(f"there are no images to measure {method} on; the batches are empty")

    def forward(self, images: Tensor, labels_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The unchanged network's logits (N, K), the classes (N,) that the loss is taken with, and its sum (nats).

        :raises DataError: labels that the network cannot have, or a loss that is not finite: no measure of it would
            mean anything.
        """
        logits_NK = classifier_logits(self.model, images)
        if labels_N is None:
            labels_N = logits_NK.detach().argmax(dim=1)
        else:
            count, classes = logits_NK.shape
            check_labels(labels_N, count, classes, ", or loss='prediction'")
        total = cross_entropies(logits_NK, labels_N).sum()
        if not bool(total.isfinite()):
            raise DataError(
                f"the loss of {name_of(self.model)} is {total.item()} on images {self.images} to "
                f"{self.images + len(logits_NK) - 1}; try the statistics, which find the layer where it begins"
            )
        return logits_NK, labels_N, total

    def _settle(self, labels: Tensor | None) -> None:
        if not self.kind:
            self.kind = "prediction" if labels is None else "labels"
        if self.kind == "labels" and labels is None:
            raise DataError(
                "there are images without labels; try loss='prediction', or data that is labelled throughout"
            )


def cross_entropies(logits_NK: Tensor, targets_N: Tensor) -> Tensor:
    """Each image's cross-entropy in nats, (N,), never in less than single precision.

    >>> import torch
    >>> cross_entropies(torch.zeros(1, 4), torch.tensor([2])).exp().item()
    4.0
    """
    return F.cross_entropy(wide(logits_NK), targets_N, reduction="none")


def _usable(tensor: Tensor) -> Tensor:
    # A tensor made in inference mode cannot take part in a gradient.
    return tensor.clone() if tensor.is_inference() else tensor
