"""What a study is made of: cells, and what came of each. Plain types, no tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Status = Literal["done", "diverged", "failed", "skipped"]
LOST: tuple[Status, ...] = ("diverged", "failed", "skipped")
"""The ways in which a cell ends without a result."""


@dataclass(frozen=True, order=True)
class Cell:
    """One training run: one point of the grid. Cells that differ in ``norm`` alone are compared as a pair.

    model           a timm name, ``resnet8``, ``resnet14``, ``resnet20`` (He et al.'s small ResNets for CIFAR), or
                    any other MODEL of the command line
    dataset         a data spec: ``digits``, ``fashion-mnist``, a folder, a timm data set
    start           ``scratch``, or ``converted``: pretrained weights, converted to the norm with their function kept
    activation      ``default`` (as the network has it), ``relu``, ``silu``, …
    preprocessing   ``none``, ``zero-mean``, ``standard``, … (study/preprocessing.py)
    regularization  training settings by name, such as (("weight_decay", 0.0005),); () for none
    batch_size      images per update
    lr              the learning rate that the run uses (after any scaling by the batch size)
    norm            ``bn`` (as the network has it), a target such as ``gn``, or ``gn:8`` for 8 groups
    seed            of the weights, the order of the images and everything else that is random
    """

    model: str
    dataset: str
    start: str = "scratch"
    activation: str = "default"
    preprocessing: str = "standard"
    regularization: tuple[tuple[str, float], ...] = ()
    batch_size: int = 32
    lr: float = 0.1
    norm: str = "bn"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON keeps as they are."""
        return {**vars(self), "regularization": dict(self.regularization)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The inverse of ``to_dict``."""
        return cls(**{**values, "regularization": tuple(sorted(dict(values["regularization"]).items()))})

    @property
    def key(self) -> str:
        """A short name that is the same for equal cells, on every machine.

        >>> Cell("resnet8", "digits").key == Cell("resnet8", "digits").key != Cell("resnet8", "digits", seed=1).key
        True
        """
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def label(self, axis: str) -> str:
        """One axis' value as a reader sees it.

        >>> Cell("resnet8", "digits", regularization=(("weight_decay", 0.0005),)).label("regularization")
        'weight_decay=0.0005'
        """
        value = getattr(self, axis)
        if axis == "regularization":
            return ", ".join(f"{name}={number:g}" for name, number in value) or "none"
        return f"{value:g}" if isinstance(value, float) else str(value)


AXES = tuple(field.name for field in fields(Cell))
"""The axes of the grid, in the order in which tables list them."""


def varying_axes(cells: Iterable[Cell]) -> tuple[str, ...]:
    """The axes along which some cells differ."""
    cells = list(cells)
    return tuple(axis for axis in AXES if len({getattr(cell, axis) for cell in cells}) > 1)


@dataclass(frozen=True)
class Epoch:
    """One point of a training curve, after a pass over the training images (or the last, shorter one).

    train_loss: mean of what was minimised, over the updates since the point before; accuracy, loss: on the held-out
    images, the network in eval mode; None where it was not judged then.
    """

    epoch: float
    step: int
    train_loss: float | None
    accuracy: float | None
    loss: float | None


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a trained cell's network, from the analysis (docs/report.md defines the statistics).

    dead_fraction: dead channels of all; sensitivity: trace of the empirical Fisher over the layer's parameters
    """

    layer: str
    kind: str
    channels: int
    mean: float | None
    std: float | None
    zero_fraction: float | None
    dead_fraction: float | None
    effective_rank: float | None
    group_fluctuation: float | None
    sensitivity: float | None = None


@dataclass(frozen=True)
class CellAnalysis:
    """The analysis of a trained cell: its layers in order, and linear CKA between them (L × L)."""

    layers: tuple[LayerSummary, ...]
    cka_layers: tuple[str, ...] = ()
    cka: tuple[tuple[float | None, ...], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    status    ``done``; ``diverged``: the loss stopped being finite; ``failed``: an error; ``skipped``: impossible
    reason    one line, of everything but ``done``
    correct   right top-1 answers, of ``images`` held-out ones, of the network after the last update (none is picked)
    loss      mean cross-entropy on them, in nats
    chance    the share of the commonest class among them, or None where that is not known
    start_accuracy  before training, where the cell starts from a converted network
    curve     the training curve; its last point is the result
    steps     updates made
    analysis  of the trained network, where the grid wants it (``looked`` in the JSON)
    seconds   of wall-clock time: the only thing here that a second run with the same seeds does not repeat
    """

    cell: Cell
    status: Status
    reason: str | None = None
    correct: int | None = None
    images: int | None = None
    loss: float | None = None
    chance: float | None = None
    start_accuracy: float | None = None
    curve: tuple[Epoch, ...] = ()
    steps: int = 0
    analysis: CellAnalysis | None = None
    seconds: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Top-1 as a fraction, or None where the cell has no result."""
        return self.correct / self.images if self.correct is not None and self.images else None

    @property
    def guessing(self) -> float | None:
        """The accuracy that guessing may reach on so many images: chance and two standard errors."""
        if self.chance is None or not self.images:
            return None
        return self.chance + 2 * math.sqrt(self.chance * (1 - self.chance) / self.images)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        values = asdict(self)
        return {**values, "cell": self.cell.to_dict(), "accuracy": self.accuracy, "looked": values.pop("analysis")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of ``to_dict``."""
        kept = {key: value for key, value in values.items() if key not in ("accuracy", "analysis", "looked")}
        found = values.get("looked")
        if found is not None:
            layers = tuple(LayerSummary(**layer) for layer in found["layers"])
            found = CellAnalysis(layers, tuple(found["cka_layers"]), tuple(map(tuple, found["cka"])))
        kept |= {"cell": Cell.from_dict(kept["cell"]), "curve": tuple(Epoch(**point) for point in kept["curve"])}
        return cls(**kept, analysis=found)


def finite(value: Any) -> Any:
    """Plain data with None for each number that is not finite, as JSON and the store take it.

    >>> finite({"a": (1.0, float("inf"))})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Results:
    """A study's outcomes, one per cell, in the order of the grid.

    name, title  of the study
    training     what all cells share (epochs, optimizer, schedule, numbers of images …), plain types
    """

    name: str
    outcomes: tuple[Outcome, ...]
    title: str = ""
    training: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """How many cells ended in which way."""
        return {kind: sum(outcome.status == kind for outcome in self.outcomes) for kind in ("done", *LOST)}

    def varying(self) -> tuple[str, ...]:
        """The axes along which the study's cells differ, ``seed`` left out."""
        return tuple(axis for axis in varying_axes(outcome.cell for outcome in self.outcomes) if axis != "seed")
