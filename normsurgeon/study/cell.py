"""One cell: prepare the images, build the network, train, test, analyse. An error becomes an outcome."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from normsurgeon._util.files import write_atomically
from normsurgeon._util.one_line import one_line
from normsurgeon._util.stopping import interruption
from normsurgeon.analysis.analyze import analyze
from normsurgeon.data.datasets import DataSet, open_data, prepare
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import (
    CheckpointError,
    DivergedError,
    NormSurgeonError,
    TrainingError,
    TrainingStopped,
    UsageError,
)
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.finetuning.finetune import finetune
from normsurgeon.finetuning.record import Curves, FinetuneRecord
from normsurgeon.inference.evaluate import Evaluation, evaluate
from normsurgeon.models import state_dict
from normsurgeon.study.grid import Grid
from normsurgeon.study.networks import build_network
from normsurgeon.study.records import Cell, CellAnalysis, Epoch, LayerSummary, Outcome, finite

ANALYSED_IMAGES = 128
"""Held-out images that a cell is analysed on."""
MAX_POINTS = 60
"""Points of a curve: a longer run has one every few epochs."""
REASON = 1000
"""Characters of an error that are kept."""
KEY = "normsurgeon_study"
"""Where a kept network's file names its cell."""
PRETRAINED = "normsurgeon_pretrained"
"""Where the file of a network that started from a study's own original has the channels of its images."""

OnShare = Callable[[float], None]
"""Called with the share of a cell that is done."""


def data_of(grid: Grid, cell: Cell) -> DataSet:
    """The images of a cell.

    :raises DataError: if there is no such data.
    """
    return open_data(cell.dataset, grid.training.train_images, grid.training.test_images)


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
        outcome = Outcome(cell, "diverged", one_line(error, REASON, kind=False))
    except UsageError as error:
        return Outcome(cell, "skipped", one_line(error, REASON, kind=False))
    except (NormSurgeonError, MemoryError) as error:
        outcome = Outcome(cell, "failed", one_line(error, REASON, kind=False) or "out of memory")
    except Exception as error:  # a cell that fails does not stop the others
        outcome = Outcome(cell, "failed", one_line(error, REASON))
    return replace(Outcome.from_dict(finite(outcome.to_dict())), seconds=time.perf_counter() - start)


def _trained(
    grid: Grid, cell: Cell, keep: Path | None, originals: Path | None, device: str | None, on_share: OnShare | None
) -> Outcome:
    device = device or ("cuda" if torch.cuda.is_available() else None)  # the same for training, testing and analysis
    data = data_of(grid, cell)
    data.check_batch(cell.batch_size)
    model = build_network(cell, data.classes, data.channels, _original(grid, cell, originals, device))
    settings = FinetuneConfig(**grid.settings_for(cell), keep="last")
    train, test = prepare(data, config_of(model, grid.training.image_size), cell.preprocessing, settings)
    by_epoch = grid.training.judge == "epoch"
    before = evaluate(model, test, device=device) if cell.start == "converted" and not by_epoch else None
    tuned = finetune(
        model,
        train,
        (test.dataset if isinstance(test, DataLoader) else test) if by_epoch else None,  # a loader would be listed
        teacher=None,
        **dict(settings),
        device=device,
        on_message=lambda text: None,
        on_progress=lambda step: on_share(step.done / (step.total or 1)) if on_share else None,
    )
    record = tuned.history[-1]
    assert isinstance(record, FinetuneRecord)
    if record.stopped:  # with the last update: the cell could be finished, but the user wants to stop
        raise interruption(record.stopped)
    after = record.after or evaluate(tuned.model, test, device=device)
    before = before or (record.before if cell.start == "converted" else None)
    outcome = Outcome(
        cell,
        "done",
        correct=round((after.top1 or 0.0) * after.images),
        images=after.images,
        loss=after.loss,
        chance=data.chance,
        start_accuracy=before.top1 if before is not None else None,
        curve=_curve(record.curves, after, record.steps),
        steps=record.steps,
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
    with nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory() as place:
        path = network_file(Path(place), original)
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


def _curve(history: Curves, after: Evaluation, steps: int) -> tuple[Epoch, ...]:
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
    state_dict.load_state_dict_into(model, state, str(path), lambda message: None)
    return model.eval()
