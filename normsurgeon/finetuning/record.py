"""What a run of fine-tuning did: the entry of a network's history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.finetuning.curves import Curves
from normsurgeon.inference.evaluate import Evaluation

MAX_SAVED_ROWS = 100
"""Rows of updates that a checkpoint carries; the run's folder has all of them."""


@dataclass(frozen=True)
class FinetuneRecord:
    """What ``finetune`` did.

    steps     updates done; ``images`` seen in them, ``seconds`` spent, over all the times it was resumed
    data      name of the training images
    before    the network on the validation images before it was trained; None without them
    after     the network that the run gives
    best      of the best network: ``step``, ``epoch`` and what was measured; None without validation images, and with
              ``keep="last"``
    curves    losses, learning rate and validations
    skipped   names of the training images that could not be read
    path      the file that holds the network, or None
    stopped   the signal that came too late to stop the run, with its last update; else None
    """

    steps: int
    images: int
    seconds: float
    data: str
    config: FinetuneConfig = field(repr=False)
    before: Evaluation | None
    after: Evaluation | None
    best: dict[str, Any] | None
    curves: Curves = field(repr=False)
    skipped: tuple[str, ...] = ()
    path: Path | None = None
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as a checkpoint keeps them: long curves are thinned."""
        every = -(-len(self.curves.steps) // MAX_SAVED_ROWS) or 1
        return {
            "event": "finetune",
            "steps": self.steps,
            "images": self.images,
            "seconds": self.seconds,
            "data": self.data,
            "settings": self.config.to_dict(),
            "before": self.before.to_dict() if self.before else None,
            "best": self.best,
            "curves": Curves(self.curves.steps[::every], self.curves.epochs).to_dict(),
        }


def evaluation_of(values: Mapping[str, Any] | None) -> Evaluation | None:
    """The inverse of ``Evaluation.to_dict``; more keys are welcome."""
    if values is None:
        return None
    known = {each.name: values[each.name] for each in fields(Evaluation) if each.name in values}
    return Evaluation(**{**known, "skipped_files": tuple(known["skipped_files"])})
