"""A study's grid: one YAML file, or a dict, becomes a checked record of axes, and its cells. Imports no torch."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from normsurgeon.errors import UsageError
from normsurgeon.study import fields as check
from normsurgeon.study.fields import GridError, within
from normsurgeon.study.lines import read_yaml
from normsurgeon.study.names import ACTIVATIONS, ALIASES, NORMS, PREPROCESSING, START_ALIASES, STARTS, offer
from normsurgeon.study.pretraining import Pretraining, check_starts
from normsurgeon.study.records import Cell
from normsurgeon.study.shared import REGULARIZERS, Training, regularizers

MOST_CELLS = 10_000
MOST_SEED = 2**32 - 1
EXAMPLES = {"models": "[resnet8]", "norms": "[bn, gn]", "datasets": "[digits]"}
"""The keys that a grid must have, with an example of each."""

_AXES = (
    "models",
    "datasets",
    "start",
    "activations",
    "preprocessing",
    "regularization",
    "batch_sizes",
    "learning_rates",
    "norms",
    "seeds",
)
"""In the order of a cell's fields, which is the order of the cells."""


@dataclass(frozen=True)
class Grid:
    """The axes of a study, and what all its cells share. Every axis takes one value, or a list, and becomes a tuple.

    models          timm names, ``resnet8``, … (see :class:`~normsurgeon.study.records.Cell`)
    norms           ``bn``, a target of normsurgeon, or ``gn:N`` for GroupNorm with N groups
    datasets        data specs
    batch_sizes     images an update
    activations     ``default``, or timm's name of one
    preprocessing   see :mod:`normsurgeon.study.preprocessing`
    regularization  ``none``, or a mapping of training settings; weight decay is 0 where it is not named
    learning_rates  before they are scaled by the batch size, see :class:`~normsurgeon.study.shared.Training`
    start           ``scratch`` (or ``random``: the same), or ``converted``
    seeds           a count (3 is 0, 1, 2), or a list of seeds
    training        a Training, or a mapping
    pretraining     how the BatchNorm networks are trained that ``start: converted`` begins from, a Pretraining or a
                    mapping; None: it begins from published weights, or from those of a file
    analysis        whether each trained network is analysed
    keep_checkpoints   whether each is kept
    name, title     of the study; the name is a folder's name too

    :raises UsageError: a value that cannot be; the nearest name is offered.

    >>> grid = Grid(models="resnet8", norms=["bn", "gn:8"], datasets="digits", seeds=2)
    >>> [(cell.norm, cell.seed) for cell in grid.cells()]
    [('bn', 0), ('bn', 1), ('gn:8', 0), ('gn:8', 1)]
    """

    models: tuple[str, ...]
    norms: tuple[str, ...]
    datasets: tuple[str, ...]
    batch_sizes: tuple[int, ...] = (32,)
    activations: tuple[str, ...] = ("default",)
    preprocessing: tuple[str, ...] = ("standard",)
    regularization: tuple[tuple[tuple[str, float], ...], ...] = ((),)
    learning_rates: tuple[float, ...] = (0.1,)
    start: tuple[str, ...] = ("scratch",)
    seeds: tuple[int, ...] = (0, 1, 2)
    training: Training = field(default_factory=Training)
    pretraining: Pretraining | None = None
    analysis: bool = False
    keep_checkpoints: bool = False
    name: str = "study"
    title: str = ""

    def __post_init__(self) -> None:
        one: dict[str, Callable[[Any], Any]] = {
            "models": lambda value: check.text("models", value),
            "norms": _norm,
            "datasets": lambda value: check.text("datasets", value),
            "batch_sizes": lambda value: check.whole("batch_sizes", value, 1),
            "activations": _activation,
            "preprocessing": lambda value: _one_of("pre-processing", value or "none", PREPROCESSING),
            "regularization": regularizers,
            "learning_rates": lambda value: check.number("learning_rates", value, above=0),
            "start": _start,
            "seeds": lambda value: check.whole("seeds", value, 0, MOST_SEED),
        }
        for axis in _AXES:
            self._set(axis, _axis(axis, getattr(self, axis), one[axis]))
        with within("training"):
            if not isinstance(self.training, Training):
                self._set("training", Training.from_dict({} if self.training is None else self.training))
        with within("pretraining"):
            if self.pretraining is not None and not isinstance(self.pretraining, Pretraining):
                self._set("pretraining", Pretraining.from_dict(self.pretraining, self.training))
        check_starts(self.start, self.models, self.pretraining)
        for name in ("analysis", "keep_checkpoints"):
            with within(name):
                self._set(name, check.flag(name, getattr(self, name)))
        with within("name"):
            self._set("name", _name(self.name))
        with within("title"):
            self._set("title", check.text("title", self.title) if self.title else "")
        self._check_size()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_size(self) -> None:
        lengths = {axis: len(getattr(self, axis)) for axis in _AXES}
        cells = math.prod(lengths.values())
        if cells > MOST_CELLS:
            product = " × ".join(f"{n} {axis.replace('_', ' ')}" for axis, n in lengths.items() if n > 1)
            raise GridError(f"the grid has {product} = {cells:,} cells, more than {MOST_CELLS:,}; shorten an axis")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """A grid from the keys of the YAML file; the inverse of ``to_dict``.

        :raises UsageError: an unknown or missing key, or a value that cannot be.

        >>> Grid.from_dict({"models": "resnet8", "norms": "gn", "datasets": "digits", "batchsizes": 8})
        Traceback (most recent call last):
        normsurgeon.study.fields.GridError: unknown key 'batchsizes'; did you mean 'batch_sizes'?
        """
        if not isinstance(values, Mapping):
            kind = {list: "a list", tuple: "a list", str: "a text"}.get(type(values), check.shown(values))
            raise GridError(f"a study is a mapping with the keys {', '.join(EXAMPLES)}, …, and this is {kind}")
        for key in values:
            with within(key):
                _check_key(str(key), [each.name for each in fields(cls)])
        for key, example in EXAMPLES.items():
            if key not in values:
                raise GridError(f"the key {key!r} is missing; add it, as in {key}: {example}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON and YAML keep as they are; the keys are those of the file."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plain |= {axis: list(plain[axis]) for axis in _AXES}
        regularization = [dict(values) if values else "none" for values in self.regularization]
        pretraining = None if self.pretraining is None else self.pretraining.to_dict()
        training = self.training.to_dict()
        return {**plain, "regularization": regularization, "training": training, "pretraining": pretraining}

    def cells(self) -> tuple[Cell, ...]:
        """Every combination, in the order of a cell's fields: the seeds vary fastest, then the norms."""
        names = [each.name for each in fields(Cell)]  # in the order of _AXES
        found: dict[Cell, None] = {}  # an ordered set
        for values in itertools.product(*(getattr(self, axis) for axis in _AXES)):
            cell = Cell(**dict(zip(names, values, strict=True)))
            found[replace(cell, lr=self.training.scaled(cell.lr, cell.batch_size))] = None
        return tuple(found)

    def original(self, cell: Cell) -> Cell | None:
        """The run that trains the BatchNorm network which a cell begins from; None where no run of this study does.

        >>> grid = Grid("resnet8", ["bn", "gn"], "digits", start="converted", pretraining={"steps": 50}, seeds=1)
        >>> {grid.original(cell) for cell in grid.cells()}  # doctest: +ELLIPSIS
        {Cell(model='resnet8', dataset='digits', start='scratch', ..., norm='bn', seed=0)}
        """
        if self.pretraining is None or cell.start != "converted":
            return None
        return self.pretraining.original(cell)

    def of_originals(self) -> Grid:
        """This grid with the settings that ``original`` runs are trained with, in the place of its cells'."""
        assert self.pretraining is not None
        # What a pretraining leaves out is the study's: so its images have the size of the cells' and are tested alike.
        size, tested = self.training.image_size, self.training.test_images
        training = replace(self.pretraining.training, image_size=size, test_images=tested)
        return replace(self, start=("scratch",), training=training, pretraining=None, analysis=False)

    def settings_for(self, cell: Cell) -> dict[str, Any]:
        """The settings of a cell's run, by the names of ``normsurgeon.finetuning.config.FinetuneConfig``.

        The labels alone teach: no cell has a teacher, whatever it starts from.

        >>> grid = Grid(models="resnet8", norms="gn", datasets="digits", batch_sizes=64, training={"steps": 20})
        >>> settings = grid.settings_for(grid.cells()[0])
        >>> settings["steps"], settings["lr"], settings["weight_decay"]
        (20, 0.2, 0.0)
        """
        return {
            **self.training.settings(),
            "batch_size": cell.batch_size,
            "lr": cell.lr,
            "seed": cell.seed,
            "weight_decay": 0.0,
            "ce": 1.0,
            "kl": 0.0,
            "features": 0.0,
            **dict(cell.regularization),
        }

    def impossible(self, cell: Cell) -> str | None:
        """Why a cell cannot be run, as far as that can be told without its network; None where it can.

        >>> grid = Grid(models="resnet8", norms="gn", datasets="digits", batch_sizes=1, regularization={"mixup": 0.2})
        >>> grid.impossible(grid.cells()[0])
        'mixup mixes pairs of images, and batch_size=1 is odd; try an even one'
        """
        asked, size, images = dict(cell.regularization), cell.batch_size, self.training.train_images
        for name in ("mixup", "cutmix"):
            if asked.get(name) and size % 2:
                return f"{name} mixes pairs of images, and batch_size={size} is odd; try an even one"
        if asked.get("distance") and size < 2:
            return f"distance compares the images of a batch, and batch_size={size}; try 2 or more"
        if asked.get("reprob") and not self.training.augment:
            return f"reprob={asked['reprob']:g} is a part of the augmentation; try augment: true"
        if images is not None and size > images:
            return f"batch_size={size} is more than train_images={images}; try a smaller batch"
        return None


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """The grid of a YAML file. Its name is the file's, unless it has one.

    :raises UsageError: in one line, ``study.yaml:7: …``: a file that is not YAML, or a grid that cannot be.
    """
    document = read_yaml(path)
    try:
        values = document.value
        named = {"name": Path(document.file).stem, **values} if isinstance(values, Mapping) else values
        return Grid.from_dict(named)
    except GridError as error:
        raise UsageError(f"{document.file}:{document.line(error.path)}: {error}") from error


def _check_key(key: str, known: list[str]) -> None:
    if key in known:
        return
    inner = [each.name for each in fields(Training)]
    if key in (*inner, "optimizer"):
        raise GridError(f"unknown key {key!r}; it goes under training")
    if key in (*REGULARIZERS, "dropout"):
        raise GridError(f"unknown key {key!r}; it goes under regularization")
    short = {"lr": "learning_rates", "lrs": "learning_rates", "groups": "norms"}.get(key)
    near = [short] if short else difflib.get_close_matches(key.lower().replace("-", "_"), known, 1)
    raise GridError(
        f"unknown key {check.shown(key)}; "
        + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}")
    )


def _axis(axis: str, value: Any, one: Callable[[Any], Any]) -> tuple[Any, ...]:
    """One axis: its values checked, in their order, each once."""
    with within(axis):
        if axis == "seeds" and not isinstance(value, (list, tuple)):
            return tuple(range(_seed_count(value)))
        found, listed = [], isinstance(value, (list, tuple))
        for index, each in enumerate(check.entries(axis, value)):
            with within(*([index] if listed else [])):
                found.append(one(each))
        return tuple(dict.fromkeys(found))


def _seed_count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_CELLS:
        raise GridError(f"seeds={check.shown(value)} must be a count, 1 to {MOST_CELLS}, or a list of seeds")
    return value


def _one_of(what: str, value: Any, known: tuple[str, ...]) -> str:
    if value is None:
        raise GridError(f"{what} is empty; {offer('', known)}")
    if not isinstance(value, str) or value not in known:
        raise GridError(f"unknown {what} {check.shown(value)}; {offer(str(value), known)}")
    return value


def _norm(value: Any) -> str:
    if isinstance(value, Mapping) and len(value) == 1:  # YAML's reading of gn: 8
        name, groups = next(iter(value.items()))
        raise GridError(f"norm {check.shown(value)}: write {name}:{8 if groups is None else groups}, without a space")
    base, colon, groups = value.partition(":") if isinstance(value, str) else (value, "", "")
    base = _one_of("norm", base, NORMS)
    if not colon:
        return base
    if base != "gn":
        raise GridError(f"norm {check.shown(value)}: only gn takes a number of groups; try {base}, or gn:{groups or 8}")
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", groups):
        raise GridError(f"norm {check.shown(value)}: the groups must be a whole number, at least 1, as in gn:8")
    return f"gn:{int(groups)}"


def _start(value: Any) -> str:
    return _one_of("start", START_ALIASES.get(value, value) if isinstance(value, str) else value, STARTS)


def _activation(value: Any) -> str:
    return _one_of("activation", ALIASES.get(value, value) if isinstance(value, str) else value, ACTIVATIONS)


def _name(value: Any) -> str:
    name = check.text("name", value)
    if not re.fullmatch(r"[^/\\\x00-\x1f]{1,100}", name) or name.startswith("."):
        raise GridError(f"name={name[:40]!r} must do as a folder's name: at most 100 characters, without slashes")
    return name
