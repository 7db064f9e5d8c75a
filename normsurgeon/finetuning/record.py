"""What a run of fine-tuning did: its curves, in plain types, and the entry of a network's history."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from normsurgeon.errors import CheckpointError
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.inference.evaluate import Evaluation

MAX_ROWS = 500
"""Rows of updates that a run keeps: a longer one averages over several updates a row."""

MAX_SAVED_ROWS = 100
"""Rows of updates that a checkpoint carries; the run's folder has all of them."""


@dataclass
class Curves:
    """The curves of a run.

    steps   one row every few updates: ``step`` (updates done), ``epoch`` (passes over the images), ``loss`` and each
            of its parts (``ce``, ``kl``, ``features``, ``distance``), ``lr``, ``grad_norm``, ``images_per_second``,
            and ``blend`` in a progressive run; losses and speed are means since the row before
    epochs  one row a validation: ``step``, ``epoch``, and what was measured (``top1``, ``loss``, ``agreement``, ``kl``)

    >>> Curves.from_dict(Curves([{"step": 1, "loss": 2.0}]).to_dict()).steps
    [{'step': 1, 'loss': 2.0}]
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {"steps": [dict(row) for row in self.steps], "epochs": [dict(row) for row in self.epochs]}

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Curves:
        """The inverse of ``to_dict``.

        :raises CheckpointError: something else.
        """
        try:
            return cls([dict(row) for row in values["steps"]], [dict(row) for row in values["epochs"]])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"these are no curves of a training run ({type(error).__name__} {error})") from error

    def column(self, name: str, of: str = "steps") -> tuple[list[int], list[float]]:
        """One curve: updates done, and the values of a column where it has any."""
        rows = [row for row in getattr(self, of) if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]


class Window:
    """Sums over the updates since the last row; plain types, so that a checkpoint can hold them."""

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        self.sums: dict[str, float] = dict(sums or {})

    def add(self, **values: float) -> None:
        """Count one update."""
        for name, value in {**values, "updates": 1}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """The means over the updates; the sums then start at zero. ``images`` and ``seconds`` give the speed."""
        sums, self.sums = self.sums, {}
        updates = sums.pop("updates")
        images, seconds = sums.pop("images"), sums.pop("seconds")
        means = {name: value / updates for name, value in sums.items()}
        return {**means, "images_per_second": images / max(seconds, 1e-9)}


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
