"""How nearly two classifiers give the same answers, summed up batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass
class Agreement:
    """Sums over images: how often two sets of logits put the same class first, and KL(reference ‖ model) in nats.

    Logits that are not finite agree with nothing, and make the KL nan.

    >>> import torch
    >>> sums = Agreement()
    >>> sums.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]]))
    >>> sums.compute()[0]
    0.5
    """

    images: int = 0
    same: int = 0
    kl: float = 0.0

    def update(self, logits_NK: Tensor, reference_NK: Tensor) -> None:
        """Add a batch."""
        logits_NK, reference_NK = logits_NK.double().cpu(), reference_NK.double().cpu()
        both = (logits_NK.isfinite() & reference_NK.isfinite()).all(dim=1)
        same = (logits_NK.argmax(dim=1) == reference_NK.argmax(dim=1)) & both
        ours, theirs = F.log_softmax(logits_NK, dim=1), F.log_softmax(reference_NK, dim=1)
        kl = F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        self.images += len(logits_NK)
        self.same += int(same.sum())
        self.kl += kl if both.all() else math.nan

    def merge(self, other: Agreement) -> None:
        """Add another process's sums."""
        self.images, self.same, self.kl = self.images + other.images, self.same + other.same, self.kl + other.kl

    def compute(self) -> tuple[float | None, float | None]:
        """The share of images with the same answer, and the mean KL; None without images."""
        if not self.images:
            return None, None
        return self.same / self.images, max(self.kl / self.images, 0.0)  # rounding can take it below zero; nan stays
