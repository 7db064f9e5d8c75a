"""Judging the network during training: ``normsurgeon.evaluate``, shared by the processes, the teacher run once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from normsurgeon.errors import DataError
from normsurgeon.evaluation import Evaluation, evaluate
from normsurgeon.inference import classifier_logits
from normsurgeon.training.feeding import part_of


class Remembered(nn.Module):
    """A teacher whose logits for the same batches, in the same order, are computed once."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.logits: list[Tensor] = []
        self.place = 0
        self.complete = False

    def forward(self, images: Tensor) -> Tensor:
        """The teacher's logits."""
        if not self.complete:
            self.logits.append(classifier_logits(self.teacher, images).cpu())
            return self.logits[-1]
        self.place += 1
        return self.logits[self.place - 1]

    def rewind(self) -> None:
        """Begin with the first batch again."""
        self.complete, self.place = bool(self.logits), 0


class Judge:
    """Evaluates on validation data, each process on its part."""

    def __init__(
        self,
        data: Any,
        teacher: nn.Module | None,
        device: torch.device,
        batch_size: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.data = part_of(data, rank, world)
        self.teacher = Remembered(teacher) if teacher is not None else None
        self.device, self.batch_size, self.workers, self.world = device, batch_size, workers, world

    def __call__(self, model: nn.Module) -> Evaluation:
        """How well the model does."""
        found: Evaluation | None = None
        try:
            found = evaluate(
                model,
                self.data,
                baseline=self.teacher,
                batch_size=self.batch_size,
                device=self.device,
                workers=self.workers,
            )
        except DataError:
            if self.world == 1:
                raise
        if self.teacher is not None:
            self.teacher.rewind()
        if self.world == 1:
            assert found is not None
            return found
        parts = [part for part in gather_object([found]) if part is not None]
        if not parts:
            raise DataError("there are no images to validate on; try another split")
        return merged(parts)


def merged(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of what several processes evaluated."""
    images = sum(part.images for part in parts)

    def mean(name: str) -> float | None:
        values = [(getattr(part, name), part.images) for part in parts]
        if any(value is None for value, _ in values):
            return None
        return sum(value * count for value, count in values) / images

    top1 = mean("top1")
    return Evaluation(
        model=parts[0].model,
        images=images,
        images_per_second=sum(part.images_per_second for part in parts),
        skipped=sum(part.skipped for part in parts),
        top1=top1,
        top5=mean("top5"),
        loss=mean("loss"),
        agreement=mean("agreement"),
        kl=mean("kl"),
        top1_stderr=None if top1 is None else math.sqrt(top1 * (1 - top1) / images),
        nonfinite=sum(part.nonfinite for part in parts),
        skipped_files=tuple(name for part in parts for name in part.skipped_files),
    )


def better(now: Evaluation, best: dict[str, Any] | None) -> bool:
    """Whether an evaluation beats the best so far: by top-1, then loss; without labels by the KL from the teacher."""
    return best is None or _rank(now.to_dict()) > _rank(best)


def _rank(values: dict[str, Any]) -> tuple[float, float]:
    def least(name: str) -> float:
        return -math.inf if values.get(name) is None else -values[name]

    if values.get("top1") is not None:
        return values["top1"], least("loss")
    return least("kl"), least("loss")
