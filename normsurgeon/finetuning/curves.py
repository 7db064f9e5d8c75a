"""The curves of a training run, update by update and epoch by epoch, in plain types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from normsurgeon.errors import CheckpointError

MAX_ROWS = 500
"""Rows of updates that a run keeps: a longer one averages over several updates a row."""


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
