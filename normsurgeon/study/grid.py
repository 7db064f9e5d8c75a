"""A study's grid: one YAML file, or a dict, becomes a checked record of axes, and its cells. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from normsurgeon._util.suggest import suggest
from normsurgeon._util.yaml_lines import read_yaml
from normsurgeon.errors import UsageError
from normsurgeon.finetuning.config import Settings
from normsurgeon.norms.target_names import TARGET_NAMES
from normsurgeon.study.records import AXES, Cell

MAX_CELLS = 10_000
MAX_SEED = 2**32 - 1
CONFIGS = Path(__file__).parent / "configs"

NORMS = ("bn", *TARGET_NAMES)
"""``bn`` is the network's own; ``gn:8`` stands for ``gn`` with 8 groups."""
PREPROCESSING = (
    "none", "model", "zero-mean", "min-max", "standard", "standard-per-image", "contrast-stretch", "linear-prediction",
    "zca",
)  # fmt: skip
"""``model`` is the network's own mean and std; the others are fitted, see ``normsurgeon.study.preprocessing``."""
STARTS = ("scratch", "converted")
SMALL_RESNETS = ("resnet8", "resnet14", "resnet20")
"""Networks of the study's own (``normsurgeon.models.small_resnets``), of which no weights are published."""
ACTIVATIONS = (
    "default", "relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "gelu_tanh", "quick_gelu", "silu",
    "mish", "hard_mish", "hardswish", "sigmoid", "hardsigmoid", "tanh", "identity",
)  # fmt: skip
"""``default`` is the network's own; the others are timm's names (``timm.layers.get_act_layer``)."""
ALIASES = {
    "swish": "silu", "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid", "leakyrelu": "leaky_relu",
    "random": "scratch",
}  # fmt: skip
"""Other names of activations and starts, so that one thing is never two cells."""
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "nadamw", "radam", "rmsprop", "adagrad", "lamb", "lars", "lion")
"""timm's usual optimizers; for any other name timm itself is loaded, which takes seconds."""
REGULARIZERS = ("weight_decay", "drop", "drop_path", "smoothing", "mixup", "cutmix", "distance", "reprob")
"""Fine-tuning settings that are the axis ``regularization``, and are not shared."""

_EXAMPLES = {"models": "[resnet8]", "norms": "[bn, gn]", "datasets": "[digits]"}  # of the keys that a grid must have
_GRID_AXES = (
    "models", "datasets", "start", "activations", "preprocessing", "regularization", "batch_sizes", "learning_rates",
    "norms", "seeds",
)  # fmt: skip  # in the order of AXES, which is the order of the cells
_SHARED = (
    "opt", "momentum", "layer_decay", "sched", "warmup_epochs", "min_lr", "clip_grad", "train_what", "grad_accum",
    "augment", "scale", "ratio", "hflip", "vflip", "color_jitter", "aa", "distance_layers", "precision",
    "channels_last", "compile",
)  # fmt: skip  # settings of fine-tuning that all cells share
_OF_THE_STUDY = ("image_size", "test_images", "judge")  # keys of training that hold for pretrained networks too
_MEANT = {"lr": "learning_rates", "lrs": "learning_rates", "learning_rate": "learning_rates",
          "batch_size": "batch_sizes", "seed": "seeds", "groups": "norms"}  # fmt: skip

Regularization = tuple[tuple[str, float], ...]


# One value


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which Python would count as 0 or 1
        raise ValueError("should be a number")
    return value


def _words(value: str) -> str:
    if not value.strip():
        raise ValueError("should not be empty")
    return " ".join(value.split())


def _one_of(what: str, value: Any, known: tuple[str, ...]) -> str:
    value = ALIASES.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"unknown {what} {_shown(value)}; {suggest(str(value or ''), known)}")
    return value


def _norm(value: Any) -> str:
    if isinstance(value, Mapping) and len(value) == 1:  # YAML's reading of gn: 8
        name, groups = next(iter(value.items()))
        raise ValueError(f"norm {_shown(value)}: write {name}:{8 if groups is None else groups}, without a space")
    base, colon, groups = value.partition(":") if isinstance(value, str) else (value, "", "")
    base = _one_of("norm", base, NORMS)
    if not colon:
        return base
    if base != "gn":
        raise ValueError(f"norm {_shown(value)}: only gn takes a number of groups; try {base}, or gn:{groups or 8}")
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", groups):
        raise ValueError(f"norm {_shown(value)}: the groups must be a whole number, at least 1, as in gn:8")
    return f"gn:{int(groups)}"


def _optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        from timm.optim import list_optimizers  # slow, and needed for rare names only

        known = [str(each) for each in list_optimizers()]
        if name not in known:
            near = suggest(name, known, otherwise="")
            raise ValueError(f"unknown optimizer {name!r}; {near or suggest(name, OPTIMIZERS)}")
    return name


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[^/\\\x00-\x1f]{1,100}", name) or name.startswith("."):
        raise ValueError("should do as a folder's name: at most 100 characters, without slashes")
    return name


def _listed(value: Any, info: ValidationInfo) -> Any:
    """An axis' values: one value, or a list of at least one."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ValueError(f"{info.field_name} is an empty list; give at least one value")
    return values


def _seeds(value: Any) -> Any:
    """A count stands for that many seeds."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CELLS:
        raise ValueError(f"seeds={_shown(value)} should be a count, 1 to {MAX_CELLS}, or a list of seeds")
    return list(range(value))


def _shown(value: Any) -> str:
    """A value as a message quotes it: on one line, and not all of a long one."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"


T = TypeVar("T")
Whole = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Number = Annotated[float, BeforeValidator(_number)]
Rate = Annotated[float, BeforeValidator(_number), Field(gt=0)]
Words = Annotated[str, AfterValidator(_words)]
Axis = Annotated[tuple[T, ...], BeforeValidator(_listed), AfterValidator(lambda found: tuple(dict.fromkeys(found)))]


# What all cells share


def _finetuning(names: tuple[str, ...], **defaults: Any) -> dict[str, Any]:
    """Types and defaults of fine-tuning settings, as ``create_model`` takes them."""
    strict: dict[Any, Any] = {float: Number, int: Whole, str: Words}
    strict |= {float | None: Number | None, str | None: Words | None}
    hints, own = get_type_hints(Settings), {each.name: each.default for each in dataclasses.fields(Settings)}
    return {name: (strict.get(hints[name], hints[name]), {**own, **defaults}[name]) for name in names}


class _Strict(BaseModel):
    """No unknown keys and no nan; a fine-tuning setting has the limits that ``Settings`` gives it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _limits(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name in (*_SHARED, *REGULARIZERS) and value is not None:
            try:
                Settings(**{info.field_name: value})
            except UsageError as error:
                raise ValueError(str(error)) from error
        return value


if TYPE_CHECKING:
    _SharedSettings, _Regularizers = _Strict, _Strict
else:
    _SharedSettings = create_model(
        "_SharedSettings", __base__=_Strict, **_finetuning(_SHARED, opt="sgd", clip_grad=None, augment=False)
    )
    _Regularizers = create_model("_Regularizers", __base__=_Strict, **_finetuning(REGULARIZERS))


class _At(ValueError):
    """An error about a value deeper inside of what is being validated."""

    def __init__(self, text: str, *path: str | int) -> None:
        super().__init__(text)
        self.path = path


def regularizers(value: Any) -> Regularization:
    """One value of the axis: ``none``, or a mapping of training settings; what is 0 anyway is left out.

    >>> regularizers({"weight_decay": 5e-4, "dropout": 0.1, "mixup": 0}), regularizers("none")
    ((('drop', 0.1), ('weight_decay', 0.0005)), ())
    """
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return ()
    if isinstance(value, (tuple, list)) and all(isinstance(v, (tuple, list)) and len(v) == 2 for v in value):
        value = dict(value)
    if not isinstance(value, Mapping):
        raise ValueError(
            f"regularization={_shown(value)} should be none or a mapping, such as {{weight_decay: 5.0e-4}}"
        )
    if "dropout" in value:
        if "drop" in value:
            raise _At("'dropout' and 'drop' are the same; give one of them", "dropout")
        value = {"drop" if key == "dropout" else key: number for key, number in value.items()}
    found = _Regularizers.model_validate(dict(value)).model_dump(exclude_unset=True)
    # A network may have a dropout of its own, which 0 takes away; all others are 0 by themselves.
    return tuple(sorted((name, v) for name, v in found.items() if v or name in ("drop", "drop_path")))


OneRegularization = Annotated[Regularization, BeforeValidator(regularizers)]


class Training(_SharedSettings):
    """How every cell is trained: settings of fine-tuning, and these keys.

    epochs, steps   how long: one of the two; 8 epochs if neither is given
    lr_batch_size   the learning rates of the grid are for batches of this size, and scaled linearly for others
                    (Goyal et al., arXiv:1706.02677): lr · batch_size / lr_batch_size. None: not scaled
    train_images, test_images   at most this many, chosen by a fixed seed; None: all
    image_size      height and width in pixels; None: the network's own
    judge           when the network is tested: ``epoch`` (after every one) or ``last`` (at the end)

    >>> Training().epochs, Training(steps=100).epochs, Training(optimizer="adamw").settings()["opt"]
    (8, None, 'adamw')
    """

    epochs: Count | None = None
    steps: Count | None = None
    lr_batch_size: Count | None = 32
    train_images: Count | None = None
    test_images: Count | None = None
    image_size: Count | None = None
    judge: Literal["last", "epoch"] = "last"

    @field_validator("opt", check_fields=False)
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        return _optimizer(name)

    @model_validator(mode="before")
    @classmethod
    def _length(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        if "optimizer" in values:
            if "opt" in values:
                raise _At("'optimizer' and 'opt' are the same; give one of them", "optimizer")
            values["opt"] = values.pop("optimizer")
        if values.get("epochs") is not None and values.get("steps") is not None:
            raise _At("give epochs or steps, and not both", "steps")
        return values if values.get("steps") is not None or values.get("epochs") is not None else values | {"epochs": 8}

    def settings(self) -> dict[str, Any]:
        """The settings of fine-tuning in it, by their names there."""
        length = {"epochs": self.epochs} if self.steps is None else {"steps": self.steps}
        return {**{name: getattr(self, name) for name in _SHARED}, **length}

    def scaled(self, lr: float, batch_size: int) -> float:
        """The learning rate for batches of that size.

        >>> Training(lr_batch_size=32).scaled(0.1, 64), Training(lr_batch_size=None).scaled(0.1, 64)
        (0.2, 0.1)
        """
        return lr if self.lr_batch_size is None else lr * (batch_size / self.lr_batch_size)


class Pretraining(Training):
    """How a BatchNorm network is trained before it is converted, once for each model, activation and seed.

    dataset         what it is trained on; None: the data set of the cell that starts from it
    learning_rate   for batches of ``lr_batch_size``, scaled like those of the grid
    batch_size      images per update
    regularization  as one value of the grid's axis

    In a grid, what is not given is as under ``training``.
    """

    dataset: Words | None = None
    learning_rate: Rate = 0.1
    batch_size: Count = 32
    regularization: OneRegularization = ()

    def original(self, cell: Cell) -> Cell:
        """The run that trains the network which a cell starts from: the same one for every norm and learning rate.

        >>> cell = Cell("resnet8", "digits", start="converted", lr=0.7, batch_size=4, norm="gn", seed=3)
        >>> Pretraining(dataset="fashion-mnist").original(cell)  # doctest: +NORMALIZE_WHITESPACE
        Cell(model='resnet8', dataset='fashion-mnist', start='scratch', activation='default', preprocessing='standard',
             regularization=(), batch_size=32, lr=0.1, norm='bn', seed=3)
        """
        return replace(
            cell, dataset=self.dataset or cell.dataset, start="scratch", regularization=self.regularization,
            batch_size=self.batch_size, lr=self.scaled(self.learning_rate, self.batch_size), norm="bn",
        )  # fmt: skip


# The grid


class GridError(UsageError):
    """A value that a grid cannot have; ``path`` tells where it is."""

    def __init__(self, text: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(text)
        self.path = path


class Grid(_Strict):
    """The axes of a study, and what all its cells share. Every axis takes one value, or a list, and becomes a tuple.

    models          timm names, ``resnet8``, … (see :class:`~normsurgeon.study.records.Cell`)
    norms           ``bn``, a target of normsurgeon, or ``gn:N`` for GroupNorm with N groups
    datasets        data specs
    batch_sizes     images per update
    activations     ``default``, or timm's name of one
    preprocessing   see :mod:`normsurgeon.study.preprocessing`
    regularization  ``none``, or a mapping of training settings; weight decay is 0 where it is not named
    learning_rates  before they are scaled by the batch size, see :class:`Training`
    start           ``scratch`` (or ``random``: the same), or ``converted``
    seeds           a count (3 is 0, 1, 2), or a list of seeds
    pretraining     how the BatchNorm networks are trained that ``start: converted`` starts from; None: it starts from
                    published weights, or from those of a file
    analysis        whether each trained network is analysed
    keep_checkpoints   whether each is kept
    name, title     of the study; the name is a folder's name too

    :raises UsageError: if a key or a value is not possible; the nearest name is offered.

    >>> grid = Grid(models="resnet8", norms=["bn", "gn:8"], datasets="digits", seeds=2)
    >>> [(cell.norm, cell.seed) for cell in grid.cells()]
    [('bn', 0), ('bn', 1), ('gn:8', 0), ('gn:8', 1)]
    >>> Grid(models="resnet8", norms="gn", datasets="digits", batchsizes=8)
    Traceback (most recent call last):
    normsurgeon.study.grid.GridError: unknown key 'batchsizes'; did you mean batch_sizes?
    """

    models: Axis[Words]
    norms: Axis[Annotated[str, BeforeValidator(_norm)]]
    datasets: Axis[Words]
    batch_sizes: Axis[Count] = (32,)
    activations: Axis[Annotated[str, BeforeValidator(lambda v: _one_of("activation", v, ACTIVATIONS))]] = ("default",)
    preprocessing: Axis[
        Annotated[str, BeforeValidator(lambda v: _one_of("pre-processing", "none" if v is None else v, PREPROCESSING))]
    ] = ("standard",)
    regularization: Axis[OneRegularization] = ((),)
    learning_rates: Axis[Rate] = (0.1,)
    start: Axis[Annotated[str, BeforeValidator(lambda v: _one_of("start", v, STARTS))]] = ("scratch",)
    seeds: Annotated[Axis[Annotated[int, Strict(), Field(ge=0, le=MAX_SEED)]], BeforeValidator(_seeds)] = (0, 1, 2)
    training: Training = Training()
    pretraining: Pretraining | None = None
    analysis: bool = False
    keep_checkpoints: bool = False
    name: Annotated[Words, AfterValidator(_folder_name)] = "study"
    title: str = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            path, text = _explained(error)
            raise GridError(text, path) from None

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given under ``pretraining`` is as under ``training``."""
        values = {key: value for key, value in values.items() if value is not None or key not in ("training", "title")}
        own, shared = values.get("pretraining"), values.get("training", {})
        if isinstance(shared, Training):
            shared = shared.model_dump(mode="json")
        if not isinstance(own, Mapping) or not isinstance(shared, Mapping):
            return values
        for key in _OF_THE_STUDY:
            if key in own:
                text = f"{key!r} is no key of pretraining; all networks of a study share that of training"
                raise _At(text, "pretraining", key)
        replaced: set[str] = {"judge"}
        for names in (("epochs", "steps"), ("opt", "optimizer")):
            replaced |= set(names) if any(own.get(name) is not None for name in names) else set()
        return {**values, "pretraining": {**{k: v for k, v in shared.items() if k not in replaced}, **own}}

    @model_validator(mode="after")
    def _checked(self) -> Grid:
        lengths = {axis: len(getattr(self, axis)) for axis in _GRID_AXES}
        if (cells := math.prod(lengths.values())) > MAX_CELLS:
            product = " × ".join(f"{n} {axis.replace('_', ' ')}" for axis, n in lengths.items() if n > 1)
            raise ValueError(f"the grid has {product} = {cells:,} cells, more than {MAX_CELLS:,}; shorten an axis")
        converted = "converted" in self.start
        if self.pretraining is None:
            bare = [name for name in self.models if name in SMALL_RESNETS]
            if converted and bare:
                raise _At(
                    f"start: converted starts from trained weights, and there are none of {bare[0]}; add "
                    "pretraining: {epochs: 8}, which trains them, or give a file of weights as the model", "start"
                )  # fmt: skip
            return self
        if not converted:
            raise _At(
                "pretraining trains the networks that start: converted starts from, and no cell does; "
                "try start: [scratch, converted], or leave it out", "pretraining"
            )  # fmt: skip
        for index, name in enumerate(self.models):
            if os.path.isfile(name):
                raise _At(
                    f"{name} is a file of trained weights, and pretraining starts from random ones; "
                    "leave pretraining out, or name the network", "models", index
                )  # fmt: skip
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """A grid from the keys of the YAML file; the inverse of ``to_dict``.

        :raises UsageError: if a key is unknown or missing, or a value is not possible.
        """
        if not isinstance(values, Mapping):
            kind = {list: "a list", tuple: "a list", str: "a text"}.get(type(values), _shown(values))
            raise GridError(f"a study is a mapping with the keys {', '.join(_EXAMPLES)}, …, and this is {kind}")
        return cls(**{str(key): value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON and YAML keep as they are; the keys are those of the file."""
        plain = self.model_dump(mode="json")
        plain["regularization"] = [dict(value) or "none" for value in self.regularization]
        if self.pretraining is not None:
            plain["pretraining"]["regularization"] = dict(self.pretraining.regularization) or "none"
            for key in _OF_THE_STUDY:
                del plain["pretraining"][key]
        return plain

    def changed(self, **values: Any) -> Grid:
        """This grid with some keys changed, checked again."""
        return Grid(**{**dict(self), **values})

    def cells(self) -> tuple[Cell, ...]:
        """Every combination, in the order of a cell's fields: the seeds vary fastest, then the norms."""
        found: dict[Cell, None] = {}  # an ordered set
        for values in itertools.product(*(getattr(self, axis) for axis in _GRID_AXES)):
            cell = Cell(**dict(zip(AXES, values, strict=True)))
            found[replace(cell, lr=self.training.scaled(cell.lr, cell.batch_size))] = None
        return tuple(found)

    def original(self, cell: Cell) -> Cell | None:
        """The run that trains the BatchNorm network which a cell starts from; None if no run of this study does."""
        return self.pretraining.original(cell) if self.pretraining is not None and cell.start == "converted" else None

    def of_originals(self) -> Grid:
        """This grid with the settings that ``original`` runs are trained with in place of its cells'."""
        assert self.pretraining is not None
        training = Training(**{name: getattr(self.pretraining, name) for name in Training.model_fields})
        return self.changed(start=("scratch",), training=training, pretraining=None, analysis=False)

    def settings_for(self, cell: Cell) -> dict[str, Any]:
        """The settings of a cell's run, by their names in fine-tuning: it has labels and no teacher.

        >>> grid = Grid(models="resnet8", norms="gn", datasets="digits", batch_sizes=64, training={"steps": 20})
        >>> settings = grid.settings_for(grid.cells()[0])
        >>> settings["steps"], settings["lr"], settings["weight_decay"]
        (20, 0.2, 0.0)
        """
        run = {"batch_size": cell.batch_size, "lr": cell.lr, "seed": cell.seed}
        objective = {"weight_decay": 0.0, "ce": 1.0, "kl": 0.0, "features": 0.0}
        return {**self.training.settings(), **run, **objective, **dict(cell.regularization)}

    def impossible(self, cell: Cell) -> str | None:
        """Why a cell cannot be run, as far as that is known without its network; None if it can.

        >>> grid = Grid(models="resnet8", norms="gn", datasets="digits", batch_sizes=1, regularization={"mixup": 0.2})
        >>> grid.impossible(grid.cells()[0])
        'mixup mixes pairs of images, and batch_size=1 is odd; try an even one'
        """
        given, size, images = dict(cell.regularization), cell.batch_size, self.training.train_images
        for name in ("mixup", "cutmix"):
            if given.get(name) and size % 2:
                return f"{name} mixes pairs of images, and batch_size={size} is odd; try an even one"
        if given.get("distance") and size < 2:
            return f"distance compares the images of a batch, and batch_size={size}; try 2 or more"
        if given.get("reprob") and not self.training.settings()["augment"]:
            return f"reprob={given['reprob']:g} is a part of the augmentation; try augment: true"
        if images is not None and size > images:
            return f"batch_size={size} is more than train_images={images}; try a smaller batch"
        return None


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """The grid of a YAML file. Its name is the file's, unless it has one.

    :raises UsageError: if the file is not YAML, or no grid, in one line: ``study.yaml, line 7: …``.
    """
    document = read_yaml(path)
    values = document.value
    if values is None:
        raise UsageError(f"{document.file} is empty; a study has at least models, norms and datasets")
    try:
        return Grid.from_dict({"name": Path(document.file).stem, **values} if isinstance(values, Mapping) else values)
    except GridError as error:
        # To pydantic, one value is a list of one, and an optimizer is ``opt``, whichever of its two names the file has.
        other = tuple("optimizer" if part == "opt" else part for part in error.path)
        places = [path for path in (error.path, error.path[:1] + error.path[2:], other) if path in document.lines]
        line = document.line(max(places, key=len, default=error.path))
        raise UsageError(f"{document.file}, line {line}: {error}") from error


def find_config(config: str | os.PathLike[str]) -> Path:
    """A file of the user's; otherwise the shipped study of that name, with or without its ending.

    :raises UsageError: if there is neither.

    >>> find_config("quick").name
    'quick.yaml'
    """
    path, shipped = Path(config), shipped_configs()
    if path.exists() and not (path.is_dir() and f"{path}.yaml" in shipped):
        return path
    for name in (str(path), f"{path}.yaml"):
        if name in shipped:
            return CONFIGS / name
    otherwise = f"give the YAML file of a study, or one of {', '.join(shipped)}"
    raise UsageError(f"there is no file {config}; {suggest(path.name, shipped, otherwise, cutoff=0.6)}")


def shipped_configs() -> list[str]:
    """The studies that come with the package."""
    return sorted(path.name for path in CONFIGS.glob("*.yaml"))


# Errors


def _explained(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """The first error of pydantic's in one line, and where it is; unknown keys first, for they explain missing ones."""
    found = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")[0]
    path, value = tuple(found["loc"]), found.get("input")
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, ValidationError):  # of a model inside a validator
        inner, text = _explained(cause)
        return (*path, *inner), text
    if isinstance(cause, _At):
        return (*path, *cause.path), str(cause)
    if found["type"] == "extra_forbidden":
        return path, _unknown_key(path)
    if found["type"] == "missing":
        key = str(path[-1])
        return path[:-1], f"the key {key!r} is missing; add it, as in {key}: {_EXAMPLES[key]}"
    name = next((str(part) for part in reversed(path) if isinstance(part, str)), "the grid")
    name = "optimizer" if name == "opt" else name
    if cause is not None and not str(cause).startswith("should"):  # it names the value itself
        return path, str(cause)
    if value is None:
        return path, f"{name} is empty; give a value, or leave the line out"
    if found["type"] in ("model_type", "model_attributes_type"):
        return path, f"{name}={_shown(value)} should be a mapping, such as {name}: {{epochs: 8}}"
    reason = str(cause) if cause is not None else found["msg"].replace("Input should", "should", 1)
    quotes = "; put it in quotes" if found["type"] == "string_type" and not isinstance(value, (list, dict)) else ""
    return path, f"{name}={_shown(value)} {reason}{quotes}"


def _unknown_key(path: tuple[str | int, ...]) -> str:
    """What a key may have meant, and where it belongs if that is somewhere else."""
    key, (section, *_) = str(path[-1]), (*path[:-1], "")
    models: dict[Any, type[BaseModel]] = {"training": Training, "pretraining": Pretraining, "": Grid}
    if section not in models:
        return f"unknown regularization {_shown(key)}; {suggest(key, (*REGULARIZERS, 'dropout'))}"
    known = [name for name in models[section].model_fields if section != "pretraining" or name not in _OF_THE_STUDY]
    start = f"unknown key {_shown(key)}" + (f" under {section}" if section else "")
    if key in (*REGULARIZERS, "dropout"):
        return f"{start}; it goes under regularization"
    if not section and key in (*Training.model_fields, "optimizer"):
        return f"{start}; it goes under training"
    if section == "pretraining" and key in ("lr", "learning_rates"):
        return f"{start}; did you mean learning_rate?"
    if key in _MEANT:
        axis = _MEANT[key]
        return f"{start}; it is the axis {axis}, next to training" if section else f"{start}; did you mean {axis}?"
    return f"{start}; {suggest(key.replace('-', '_'), [*known, *(['optimizer'] if section else [])], cutoff=0.6)}"
