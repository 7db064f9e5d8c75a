"""One cell: build the network, prepare the images, train, test, look inside. An error becomes an outcome."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from normsurgeon._util.files import write_atomically
from normsurgeon._util.progress import OnProgress
from normsurgeon.analysis.analyze import analyze
from normsurgeon.analysis.report import Report
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
from normsurgeon.finetuning.curves import Curves
from normsurgeon.finetuning.finetune import finetune
from normsurgeon.finetuning.record import FinetuneRecord
from normsurgeon.inference.evaluate import Evaluation, evaluate
from normsurgeon.models.state_dict import load_state_dict_into, read_file, write_safetensors
from normsurgeon.study.grid import Grid
from normsurgeon.study.networks import build_network
from normsurgeon.study.originals import original_data
from normsurgeon.study.preparing import open_data, prepare
from normsurgeon.study.records import Cell, Epoch, LayerSummary, Looked, Outcome, finite

ANALYSED = 128
"""Held-out images that the analysis of a cell looks at."""

MOST_POINTS = 60
"""Points of a curve: a longer run has one every few epochs."""

KEY = "normsurgeon_study"
"""Where a kept network's file names its cell."""

PRETRAINED = "normsurgeon_pretrained"
"""Where the file of a network that began from a study's own original has the channels of its images."""


def run_cell(
    grid: Grid,
    cell: Cell,
    *,
    keep: Path | None = None,
    originals: Path | None = None,
    device: str | None = None,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """What comes of a cell. Everything but an interruption becomes an outcome, with one line that says why.

    keep         a file for the trained network
    originals    the folder of the networks that converted cells begin from; one that is not there is trained first
    on_progress  called after each update (see ``finetune``)

    >>> grid = Grid(models="resnet8", norms="gn", datasets="digits", training={"steps": 2, "train_images": 64})
    >>> run_cell(grid, grid.cells()[0]).status
    'done'
    """
    began = time.perf_counter()
    try:
        reason = grid.impossible(cell)
        if reason is not None:
            return Outcome(cell, "skipped", reason)
        outcome = _trained(grid, cell, keep, originals, device, on_progress)
    except (KeyboardInterrupt, TrainingStopped):
        raise
    except DivergedError as error:
        outcome = Outcome(cell, "diverged", _line(error))
    except UsageError as error:
        return Outcome(cell, "skipped", _line(error))
    except (NormSurgeonError, MemoryError) as error:
        outcome = Outcome(cell, "failed", _line(error) or "out of memory")
    except Exception as error:  # a cell that fails is not in the way of the others
        outcome = Outcome(cell, "failed", f"{type(error).__name__}: {_line(error)}")
    return replace(finite(outcome), seconds=time.perf_counter() - began)


def _trained(
    grid: Grid,
    cell: Cell,
    keep: Path | None,
    originals: Path | None,
    device: str | None,
    on_progress: OnProgress | None,
) -> Outcome:
    shared = grid.training
    device = device or ("cuda" if torch.cuda.is_available() else None)  # the same for training, testing and analysis
    data = open_data(cell.dataset, shared.train_images, shared.test_images)
    data.check_batch(cell.batch_size)
    model = build_network(cell, data.classes, data.channels, _original(grid, cell, originals, device))
    config = config_of(model, shared.image_size)
    settings = FinetuneConfig(**grid.settings_for(cell), keep="last")
    images = prepare(data, config, cell.preprocessing, settings)
    by_epoch = shared.judge == "epoch"
    before = evaluate(model, images.test, device=device) if cell.start == "converted" and not by_epoch else None
    judged = images.test.dataset if isinstance(images.test, DataLoader) else images.test  # a loader would be listed
    tuned = finetune(
        model,
        images.train,
        judged if by_epoch else None,
        teacher=None,
        **dict(settings),
        device=device,
        on_message=lambda text: None,
        on_progress=on_progress,
    )
    record = tuned.history[-1]
    assert isinstance(record, FinetuneRecord)
    if record.stopped:  # with the last update: the cell could be finished, and whoever asked would wait in vain
        raise KeyboardInterrupt
    after = record.after or evaluate(tuned.model, images.test, device=device)
    before = before or (record.before if cell.start == "converted" else None)
    outcome = Outcome(
        cell,
        "done",
        correct=round((after.top1 or 0.0) * after.images),
        images=after.images,
        loss=after.loss,
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
        outcome = replace(outcome, looked=_looked(tuned.model, images.test, device))
    return outcome


def _original(grid: Grid, cell: Cell, folder: Path | None, device: str | None) -> nn.Module | None:
    """The trained BatchNorm network that a cell begins from; None where no run of this study trains it.

    It is read back from its file also where it has just been trained, so that every cell begins from the same numbers.
    """
    original = grid.original(cell)
    if original is None:
        return None
    with tempfile.TemporaryDirectory() as own:
        path = work_file(folder or Path(own), original)
        if not path.is_file():  # the study trains it before its cells; a worker that shares no disk trains its own
            outcome = run_cell(grid.of_originals(), original, keep=path, device=device)
            if outcome.status != "done":
                raise TrainingError(lost_original(outcome))
        data = original_data(grid, original)
        return load_kept(path, data.classes, data.channels)


def lost_original(outcome: Outcome) -> str:
    """Why a cell cannot begin: what came of the network that it begins from."""
    advice = "; try a lower learning_rate under pretraining" if outcome.status == "diverged" else ""
    what = "was skipped" if outcome.status == "skipped" else outcome.status
    return f"the BatchNorm network that it begins from {what}: {outcome.reason}{advice}"


def work_file(networks: Path, cell: Cell) -> Path:
    """Where a cell's network is kept, in a folder of networks.

    >>> work_file(Path("networks"), Cell("resnet8", "digits")).suffix
    '.safetensors'
    """
    return networks / f"{cell.key}.safetensors"


def config_of(model: nn.Module, size: int | None) -> DataConfig:
    """How a network reads images; of another size where the study says so."""
    config = DataConfig.of(model)
    if size is not None:
        config = replace(config, input_size=(config.input_size[0], size, size))
    return config


def _curve(history: Curves, after: Evaluation, steps: int) -> tuple[Epoch, ...]:
    """A point after every epoch, of at most ``MOST_POINTS`` evenly spread, the last one with the result."""
    judged = {row["step"]: row for row in history.epochs if row["step"]}
    last = history.steps[-1]["epoch"] if history.steps else 0.0
    per_epoch = steps / last if last else steps
    ends = sorted({min(steps, round(per_epoch * k)) for k in range(1, int(last) + 2)} | {steps})
    every = -(-len(ends) // MOST_POINTS)
    ends = ends[len(ends) - 1 :: -every][::-1]
    points, begin = [], 0
    for end in ends:
        losses = [row["loss"] for row in history.steps if begin < row["step"] <= end]
        found = judged.get(end, {})
        accuracy, loss = found.get("top1"), found.get("loss")
        if end == steps:
            accuracy, loss = after.top1, after.loss
        mean = sum(losses) / len(losses) if losses else None
        points.append(Epoch(end / per_epoch, end, mean, accuracy, loss))
        begin = end
    return tuple(points)


def _looked(model: nn.Module, test: Iterable[Any], device: str | None) -> Looked:
    report = analyze(model.eval(), test, max_images=ANALYSED, batch_size=32, methods=("fisher",), device=device)
    scores = {score.name: score.score for each in report.sensitivity or () for score in each.layers}
    return Looked(tuple(_layers(report, scores)), *_similarity(report))


def _layers(report: Report, scores: dict[str, float | None]) -> Iterable[LayerSummary]:
    for layer in report.statistics or ():
        yield LayerSummary(
            layer=layer.layer,
            kind=layer.kind,
            channels=layer.channels,
            mean=layer.mean,
            std=layer.std,
            zero_fraction=layer.zero_fraction,
            dead_fraction=layer.dead_channels / layer.channels if layer.channels else None,
            effective_rank=layer.effective_rank,
            group_fluctuation=layer.group_fluctuation,
            sensitivity=scores.get(layer.layer),
        )


def _similarity(report: Report) -> tuple[tuple[str, ...], tuple[tuple[float | None, ...], ...]]:
    found = report.similarity
    return (found.layers, found.cka) if found is not None else ((), ())


def keep_network(model: nn.Module, cell: Cell, path: Path, pretrained: bool = False) -> None:
    """Write a trained network's weights, with its cell; atomically.

    pretrained  whether it began from a network that the study trained itself

    :raises CheckpointError: a file that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    text = json.dumps(cell.to_dict(), sort_keys=True)
    about = {KEY: text}
    if pretrained:
        about[PRETRAINED] = json.dumps(DataConfig.of(model).input_size[0])
    write_atomically(path, lambda place: write_safetensors(place, state, about))


def load_kept(path: str | Path, classes: int, channels: int) -> nn.Module:
    """A network that a study kept, in eval mode.

    classes, channels  of its data set (channels: 1 for grey images)

    :raises CheckpointError: a file that no study wrote.
    """
    state, rest = read_file(path)
    text = rest.get(KEY)
    if text is None:
        raise CheckpointError(f"{path} is no network that a study kept; try normsurgeon.load")
    cell, original = Cell.from_dict(json.loads(text)), None
    if PRETRAINED in rest:  # the layers are those of any such original; the weights come from the file
        original = build_network(replace(cell, start="scratch", norm="bn"), classes, int(rest[PRETRAINED]))
    model = build_network(cell, classes, channels, original)
    load_state_dict_into(model, state, str(path), lambda message: None)
    return model.eval()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
