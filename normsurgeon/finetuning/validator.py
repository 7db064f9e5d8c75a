"""Validation during training: ``normsurgeon.evaluate``, shared by the processes, with a teacher that runs once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.calls import Call
from normsurgeon.inference.evaluate import Evaluation, evaluate
from normsurgeon.inference.run import classifier_logits

Validator = Callable[[nn.Module], Evaluation]


class CachedTeacher(nn.Module):
    """A teacher whose logits for the same batches, in the same order, are computed once."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.logits: list[Tensor] = []
        self.place = 0
        self.complete = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The teacher's logits."""
        if not self.complete:
            images: Any = Call(args, kwargs)
            self.logits.append(classifier_logits(self.teacher, images).cpu())
            return self.logits[-1]
        self.place += 1
        return self.logits[self.place - 1]

    def rewind(self) -> None:
        """Start at the first batch again."""
        self.complete, self.place = bool(self.logits), 0


def validator_on(
    data: Any, teacher: nn.Module | None, device: torch.device, batch_size: int, workers: int
) -> Validator:
    """Evaluation on validation data; several processes share it, and each of them must call it."""
    cached = CachedTeacher(teacher) if teacher is not None else None

    def validate(model: nn.Module) -> Evaluation:
        found = evaluate(model, data, baseline=cached, batch_size=batch_size, device=device, workers=workers)
        if cached is not None:
            cached.rewind()
        return found

    return validate


def better(now: Evaluation, best: dict[str, Any] | None) -> bool:
    """Whether an evaluation beats the best so far: by top-1, then loss; without labels by the KL from the teacher."""
    return best is None or _rank(now.to_dict()) > _rank(best)


def _rank(values: dict[str, Any]) -> tuple[float, float]:
    def least(name: str) -> float:
        return -math.inf if values.get(name) is None else -values[name]

    if values.get("top1") is not None:
        return values["top1"], least("loss")
    return least("kl"), least("loss")
