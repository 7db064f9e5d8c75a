"""The answers of a network and its baseline to the same images: how many are right, and which are other ones now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from normsurgeon.analysis.records import Answers, Flip, Guess
from normsurgeon.data.thumbnails import thumbnail
from normsurgeon.data.transforms import DataConfig

MOST = 12
"""Flipped images that are kept: those whose answers are farthest apart."""
GUESSES = 3


@dataclass
class AnswerCollector:
    """Sums over images; of those that the network answers otherwise than its baseline, the farthest.

    names   of the classes, where they are known
    config  how the images were scaled, where that is known
    """

    names: Sequence[str] | None = None
    config: DataConfig | None = None
    images: int = 0
    labelled: int = 0
    flipped: int = 0
    right: int = 0
    right_before: int = 0
    lost: int = 0
    gained: int = 0
    kl: float = 0.0
    flips: list[Flip] = field(default_factory=list)

    def update(
        self, first: int, images_NCHW: Tensor, logits_NK: Tensor, baseline_NK: Tensor, labels_N: Tensor | None
    ) -> None:
        """Add a batch whose first image has the number ``first``. Logits that are not finite agree with nothing."""
        ours_NK, theirs_NK = logits_NK.detach().double().cpu(), baseline_NK.detach().double().cpu()
        ours, theirs = F.log_softmax(ours_NK, 1), F.log_softmax(theirs_NK, 1)
        kl_N = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
        finite_N = (ours_NK.isfinite() & theirs_NK.isfinite()).all(1)
        kl_N = torch.where(finite_N, kl_N, math.nan)
        mine_N, before_N = ours_NK.argmax(1), theirs_NK.argmax(1)
        flipped_N = (mine_N != before_N) | ~finite_N
        self.images += len(ours_NK)
        self.flipped += int(flipped_N.sum())
        self.kl += float(kl_N.sum())
        if labels_N is not None and labels_N.shape == mine_N.shape and not labels_N.is_floating_point():
            labels_N = labels_N.cpu()
            right_N, right_before_N = mine_N == labels_N, before_N == labels_N
            self.labelled += len(labels_N)
            self.right += int(right_N.sum())
            self.right_before += int(right_before_N.sum())
            self.lost += int((right_before_N & ~right_N).sum())
            self.gained += int((right_N & ~right_before_N).sum())
        else:
            labels_N = None
        for i in (flipped_N & finite_N).nonzero().flatten().tolist():
            kl = max(float(kl_N[i]), 0.0)
            if len(self.flips) == MOST and kl <= self.flips[-1].kl:
                continue
            flip = Flip(
                image=first + i,
                kl=kl,
                before=self._guesses(theirs[i]),
                after=self._guesses(ours[i]),
                label=self._name(int(labels_N[i])) if labels_N is not None else None,
                picture=thumbnail(images_NCHW[i], self.config) if isinstance(images_NCHW, Tensor) else None,
            )
            self._keep([flip])

    def merge(self, other: AnswerCollector) -> None:
        """Add another process's sums."""
        for name in ("images", "labelled", "flipped", "right", "right_before", "lost", "gained", "kl"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._keep(other.flips)

    def compute(self) -> tuple[float | None, float | None, Answers | None]:
        """The share of images with the same answer, the mean KL(baseline ‖ network), the rest; None without images."""
        if not self.images:
            return None, None, None
        accuracy = self.right / self.labelled if self.labelled else None
        before = self.right_before / self.labelled if self.labelled else None
        agreement = 1 - self.flipped / self.images
        kl = max(self.kl / self.images, 0.0)  # rounding can take it below zero; nan stays
        return (
            agreement,
            kl,
            Answers(
                images=self.images,
                agreement_stderr=_stderr(agreement, self.images),
                accuracy=accuracy,
                accuracy_stderr=_stderr(accuracy, self.labelled),
                baseline_accuracy=before,
                baseline_accuracy_stderr=_stderr(before, self.labelled),
                lost=self.lost if self.labelled else None,
                gained=self.gained if self.labelled else None,
                flipped=self.flipped,
                flips=tuple(self.flips),
            ),
        )

    def _keep(self, flips: Sequence[Flip]) -> None:
        self.flips = sorted([*self.flips, *flips], key=lambda flip: (-flip.kl, flip.image))[:MOST]

    def _guesses(self, logs_K: Tensor) -> tuple[Guess, ...]:
        best = logs_K.topk(min(GUESSES, len(logs_K)))
        pairs = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        return tuple(Guess(self._name(number), share) for number, share in pairs)

    def _name(self, number: int) -> str:
        return self.names[number] if self.names and 0 <= number < len(self.names) else str(number)


def _stderr(share: float | None, images: int) -> float | None:
    """Of a share of independent images."""
    return None if share is None else math.sqrt(share * (1 - share) / images)
