"""One cell: prepare the images, build the network, train, test, analyse. An error becomes an outcome."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from normsurgeon._util.files import write_atomically
from normsurgeon.analysis.analyze import analyze
from normsurgeon.data.sources import ImageSource, open_source
from normsurgeon.data.splitting import split_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    NormSurgeonError,
    TrainingError,
    TrainingStopped,
    UsageError,
)
from normsurgeon.finetuning.config import Settings
from normsurgeon.finetuning.feeding import open_split, training_transform
from normsurgeon.finetuning.finetune import finetune
from normsurgeon.finetuning.history import History
from normsurgeon.inference.evaluate import Evaluation, evaluate
from normsurgeon.models import state_dict
from normsurgeon.study.grid import Grid
from normsurgeon.study.networks import build_network
from normsurgeon.study.preprocessing import MAX_IMAGES, Preprocessing, fit
from normsurgeon.study.records import Cell, CellAnalysis, Epoch, LayerSummary, Outcome, finite

HELD_OUT = 0.2
"""Share of a folder without splits that is only tested on."""
MAX_BYTES = 1 << 30
"""Images that take more than this as float32 are read again in every pass."""
TESTED_AT_ONCE = 250
ANALYSED_IMAGES = 128
"""Held-out images that a cell is analysed on."""
MAX_POINTS = 60
"""Points of a curve: a longer run has one every few epochs."""
KEY = "normsurgeon_study"
"""Where a kept network's file names its cell."""
PRETRAINED = "normsurgeon_pretrained"
"""Where the file of a network that started from a study's own original has the channels of its images."""

OnShare = Callable[[float], None]
"""Called with the share of a cell that is done."""


# Images


@dataclass(frozen=True)
class DataSet:
    """Both splits of a data set, before any network is known.

    classes   how many there are; ``channels``: 1 for grey images, else 3
    """

    name: str
    train: ImageSource
    test: ImageSource
    classes: int
    channels: int

    def check_batch(self, batch_size: int) -> None:
        """:raises UsageError: if no batch can be filled: a smaller one would have another batch's learning rate."""
        if batch_size > len(self.train):
            raise UsageError(
                f"batch_size={batch_size} is more than the {len(self.train)} training images of {self.name}; "
                "try a smaller batch"
            )

    def fingerprint(self) -> str:
        """The same for the same images by number, name and class names; contents are not read."""
        hashed = hashlib.sha256(repr((self.classes, self.channels, self.train.class_names)).encode())
        for source in (self.train, self.test):
            for index in range(len(source)):
                hashed.update(source.name_of(index).encode() + b"\0")
        return hashed.hexdigest()[:16]


def data_of(grid: Grid, cell: Cell) -> DataSet:
    """The images of a cell.

    :raises DataError: if there is no such data.
    """
    return open_data(cell.dataset, grid.training.train_images, grid.training.test_images)


@lru_cache(maxsize=8)
def open_data(name: str, train_images: int | None = None, test_images: int | None = None) -> DataSet:
    """The training and the test images of a data spec, at most that many of each, the same ones every time.

    Data that comes in splits gives its own; of a folder of class folders a fifth is held out.

    :raises DataError: if there is no such data, or the images have no labels.

    >>> data = open_data("digits", 100)
    >>> len(data.train), len(data.test), data.classes, data.channels
    (100, 360, 10, 1)
    """
    train = open_split(name, None, training=True)
    test = open_split(name, None, training=False)
    if not train.labelled:
        raise DataError(f"the images of {name} have no labels, and a study compares accuracies; try class folders")
    if train.streamed or test.streamed:
        raise DataError(f"{name} is a stream, and a study shuffles; try a folder, or a torch/… data set")
    same = len(train) == len(test) and all(train.name_of(i) == test.name_of(i) for i in (0, len(train) - 1))
    if os.path.isdir(name) and same:
        whole = open_source(name)
        train, test = split_source(whole, max(1, round(HELD_OUT * len(whole))), seed=0)
    if train.class_names and test.class_names and train.class_names != test.class_names:
        missing = sorted(set(train.class_names) ^ set(test.class_names))
        raise DataError(
            f"{name} has other classes to train on than to test on ({', '.join(missing[:5])} in one of them alone); "
            "give both the same class folders"
        )
    classes = len(train.class_names) if train.class_names else 1 + max(_labels(train))
    if train_images is not None and train_images < len(train):
        train = split_source(train, train_images, seed=1)[1]
    if test_images is not None and test_images < len(test):
        test = split_source(test, test_images, seed=2)[1]
    first, _ = next(train.samples())
    return DataSet(name, train, test, classes, 1 if first.mode in ("L", "1", "I;16", "I") else 3)


def _labels(source: ImageSource) -> Iterator[int]:
    known = getattr(source.reader, "labels", None)
    if known is not None:
        return (int(label) for label in known)
    return (int(label or 0) for _, label in source.samples())


class _Lazy(Dataset[Any]):
    """Images that are read, transformed and pre-processed as they are needed."""

    def __init__(self, source: ImageSource, transform: Callable[[Any], Tensor], preprocessing: Preprocessing) -> None:
        self.source, self.transform, self.preprocessing = source, transform, preprocessing

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return self.preprocessing(self.transform(image)[None])[0], int(label or 0)


def prepare(data: DataSet, config: DataConfig, preprocessing: str, settings: Settings) -> tuple[Any, Any]:
    """Both splits, pre-processed as fitted on the training images: batches (images, labels) in memory, or a Dataset.

    config    of the network: its input size, interpolation and crop; ``preprocessing="model"`` takes its mean and std

    :raises UsageError: if the pre-processing cannot take these images (ZCA of large ones).
    :raises DataError: if an image cannot be read.
    """
    plain = replace(config, mean=(0.0,) * config.input_size[0], std=(1.0,) * config.input_size[0])
    fitted = _fitted(data, plain, (config.mean, config.std) if preprocessing == "model" else None, preprocessing)
    test = _whole(data.test, plain, fitted)
    if not settings.augment:
        return _whole(data.train, plain, fitted), test
    return _Lazy(data.train, training_transform(plain, settings, grey=data.channels == 1), fitted), test


def _whole(source: ImageSource, config: DataConfig, fitted: Preprocessing) -> Any:
    """All images in memory if they fit; else a Dataset that reads them in every pass."""
    channels, height, width = config.input_size
    if 4 * channels * height * width * len(source) <= MAX_BYTES:
        return _held(source, config, fitted)
    return _Lazy(source, config.transform(), fitted)


@lru_cache(maxsize=4)
def _held(source: ImageSource, config: DataConfig, fitted: Preprocessing) -> list[tuple[Tensor, Tensor]]:
    transform, batches = config.transform(), []
    for first in range(0, len(source), TESTED_AT_ONCE):
        samples = [source[i] for i in range(first, min(first + TESTED_AT_ONCE, len(source)))]
        images = torch.stack([transform(image) for image, _ in samples])
        batches.append((fitted(images), torch.tensor([int(label or 0) for _, label in samples])))
    return batches


@lru_cache(maxsize=8)
def _fitted(data: DataSet, config: DataConfig, own: Any, name: str) -> Preprocessing:
    transform = config.transform()
    numbers = range(0, len(data.train), -(-len(data.train) // MAX_IMAGES))  # spread evenly over the split

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(numbers), TESTED_AT_ONCE):
            chosen = numbers[first : first + TESTED_AT_ONCE]
            yield torch.stack([transform(data.train[i][0]) for i in chosen])

    return fit(name, batches(), own=own)


def clear_caches() -> None:
    """Free the images in memory, and read folders again when they are next opened."""
    for cached in (open_data, _held, _fitted):
        cached.cache_clear()


# A cell


def run_cell(
    grid: Grid,
    cell: Cell,
    *,
    keep: Path | None = None,
    originals: Path | None = None,
    device: str | None = None,
    on_share: OnShare | None = None,
) -> Outcome:
    """What comes of a cell. Everything but an interruption becomes an outcome, with one line that states why.

    keep         a file for the trained network
    originals    the folder of the networks that converted cells start from; one that is not there is trained first
    on_share     called after each update

    >>> grid = Grid(models="resnet8", norms="gn", datasets="digits", training={"steps": 2, "train_images": 64})
    >>> run_cell(grid, grid.cells()[0]).status
    'done'
    """
    start = time.perf_counter()
    try:
        reason = grid.impossible(cell)
        if reason is not None:
            return Outcome(cell, "skipped", reason)
        outcome = _trained(grid, cell, keep, originals, device, on_share)
    except (KeyboardInterrupt, TrainingStopped):
        raise
    except DivergedError as error:
        outcome = Outcome(cell, "diverged", _line(error))
    except UsageError as error:
        return Outcome(cell, "skipped", _line(error))
    except (NormSurgeonError, MemoryError) as error:
        outcome = Outcome(cell, "failed", _line(error) or "out of memory")
    except Exception as error:  # a cell that fails does not stop the others
        outcome = Outcome(cell, "failed", f"{type(error).__name__}: {_line(error)}")
    return replace(Outcome.from_dict(finite(outcome.to_dict())), seconds=time.perf_counter() - start)


def _trained(
    grid: Grid, cell: Cell, keep: Path | None, originals: Path | None, device: str | None, on_share: OnShare | None
) -> Outcome:
    device = device or ("cuda" if torch.cuda.is_available() else None)  # the same for training, testing and analysis
    data = data_of(grid, cell)
    data.check_batch(cell.batch_size)
    model = build_network(cell, data.classes, data.channels, _original(grid, cell, originals, device))
    settings = Settings(**grid.settings_for(cell), keep="last")
    train, held_out = prepare(data, config_of(model, grid.training.image_size), cell.preprocessing, settings)
    test = DataLoader(held_out, batch_size=64) if isinstance(held_out, _Lazy) else held_out
    by_epoch = grid.training.judge == "epoch"
    before = evaluate(model, test, device=device) if cell.start == "converted" and not by_epoch else None
    tuned = finetune(
        model,
        train,
        held_out if by_epoch else None,  # not the loader, which would be read into a list
        teacher=None,
        settings=settings,
        device=device,
        say=lambda text: None,
        on_progress=lambda row: on_share(row["step"] / row["steps"]) if on_share else None,
    )
    if tuned.stopped:  # with the last update: the cell could be finished, but the user wants to stop
        raise KeyboardInterrupt
    after = tuned.after or evaluate(tuned.model, test, device=device)
    before = before or (tuned.before if cell.start == "converted" else None)
    outcome = Outcome(
        cell,
        "done",
        correct=round((after.top1 or 0.0) * after.images),
        images=after.images,
        loss=after.loss,
        start_accuracy=before.top1 if before is not None else None,
        curve=_curve(tuned.history, after, tuned.steps),
        steps=tuned.steps,
    )
    if after.nonfinite or after.loss is None:
        reason = f"the trained network's answers are not finite for {after.nonfinite} of {after.images} images"
        return replace(outcome, status="diverged", reason=reason, correct=None, images=None, loss=None)
    if keep is not None:
        keep_network(tuned.model, cell, keep, pretrained=grid.original(cell) is not None)
    if grid.analysis:
        outcome = replace(outcome, analysis=_analysed(tuned.model, test, device))
    return outcome


def _original(grid: Grid, cell: Cell, folder: Path | None, device: str | None) -> nn.Module | None:
    """The trained BatchNorm network that a cell starts from; None if no run of this study trains it.

    It is read back from its file even if it has just been trained, so that every cell starts from the same numbers.
    """
    original = grid.original(cell)
    if original is None:
        return None
    with tempfile.TemporaryDirectory() as own:
        path = network_file(folder or Path(own), original)
        below = grid.of_originals()
        if not path.is_file():  # the study trains it before its cells; a worker that shares no disk trains its own
            outcome = run_cell(below, original, keep=path, device=device)
            if outcome.status != "done":
                raise TrainingError(lost_original(outcome))
        data = data_of(below, original)
        return load_kept(path, data.classes, data.channels)


def lost_original(outcome: Outcome) -> str:
    """Why a cell cannot start: what came of the network that it starts from."""
    advice = "; try a lower learning_rate under pretraining" if outcome.status == "diverged" else ""
    what = "was skipped" if outcome.status == "skipped" else outcome.status
    return f"the BatchNorm network that it starts from {what}: {outcome.reason}{advice}"


def config_of(model: nn.Module, size: int | None) -> DataConfig:
    """How a network reads images; of another size if the study gives one."""
    config = DataConfig.of(model)
    return config if size is None else replace(config, input_size=(config.input_size[0], size, size))


def _curve(history: History, after: Evaluation, steps: int) -> tuple[Epoch, ...]:
    """A point after every epoch, of at most ``MAX_POINTS`` evenly spread, the last one with the result."""
    judged = {row["step"]: row for row in history.epochs if row["step"]}
    last = history.steps[-1]["epoch"] if history.steps else 0.0
    per_epoch = steps / last if last else steps
    ends = sorted({min(steps, round(per_epoch * k)) for k in range(1, int(last) + 2)} | {steps})
    every = -(-len(ends) // MAX_POINTS)
    points, begin = [], 0
    for end in ends[len(ends) - 1 :: -every][::-1]:
        losses = [row["loss"] for row in history.steps if begin < row["step"] <= end]
        found = {"top1": after.top1, "loss": after.loss} if end == steps else judged.get(end, {})
        mean = sum(losses) / len(losses) if losses else None
        points.append(Epoch(end / per_epoch, end, mean, found.get("top1"), found.get("loss")))
        begin = end
    return tuple(points)


def _analysed(model: nn.Module, test: Iterable[Any], device: str | None) -> CellAnalysis:
    report = analyze(model.eval(), test, max_images=ANALYSED_IMAGES, batch_size=32, methods=("fisher",), device=device)
    scores = {score.name: score.score for each in report.sensitivity or () for score in each.layers}
    same = ("layer", "kind", "channels", "mean", "std", "zero_fraction", "effective_rank", "group_fluctuation")
    layers = tuple(
        LayerSummary(
            **{name: getattr(layer, name) for name in same},
            dead_fraction=layer.dead_channels / layer.channels if layer.channels else None,
            sensitivity=scores.get(layer.layer),
        )
        for layer in report.statistics or ()
    )
    similarity = report.similarity
    return CellAnalysis(layers) if similarity is None else CellAnalysis(layers, similarity.layers, similarity.cka)


# Kept networks


def network_file(folder: Path, cell: Cell) -> Path:
    """Where a cell's network is kept, in a folder of networks."""
    return folder / f"{cell.key}.safetensors"


def keep_network(model: nn.Module, cell: Cell, path: Path, pretrained: bool = False) -> None:
    """Write a trained network's weights, with its cell; atomically.

    pretrained  whether it started from a network that the study trained itself

    :raises CheckpointError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    about = {KEY: json.dumps(cell.to_dict(), sort_keys=True)}
    if pretrained:
        about[PRETRAINED] = json.dumps(DataConfig.of(model).input_size[0])
    write_atomically(path, lambda place: state_dict.write_safetensors(place, state, about))


def load_kept(path: str | Path, classes: int, channels: int) -> nn.Module:
    """A network that a study kept, in eval mode.

    classes, channels  of its data set (channels: 1 for grey images)

    :raises CheckpointError: if no study wrote the file.
    """
    state, rest = state_dict.read_file(path)
    text = rest.get(KEY)
    if text is None:
        raise CheckpointError(f"{path} is no network that a study kept; try normsurgeon.load")
    cell, original = Cell.from_dict(json.loads(text)), None
    if PRETRAINED in rest:  # the layers are those of any such original; the weights come from the file
        original = build_network(replace(cell, start="scratch", norm="bn"), classes, int(rest[PRETRAINED]))
    model = build_network(cell, classes, channels, original)
    state_dict.fit(model, state, str(path), lambda message: None)
    return model.eval()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
