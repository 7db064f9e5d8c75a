"""``analyze``: statistics, similarity and sensitivity of a network's layers, as one report."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.checks import check_at_least
from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon._util.stopping import Stop, interrupted_by_signals, interruption, signal_of, stopped_by_signals
from normsurgeon._util.suggest import suggest
from normsurgeon.analysis.choosing import KINDS, Layer, choose_layers
from normsurgeon.analysis.comparison import rewritten_layers
from normsurgeon.analysis.findings import find
from normsurgeon.analysis.records import Provenance, Sensitivity, SweepPoint
from normsurgeon.analysis.report import Report
from normsurgeon.analysis.sensitivity.changes import sweep_norms
from normsurgeon.analysis.sensitivity.measure import DEFAULT_METHODS, check_methods, measure_sensitivity
from normsurgeon.analysis.similarity import GROUP
from normsurgeon.analysis.streaming import Pass
from normsurgeon.data.label_ways import Labels
from normsurgeon.distributed import ALONE, from_main_process, is_main_process, own_device, own_shard, together
from normsurgeon.errors import AnalysisStopped, UsageError
from normsurgeon.inference.run import eval_mode, home_of, name_of, placed
from normsurgeon.inference.views import Data, open_views
from normsurgeon.models.checkpoint import origin_of
from normsurgeon.selection.swap_report import SwapSensitivity
from normsurgeon.selection.swap_sensitivity import swap_sensitivity
from normsurgeon.surgery.convert import Conversion
from normsurgeon.surgery.plan import ConversionPlan
from normsurgeon.version import __version__

PARTS = ("statistics", "similarity", "sensitivity", "swap")
DEFAULT_PARTS = PARTS[:3]
MAX_SWAP_IMAGES = 128


def analyze(
    model: nn.Module | Conversion,
    data: Data = "demo",
    *,
    baseline: nn.Module | None = None,
    labels: Labels = "by-name",
    only: Sequence[str] = DEFAULT_PARTS,
    layers: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
    batch_size: int = 16,
    max_images: int | None = None,
    sensitivity_images: int = 32,
    methods: Sequence[str] = DEFAULT_METHODS,
    sweep: bool = False,
    swap_to: str = "gn",
    seed: int = 0,
    device: str | torch.device | None = None,
    workers: int = 0,
    example_inputs: Any = None,
    on_progress: OnProgress | None = None,
    name: str | None = None,
    baseline_name: str | None = None,
    command: str | None = None,
) -> Report:
    """Look inside ``model`` while it sees images: what each layer's output is like, which agree, which matter.

    model        a network, or a Conversion: its network, with what was done to it since
    data         a data spec, an ImageSource or batches, as for ``evaluate``; ``demo`` (photographs that ship in
                 dependencies) if not given
    baseline     a second network, usually the original of a conversion: layers of one name are compared
    labels       as for ``evaluate``; without any, sensitivity is measured with the network's own answers
    only         any of ``statistics``, ``similarity``, ``sensitivity``, and ``swap``: what converting each batch norm
                 does (see ``swap_sensitivity``)
    layers       globs over module paths; none: all modules of the given ``kinds``
    kinds        ``norm``, ``convolution``, ``linear``, ``block`` (residual blocks)
    batch_size   images a batch: nothing depends on it but time and memory. Similarity compares 16 images at a time, and
                 rounds it up to a multiple of that
    max_images   only that many, spread evenly over a data set
    sensitivity_images  the first of them that sensitivity is measured with: it needs several passes with gradients
    swap_to             the norm that ``swap`` puts in the place of each batch norm: ``gn``, ``gn:8``, ``ln``, …
    methods, sweep      which measures of sensitivity, and whether to try other settings of each norm
    seed         of the sample behind the effective rank, of probes and noise
    device       where to run; the models are put back afterwards
    example_inputs  what the model is called with, as for ``convert``: for what surrounds its layers, where that
                 cannot be known from the first of them
    on_progress  called with a Progress after each batch

    Both models run in eval mode without gradients; afterwards they are as they were. One pass over the images for
    statistics and similarity together; memory does not grow with their number.

    Under ``torchrun`` or ``accelerate launch`` every process calls this alike and gets the same report: they share the
    images of statistics, similarity and comparison, batch by batch; sensitivity, which sees few, is the first's alone.

    :raises PatternError: a glob that matches no module.
    :raises UsageError: an unknown part, kind or method, or no image for sensitivity.
    :raises DataError: no images, one that is not finite, or labels that the head cannot have.
    :raises ProcessError: another of several processes failed.
    :raises AnalysisStopped: SIGINT or SIGTERM stopped it; its ``report`` has what was done, if anything was.

    >>> import timm
    >>> net = timm.create_model("test_resnet").eval()
    >>> report = analyze(net, [torch.randn(4, 3, 64, 64)], only=["statistics"], layers=["bn1"])
    >>> report.statistics[0].layer, report.statistics[0].shape
    ('bn1', (32, 32, 32))
    """
    started = time.perf_counter()
    parts = _check_parts(only)
    history = _history(model)
    model = model.model if isinstance(model, Conversion) else model
    assert isinstance(model, nn.Module)
    methods = check_methods(methods)
    check_at_least(1, sensitivity_images=sensitivity_images)
    models = [model] if baseline is None else [model, baseline]
    chosen = choose_layers(model, layers, kinds, example_inputs)
    # A glob that matches no layer of the baseline leaves the model's without a counterpart.
    theirs = choose_layers(baseline, layers, kinds, example_inputs, lenient=True) if baseline is not None else ()
    with ExitStack() as stack:
        stack.enter_context(together())
        for each in models:
            stack.enter_context(placed(each, own_device(device)))
        stack.enter_context(eval_mode(*models))
        look = Pass(chosen, theirs, parts, seed, sensitivity_images if "sensitivity" in parts else 0)
        shard = own_shard() if look.shared else ALONE
        views = open_views(
            data, models, batch_size, max_images, workers, False, shard, True, labels, GROUP if look.similar else 1
        )
        stop = stack.enter_context(stopped_by_signals()) if own_shard().world == 1 else Stop()
        look.run(model, baseline, views, on_progress, stop)
        if not is_main_process():
            return from_main_process(None)
        unfinished = f"after {look.images} of {views.total or 'some'} images" if stop else ""
        sensitivity: tuple[Sensitivity, ...] | None = None
        points: tuple[SweepPoint, ...] = ()
        if "sensitivity" in parts and not stop:
            sensitivity, points = _sensitivity(
                model, look.first_images, layers, chosen, methods, sweep, seed, on_progress, stop
            )
            names = ", ".join(each.method for each in sensitivity or ()) or "nothing"
            unfinished = f"in the sensitivity, of which {names} is done" if stop else ""
        swap: SwapSensitivity | None = None
        if "swap" in parts and not stop:
            try:
                with interrupted_by_signals() if own_shard().world == 1 else nullcontext():
                    swap = swap_sensitivity(
                        model,
                        data,
                        to=swap_to,
                        batch_size=batch_size,
                        max_images=MAX_SWAP_IMAGES if max_images is None else max_images,
                        workers=workers,
                        example_inputs=example_inputs,
                        on_progress=on_progress,
                    )
            except KeyboardInterrupt as error:
                stop.signal, unfinished = signal_of(error), "in swap, of which nothing is kept"
        if stop and not (look.shared or sensitivity):
            raise interruption(stop.signal)
        where = str(home_of(model)[0])
        comparison = None
        if baseline is not None:
            name, baseline_name = _two_names(name or name_of(model), baseline_name or name_of(baseline), history)
            comparison = look.comparison(baseline_name, rewritten_layers(model, baseline, (*chosen, *theirs)))
        report = Report(
            provenance=Provenance(
                model=name or name_of(model),
                baseline=baseline_name,
                data=views.name,
                images=look.images if look.shared or swap is None else swap.images,
                skipped=look.skipped,
                batch_size=batch_size,
                seed=seed,
                device=where,
                labelled=look.labelled,
                max_images=max_images,
                command=command,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                seconds=time.perf_counter() - started,
                versions=_versions(),
                notes=(*look.notes(), *([f"stopped {unfinished}"] if unfinished else [])),
            ),
            statistics=look.statistics.compute() if "statistics" in parts else None,
            baseline_statistics=look.baseline_statistics.compute() if "statistics" in parts and baseline else None,
            similarity=look.similarity() if "similarity" in parts else None,
            comparison=comparison,
            sensitivity=sensitivity,
            sweep=points,
            swap=swap,
            history=history,
        )
        report = replace(report, findings=find(report))
        if stop:
            raise AnalysisStopped(f"stopped by {stop.signal} {unfinished or 'at its end'}", stop.signal, report)
        return from_main_process(report)


def _sensitivity(
    model: nn.Module,
    held: list[tuple[Tensor, Tensor | None]],
    patterns: Sequence[str],
    chosen: tuple[Layer, ...],
    methods: tuple[str, ...],
    sweep: bool,
    seed: int,
    on_progress: OnProgress | None,
    stop: Stop,
) -> tuple[tuple[Sensitivity, ...] | None, tuple[SweepPoint, ...]]:
    """Each method, and the sweep; if a signal stops it, those that are done."""
    total = sum(len(images) for images, _ in held)

    def watch(progress: Progress) -> None:
        if on_progress is not None:
            on_progress(Progress(f"sensitivity: {progress.stage.replace('_', ' ')}", progress.done, total))

    owners = [layer.name for layer in chosen if next(layer.module.parameters(), None) is not None]
    norms = [layer.name for layer in chosen if layer.kind == "norm"]
    found: list[Sensitivity] = []
    points: tuple[SweepPoint, ...] = ()
    try:
        # One of them may run for minutes and puts the network back whatever happens: it is interrupted where it is.
        with interrupted_by_signals() if own_shard().world == 1 else nullcontext():
            for method in methods:
                found += measure_sensitivity(
                    model, held, methods=[method], layers=owners if patterns else None, seed=seed, on_progress=watch
                )
            if sweep and norms:
                points = sweep_norms(model, held, layers=norms if patterns else None, on_progress=watch)
    except KeyboardInterrupt as error:
        stop.signal = signal_of(error)
    return tuple(found) or None, points


def _check_parts(only: Sequence[str]) -> tuple[str, ...]:
    wanted = (only,) if isinstance(only, str) else tuple(only)
    for part in wanted:
        if part not in PARTS:
            raise UsageError(f"there is no part {part!r} of an analysis; {suggest(str(part), PARTS)}")
    if not wanted:
        raise UsageError(f"nothing to analyze: name at least one of {', '.join(PARTS)}")
    return wanted


def _history(model: nn.Module | Conversion) -> tuple[dict[str, Any], ...]:
    """What was done to a network, in plain types: its conversions, and the events that its checkpoint holds.

    A checkpoint does not say when its conversions were: they are put before the first step that takes one.
    """
    network = model.model if isinstance(model, Conversion) else model
    assert isinstance(network, nn.Module)
    origin = origin_of(network)
    done = [dict(event) for event in origin.history]
    place = next((i for i, event in enumerate(done) if event.get("event") in ("calibrate", "reconstruct")), 0)
    done[place:place] = [_conversion(plan) for plan in origin.plans]
    if isinstance(model, Conversion) and model.plan is not None:  # else its origin has the records
        done += [_conversion(model.plan), *model.events]
    return tuple(done)


def _two_names(model: str, baseline: str, history: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What to call a network and its baseline, so that a reader can tell them apart.

    >>> _two_names("resnet50", "resnet50", [{"event": "convert", "to": "gn"}, {"event": "calibrate"}])
    ('resnet50 (gn, calibrate)', 'resnet50 (original)')
    """
    if model != baseline:
        return model, baseline
    done = [str(event.get("to") or event.get("event")) for event in history if event.get("event")]
    return f"{model} ({', '.join(dict.fromkeys(done)) or 'model'})", f"{baseline} (original)"


def _conversion(plan: ConversionPlan) -> dict[str, Any]:
    return {"event": "convert", "to": plan.target, **plan.counts}


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {"normsurgeon": __version__, "python": platform.python_version()}
    for package in ("torch", "timm", "captum"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
