"""What is differentiated: the cross-entropy of a classifier over a data set, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon.calls import on
from normsurgeon.data.labels import check_labels
from normsurgeon.errors import DataError
from normsurgeon.inference.run import classifier_logits, home_of, name_of
from normsurgeon.norms.layers import wide

Batches = Sequence[tuple[Tensor, Tensor | None]]
"""Images (N, C, H, W), pre-processed, and their labels (N,) or None; at least one of each batch."""


class Objective:
    """The mean cross-entropy over all images, with the data's labels or else with the network's own answers.

    ``kind`` says which: ``labels`` or ``prediction``. ``images`` counts the last pass; ``loss`` is the unchanged
    network's, after ``effects``.

    :raises DataError: labels in some batches only.
    """

    def __init__(self, model: nn.Module, batches: Batches, on_progress: OnProgress | None = None):
        labelled = {labels is not None for _, labels in batches}
        if len(labelled) > 1:
            raise DataError("there are images without labels; try data that is labelled throughout")
        self.model, self.batches, self.on_progress = model, batches, on_progress
        self.kind = "labels" if True in labelled else "prediction"
        self.images, self.loss = 0, 0.0

    def run(self, method: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One pass: images where the model is, and their labels; a Progress after each batch."""
        device, dtype = home_of(self.model)
        self.images = 0
        for images, labels in self.batches:
            yield _usable(on(images, device, dtype)), None if labels is None else _usable(labels.to(device).long())
            self.images += len(images)
            if self.on_progress is not None:
                self.on_progress(Progress(method, self.images))

    def forward(self, images: Tensor, labels_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The unchanged network's logits (N, K), the classes (N,) that the loss is taken with, and its sum (nats).

        :raises DataError: labels that the network cannot have, or a loss that is not finite: no measure of it would
            mean anything.
        """
        logits_NK = classifier_logits(self.model, images)
        if labels_N is None:
            labels_N = logits_NK.detach().argmax(dim=1)
        else:
            check_labels(labels_N, *logits_NK.shape)
        total = cross_entropies(logits_NK, labels_N).sum()
        if not bool(total.isfinite()):
            raise DataError(
                f"the loss of {name_of(self.model)} is {total.item()} on images {self.images} to "
                f"{self.images + len(logits_NK) - 1}; try the statistics, which find the layer where it begins"
            )
        return logits_NK, labels_N, total

    def effects(self, method: str, changes: Sequence[Callable[[], AbstractContextManager[None]]]) -> Tensor:
        """What each of several changes of the network does, (changes, 2) in float64, from one pass.

        The mean loss minus the unchanged network's, and the mean KL(unchanged ‖ changed) of the softmaxes, in nats.
        """
        sums, loss = torch.zeros(len(changes), 2, dtype=torch.float64), 0.0
        with torch.no_grad():
            for images, labels in self.run(method):
                logits_NK, targets_N, _ = self.forward(images, labels)
                before = logits_NK.double().log_softmax(1)
                unchanged = cross_entropies(before, targets_N).sum().item()
                loss += unchanged
                for row, change in zip(sums, changes, strict=True):
                    with change():
                        after = classifier_logits(self.model, images).double().log_softmax(1)
                    row[0] += cross_entropies(after, targets_N).sum().item() - unchanged
                    row[1] += F.kl_div(after, before, reduction="sum", log_target=True).item()
        self.loss = loss / self.images
        return sums / self.images


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
