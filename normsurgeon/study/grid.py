"""A study's grid: one YAML file, or a dict, becomes a checked record of axes, and its cells. Imports no torch."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from normsurgeon._util.config import Config, SettingError, cause_of, required_type, setting
from normsurgeon._util.suggest import suggest
from normsurgeon._util.yaml_lines import read_yaml
from normsurgeon.errors import UsageError
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.norms.target_names import TARGET_NAMES
from normsurgeon.study.records import AXES, Cell

MAX_CELLS = 10_000
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
"""Fine-tuning settings that are the axis ``regularization``."""
SHARED = (
    "opt", "momentum", "layer_decay", "sched", "warmup_epochs", "min_lr", "clip_grad", "train_what", "grad_accum",
    "augment", "scale", "ratio", "hflip", "vflip", "color_jitter", "aa", "distance_layers", "precision",
    "channels_last", "compile",
)  # fmt: skip
"""Fine-tuning settings that all cells share."""

_EXAMPLES = {"models": "[resnet8]", "norms": "[bn, gn]", "datasets": "[digits]"}  # of the keys that a grid must have
_GRID_AXES = (
    "models", "datasets", "start", "activations", "preprocessing", "regularization", "batch_sizes", "learning_rates",
    "norms", "seeds",
)  # fmt: skip  # in the order of AXES, which is the order of the cells
_OF_THE_STUDY = ("image_size", "test_images", "judge")  # keys of training that hold for pretrained networks too
_MEANT = {"lr": "learning_rates", "lrs": "learning_rates", "learning_rate": "learning_rates",
          "batch_size": "batch_sizes", "seed": "seeds", "groups": "norms"}  # fmt: skip


# One value


def _shown(value: Any) -> str:
    """A value as a message quotes it: on one line, and not all of a long one."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which Python would count as 0 or 1
        raise ValueError("must be a number")
    return value


def _words(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
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


def _preprocessing(value: Any) -> str:
    return _one_of("pre-processing", "none" if value is None else value, PREPROCESSING)


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[^/\\\x00-\x1f]{1,100}", name) or name.startswith("."):
        raise ValueError("must do as a folder's name: at most 100 characters, without slashes")
    return name


def _listed(value: Any, info: ValidationInfo) -> list[Any]:
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
        raise ValueError(f"seeds={_shown(value)} must be a count, 1 to {MAX_CELLS}, or a list of seeds")
    return list(range(value))


T = TypeVar("T")
Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Rate = Annotated[float, BeforeValidator(_number), Field(gt=0)]
Words = Annotated[str, AfterValidator(_words)]
Axis = Annotated[tuple[T, ...], BeforeValidator(_listed), AfterValidator(lambda found: tuple(dict.fromkeys(found)))]


# What all cells share


class _Section(Config):
    """Settings as a YAML file has them: ``yes`` is a flag, and a number may stand in quotes; a flag is no number."""

    model_config = ConfigDict(strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flags(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and required_type(cls.model_fields[str(info.field_name)]) is not bool:
            raise ValueError("must not be a flag")
        return value


def _finetuning(names: tuple[str, ...], **defaults: Any) -> Any:
    """A model of these settings of fine-tuning, with their types and limits, some with other defaults."""
    found: dict[str, Any] = {}
    for name in names:
        field = copy(FinetuneConfig.model_fields[name])
        field.default = defaults.get(name, field.default)
        found[name] = (field.annotation, field)
    return create_model("_Finetuning", __base__=_Section, **found)


if TYPE_CHECKING:

    class _SharedSettings(_Section): ...

    class _Regularizers(_Section): ...
else:
    _SharedSettings = _finetuning(SHARED, opt="sgd", clip_grad=None, augment=False)
    _Regularizers = _finetuning(REGULARIZERS)


def regularizers(value: Any) -> tuple[tuple[str, float], ...]:
    """One value of the axis: ``none``, or a mapping of training settings; what is 0 anyway is left out.

    :raises SettingError: if a setting is unknown, or cannot have that value.

    >>> regularizers({"weight_decay": 5e-4, "dropout": 0.1, "mixup": 0}), regularizers("none")
    ((('drop', 0.1), ('weight_decay', 0.0005)), ())
    """
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return ()
    if isinstance(value, (tuple, list)) and all(isinstance(v, (tuple, list)) and len(v) == 2 for v in value):
        value = dict(value)
    if not isinstance(value, Mapping):
        text = f"regularization={_shown(value)} must be none or a mapping, such as {{weight_decay: 5.0e-4}}"
        raise SettingError(text)
    for key in value:
        if key not in (*REGULARIZERS, "dropout"):
            text = f"unknown regularization {_shown(key)}; {suggest(str(key), (*REGULARIZERS, 'dropout'))}"
            raise SettingError(text, (key,))
    if "dropout" in value and "drop" in value:
        raise SettingError("'dropout' and 'drop' are the same; give one of them", ("dropout",))
    renamed = {"drop" if key == "dropout" else key: number for key, number in value.items()}
    found = _Regularizers(**renamed).model_dump(exclude_unset=True)
    # A network may have a dropout of its own, which 0 takes away; all others are 0 by themselves.
    return tuple(sorted((name, v) for name, v in found.items() if v or name in ("drop", "drop_path")))


Regularization = Annotated[
    tuple[tuple[str, float], ...], BeforeValidator(regularizers), PlainSerializer(lambda value: dict(value) or "none")
]


class Training(_SharedSettings):
    """How every cell is trained: settings of fine-tuning, and these.

    >>> Training().epochs, Training(steps=100).epochs, Training(optimizer="adamw").settings()["opt"]
    (8, None, 'adamw')
    """

    what: ClassVar[str] = "training"

    epochs: int | None = setting(None, "Passes over the images; 8 if no steps are given.", ge=1)
    steps: int | None = setting(None, "Updates, instead of passes.", ge=1)
    lr_batch_size: int | None = setting(
        32, "The learning rates of the grid are for batches of this size, and scaled linearly for others (Goyal et "
        "al., arXiv:1706.02677): lr · batch_size / lr_batch_size. None: not scaled.", ge=1
    )  # fmt: skip
    train_images: int | None = setting(None, "At most this many, chosen by a fixed seed. None: all.", ge=1)
    test_images: int | None = setting(None, "At most this many, chosen by a fixed seed. None: all.", ge=1)
    image_size: int | None = setting(None, "Height and width in pixels. None: the network's own.", ge=1)
    judge: Literal["last", "epoch"] = setting("last", "Test after every epoch, or at the end alone.")

    def __init__(self, **values: Any) -> None:
        if "optimizer" in values:
            if "opt" in values:
                raise SettingError("'optimizer' and 'opt' are the same; give one of them", ("optimizer",))
            values = {"opt" if key == "optimizer" else key: value for key, value in values.items()}
        if values.get("epochs") is not None and values.get("steps") is not None:
            raise SettingError("give epochs or steps, and not both", ("steps",))
        if values.get("epochs") is None and values.get("steps") is None:
            values["epochs"] = 8
        super().__init__(**values)

    @field_validator("opt", check_fields=False)
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            from timm.optim import list_optimizers  # slow, and needed for rare names only

            known = [str(each) for each in list_optimizers()]
            if name not in known:
                near = suggest(name, known, otherwise="") or suggest(name, OPTIMIZERS)
                raise SettingError(f"unknown optimizer {_shown(name)}; {near}")
        return name

    def settings(self) -> dict[str, Any]:
        """The settings of fine-tuning in it, by their names there."""
        length = {"epochs": self.epochs} if self.steps is None else {"steps": self.steps}
        return {**{name: getattr(self, name) for name in SHARED}, **length}

    def scaled(self, lr: float, batch_size: int) -> float:
        """The learning rate for batches of that size.

        >>> Training(lr_batch_size=32).scaled(0.1, 64), Training(lr_batch_size=None).scaled(0.1, 64)
        (0.2, 0.1)
        """
        return lr if self.lr_batch_size is None else lr * (batch_size / self.lr_batch_size)


class Pretraining(Training):
    """How a BatchNorm network is trained before it is converted, once for each model, activation and seed.

    In a grid, what is not given is as under ``training``.
    """

    what: ClassVar[str] = "pretraining"

    dataset: Words | None = setting(None, "What it is trained on. None: the data set of the cell that starts from it.")
    learning_rate: float = setting(0.1, "For batches of lr_batch_size, scaled like those of the grid.", gt=0)
    batch_size: int = setting(32, "Images per update.", ge=1)
    regularization: Regularization = setting((), "One value of the axis.", must_be="none or a mapping")

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


S = TypeVar("S", bound=Training)


def _section(kind: type[S], values: Any, inherited: Mapping[str, Any] | None = None) -> S:
    """One section of the grid."""
    name = kind.what
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise SettingError(f"{name}={_shown(values)} must be a mapping, such as {name}: {{epochs: 8}}")
    _check_keys(name, values)
    try:
        return kind(**{**(inherited or {}), **values})
    except SettingError as error:
        if error.path != ("opt",) or "optimizer" not in values:
            raise
        # The optimizer is ``opt`` to pydantic, whichever of its two names it was given by.
        raise SettingError(str(error).replace("opt=", "optimizer=", 1), ("optimizer",)) from None


def _pretraining(own: Any, info: ValidationInfo) -> Pretraining | None:
    """Everything that it does not replace is taken from the training."""
    given = own if isinstance(own, Mapping) else {}
    replaced = {"judge"}
    for names in (("epochs", "steps"), ("opt", "optimizer")):
        replaced |= set(names) if any(given.get(name) is not None for name in names) else set()
    inherited = {name: value for name, value in info.data.get("training", ()) if name not in replaced}
    return None if own is None else _section(Pretraining, own, inherited)


# The grid


class Grid(_Section):
    """The axes of a study, and what all its cells share. Every axis takes one value, or a list, and becomes a tuple.

    docs/study.md explains the keys. ``seeds`` is a count (3 is 0, 1, 2) or a list; ``training`` and ``pretraining``
    may be mappings.

    :raises SettingError: if a key or a value is not possible; the nearest name is offered.

    >>> grid = Grid(models="resnet8", norms=["bn", "gn:8"], datasets="digits", seeds=2)
    >>> [(cell.norm, cell.seed) for cell in grid.cells()]
    [('bn', 0), ('bn', 1), ('gn:8', 0), ('gn:8', 1)]
    >>> Grid(models="resnet8", norms="gn", datasets="digits", batchsizes=8)
    Traceback (most recent call last):
    normsurgeon._util.config.SettingError: unknown key 'batchsizes'; did you mean batch_sizes?
    """

    models: Axis[Words]
    norms: Axis[Annotated[str, BeforeValidator(_norm)]]
    datasets: Axis[Words]
    batch_sizes: Axis[Count] = (32,)
    activations: Axis[Annotated[str, BeforeValidator(lambda v: _one_of("activation", v, ACTIVATIONS))]] = ("default",)
    preprocessing: Axis[Annotated[str, BeforeValidator(_preprocessing)]] = ("standard",)
    regularization: Axis[Regularization] = ((),)
    learning_rates: Axis[Rate] = (0.1,)
    start: Axis[Annotated[str, BeforeValidator(lambda v: _one_of("start", v, STARTS))]] = ("scratch",)
    seeds: Annotated[
        Axis[Annotated[int, BeforeValidator(_number), Field(ge=0, le=2**32 - 1)]], BeforeValidator(_seeds)
    ] = (0, 1, 2)  # fmt: skip
    training: Annotated[Training, BeforeValidator(lambda values: _section(Training, values))] = Training()
    pretraining: Annotated[Pretraining | None, BeforeValidator(_pretraining)] = None
    analysis: bool = False
    keep_checkpoints: bool = False
    name: Annotated[Words, AfterValidator(_folder_name)] = "study"
    title: str = ""

    def __init__(self, **values: Any) -> None:
        _check_keys("", values)
        for key, example in _EXAMPLES.items():
            if key not in values:
                raise SettingError(f"the key {key!r} is missing; add it, as in {key}: {example}")
        values = {key: value for key, value in values.items() if value is not None or key not in ("training", "title")}
        try:
            super(Config, self).__init__(**values)
        except ValidationError as error:
            raise _explained(error, values) from None

    @model_validator(mode="after")
    def _checked(self) -> Grid:
        lengths = {axis: len(getattr(self, axis)) for axis in _GRID_AXES}
        if (cells := math.prod(lengths.values())) > MAX_CELLS:
            product = " × ".join(f"{n} {axis.replace('_', ' ')}" for axis, n in lengths.items() if n > 1)
            raise SettingError(f"the grid has {product} = {cells:,} cells, more than {MAX_CELLS:,}; shorten an axis")
        converted, bare = "converted" in self.start, [name for name in self.models if name in SMALL_RESNETS]
        if converted and bare and self.pretraining is None:
            raise SettingError(
                f"start: converted starts from trained weights, and there are none of {bare[0]}; add "
                "pretraining: {epochs: 8}, which trains them, or give a file of weights as the model", ("start",)
            )  # fmt: skip
        if not converted and self.pretraining is not None:
            raise SettingError(
                "pretraining trains the networks that start: converted starts from, and no cell does; "
                "try start: [scratch, converted], or leave it out", ("pretraining",)
            )  # fmt: skip
        for index, name in enumerate(self.models):
            if self.pretraining is not None and os.path.isfile(name):
                raise SettingError(
                    f"{name} is a file of trained weights, and pretraining starts from random ones; "
                    "leave pretraining out, or name the network", ("models", index)
                )  # fmt: skip
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """A grid from the keys of the YAML file; the inverse of ``to_dict``.

        :raises SettingError: if a key is unknown or missing, or a value is not possible.
        """
        if not isinstance(values, Mapping):
            kind = {list: "a list", tuple: "a list", str: "a text"}.get(type(values), _shown(values))
            raise SettingError(f"a study is a mapping with the keys {', '.join(_EXAMPLES)}, …, and this is {kind}")
        return cls(**{str(key): value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON and YAML keep as they are; the keys are those of the file."""
        plain = super().to_dict()
        if self.pretraining is not None:
            for key in _OF_THE_STUDY:
                del plain["pretraining"][key]
        return plain

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
        return self.replace(start=("scratch",), training=training, pretraining=None, analysis=False)

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
    except SettingError as error:
        raise UsageError(f"{document.file}, line {document.line(error.path)}: {error}") from error


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
    by_stem = {Path(name).stem: name for name in shipped}  # all endings are alike, and would make any two names alike
    raise UsageError(f"there is no file {config}; {suggest(path.stem, by_stem, otherwise, cutoff=0.6)}")


def shipped_configs() -> list[str]:
    """The studies that come with the package."""
    return sorted(path.name for path in CONFIGS.glob("*.yaml"))


# Its errors


def _check_keys(section: str, values: Mapping[str, Any]) -> None:
    """:raises SettingError: if a key is unknown: with what it may have meant, or where it belongs."""
    kinds: dict[str, type[Config]] = {"training": Training, "pretraining": Pretraining}
    model = kinds.get(section, Grid)
    known = [name for name in model.model_fields if section != "pretraining" or name not in _OF_THE_STUDY]
    others = (*Training.model_fields, "optimizer")
    for key in map(str, values):
        if key in known or (section and key == "optimizer"):
            continue
        short = _MEANT.get(key)
        if key in (*REGULARIZERS, "dropout"):
            advice = "it goes under regularization"
        elif section == "pretraining" and key in _OF_THE_STUDY:
            advice = "all networks of a study share that of training"
        elif not section and key in others:
            advice = "it goes under training"
        elif short and section == "training":
            advice = f"it is the axis {short}, next to training"
        elif short:
            advice = f"did you mean {short if not section else short.removesuffix('s')}?"
        else:
            names = [*known, "optimizer"] if section else known
            advice = suggest(key.replace("-", "_"), names, cutoff=0.6)
        under = f" under {section}" if section else ""
        raise SettingError(f"unknown key {_shown(key)}{under}; {advice}", (key,))


def _explained(error: ValidationError, values: Mapping[str, Any]) -> SettingError:
    """The first of pydantic's errors in one line, with its place."""
    found = error.errors(include_url=False)[0]
    if len(found["loc"]) == 2 and not isinstance(values[str(found["loc"][0])], (list, tuple)):
        found["loc"] = found["loc"][:1]  # one value is no list
    if (cause := cause_of(found)) is not None:
        return cause
    path, value = found["loc"], found["input"]
    reason = found["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    if not reason.startswith("must"):  # it names the value itself
        return SettingError(reason, path)
    if value is None:
        return SettingError(f"{path[0]} is empty; give a value, or leave the line out", path)
    quotes = "; put it in quotes" if found["type"] == "string_type" and not isinstance(value, (list, dict)) else ""
    return SettingError(f"{path[0]}={_shown(value)} {reason}{quotes}", path)
