"""How the BatchNorm networks are trained that a study's converted cells begin from. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from normsurgeon.errors import UsageError
from normsurgeon.study import fields as check
from normsurgeon.study.fields import GridError, within
from normsurgeon.study.names import SMALL_RESNETS, offer
from normsurgeon.study.records import Cell
from normsurgeon.study.shared import REGULARIZERS, Training, regularizers

_OF_THE_STUDY = ("image_size", "test_images", "judge")
"""Settings of ``training`` that hold for all networks of a study, the pretrained ones included."""

_OTHER_NAMES = {"lr": "learning_rate", "learning_rates": "learning_rate", "batch_sizes": "batch_size"}


@dataclass(frozen=True)
class Pretraining:
    """How a BatchNorm network is trained before it is converted, once for each model, activation and seed.

    dataset         what it is trained on; None: the data set of the cell that begins from it
    learning_rate   for batches of ``training.lr_batch_size``, scaled like those of the grid
    batch_size      images an update
    regularization  as one value of the grid's axis
    training        everything else; in a grid, what is not given is as under ``training`` there

    :raises UsageError: a value that cannot be.

    >>> Pretraining.from_dict({"steps": 50, "learning_rate": 0.05}, Training(epochs=3, opt="adamw")).training.opt
    'adamw'
    """

    dataset: str | None = None
    learning_rate: float = 0.1
    batch_size: int = 32
    regularization: tuple[tuple[str, float], ...] = ()
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        checks = {
            "dataset": lambda value: None if value is None else check.text("dataset", value),
            "learning_rate": lambda value: check.number("learning_rate", value, above=0),
            "batch_size": lambda value: check.whole("batch_size", value, 1),
            "regularization": regularizers,
        }
        for name, one in checks.items():
            with within(name):
                object.__setattr__(self, name, one(getattr(self, name)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], shared: Training) -> Pretraining:
        """The inverse of ``to_dict``; what is not given is as in ``shared``, the training of the study's cells.

        :raises UsageError: an unknown key, or a value that cannot be.
        """
        if not isinstance(values, Mapping):
            raise GridError(f"pretraining={check.shown(values)} must be a mapping, such as pretraining: {{epochs: 8}}")
        own = tuple(each.name for each in fields(cls) if each.name != "training")
        known = (*own, *(each.name for each in fields(Training) if each.name not in _OF_THE_STUDY), "optimizer")
        for key in values:
            with within(key):
                _check_key(key, known)
        rest = {key: value for key, value in values.items() if key not in own}
        inherited = shared.to_dict()
        if rest.get("epochs") is not None or rest.get("steps") is not None:
            inherited |= {"epochs": None, "steps": None}  # its own length replaces the study's
        if "optimizer" in rest:
            del inherited["opt"]
        training = Training.from_dict({**inherited, **rest, "judge": "last"})
        return cls(**{key: value for key, value in values.items() if key in own}, training=training)

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON and YAML keep as they are, in one flat mapping."""
        training = {key: value for key, value in self.training.to_dict().items() if key not in _OF_THE_STUDY}
        return {
            "dataset": self.dataset,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "regularization": dict(self.regularization) if self.regularization else "none",
            **training,
        }

    def original(self, cell: Cell) -> Cell:
        """The run that trains the network which a cell begins from: the same one for every norm and learning rate.

        >>> cell = Cell("resnet8", "digits", start="converted", lr=0.7, batch_size=4, norm="gn", seed=3)
        >>> Pretraining(dataset="fashion-mnist").original(cell)  # doctest: +NORMALIZE_WHITESPACE
        Cell(model='resnet8', dataset='fashion-mnist', start='scratch', activation='default', preprocessing='standard',
             regularization=(), batch_size=32, lr=0.1, norm='bn', seed=3)
        """
        return replace(
            cell,
            dataset=self.dataset or cell.dataset,
            start="scratch",
            regularization=self.regularization,
            batch_size=self.batch_size,
            lr=self.training.scaled(self.learning_rate, self.batch_size),
            norm="bn",
        )


def check_starts(start: Sequence[str], models: Sequence[str], pretraining: Pretraining | None) -> None:
    """Whether the networks of ``start: converted`` have weights to begin from.

    :raises UsageError: they have none, or they would have two kinds.
    """
    if pretraining is None:
        bare = [name for name in models if name in SMALL_RESNETS]
        if "converted" in start and bare:
            with within("start"):
                raise UsageError(
                    f"start: converted begins from trained weights, and there are none of {bare[0]}; add "
                    "pretraining: {epochs: 8}, which trains them, or give a file of weights as the model"
                )
        return
    if "converted" not in start:
        with within("pretraining"):
            raise UsageError(
                "pretraining trains the networks that start: converted begins from, and no cell does; "
                "try start: [scratch, converted], or leave it out"
            )
    for index, name in enumerate(models):
        if os.path.isfile(name):
            with within("models", index):
                raise UsageError(
                    f"{name} is a file of trained weights, and pretraining begins from random ones; "
                    "leave pretraining out, or name the network"
                )


def _check_key(key: Any, known: Sequence[str]) -> None:
    if key in _OF_THE_STUDY:
        raise UsageError(f"{key!r} is no key of pretraining; all networks of a study share that of training")
    if key in REGULARIZERS or key == "dropout":
        raise UsageError(f"{key!r} is no key of pretraining; it goes under its regularization")
    if key not in known:
        near = _OTHER_NAMES.get(key)
        raise UsageError(
            f"unknown key {check.shown(key)} under pretraining; "
            + (f"did you mean {near!r}?" if near else offer(str(key), known))
        )
