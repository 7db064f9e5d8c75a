"""``analyze``: statistics, similarity and sensitivity of a network's layers, as one report."""

from __future__ import annotations

import difflib
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.analysis.capture import Receiver, captured
from normsurgeon.analysis.comparison import PairCollector, rewritten_layers
from normsurgeon.analysis.findings import find
from normsurgeon.analysis.layers import KINDS, Layer, choose_layers
from normsurgeon.analysis.sensitivity.measure import DEFAULT_METHODS, check_methods, measure_sensitivity
from normsurgeon.analysis.sensitivity.sweep import sweep_norms
from normsurgeon.analysis.similarity import Kernels, SimilarityCollector
from normsurgeon.analysis.statistics import StatisticsCollector
from normsurgeon.errors import DataError, PatternError, UsageError
from normsurgeon.evaluation import compare_logits
from normsurgeon.inference import eval_mode, first_tensor, home_of, name_of, placed
from normsurgeon.reporting.records import Comparison, Provenance, Report, Sensitivity, Similarity, SweepPoint
from normsurgeon.version import __version__
from normsurgeon.views import Data, Views, open_views

PARTS = ("statistics", "similarity", "sensitivity")

Progress = Callable[[str, int, "int | None"], None]


def analyze(
    model: nn.Module,
    data: Data = "demo",
    *,
    baseline: nn.Module | None = None,
    only: Sequence[str] = PARTS,
    layers: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
    batch_size: int = 16,
    max_images: int | None = None,
    sensitivity_images: int = 32,
    methods: Sequence[str] = DEFAULT_METHODS,
    sweep: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_progress: Progress | None = None,
    name: str | None = None,
    baseline_name: str | None = None,
    command: str | None = None,
) -> Report:
    """Look inside ``model`` while it sees images: what each layer's output is like, which agree, which matter.

    data         a data spec, an ImageSource or batches, as for ``evaluate``; ``demo`` (photographs that ship in
                 dependencies) if not given
    baseline     a second network, usually the original of a conversion: layers of one name are compared
    only         any of ``statistics``, ``similarity``, ``sensitivity``
    layers       globs over module paths; none: all modules of the given ``kinds``
    kinds        ``norm``, ``convolution``, ``linear``, ``block`` (residual blocks)
    batch_size   images a batch; statistics do not depend on it, debiased CKA is averaged over batches of it
    max_images   only so many, spread evenly over a data set
    sensitivity_images  the first of them that sensitivity is measured with: it needs several passes with gradients
    methods, sweep      which measures of sensitivity, and whether to try other settings of each norm
    seed         of the sample behind the effective rank, of probes and noise
    device       where to run; the models are put back afterwards
    on_progress  is told what is being done, how much is done, and how much there is (None: not known)

    Both models run in eval mode without gradients; afterwards they are as they were. One pass over the images for
    statistics and similarity together; memory does not grow with their number.

    :raises PatternError: a glob that matches no module.
    :raises UsageError: an unknown part, kind or method.
    :raises DataError: no images.

    >>> import timm
    >>> net = timm.create_model("test_resnet").eval()
    >>> report = analyze(net, [torch.randn(4, 3, 64, 64)], only=["statistics"], layers=["bn1"])
    >>> report.statistics[0].layer, report.statistics[0].shape
    ('bn1', (32, 32, 32))
    """
    started = time.perf_counter()
    parts = _check_parts(only)
    methods = check_methods(methods)
    models = [model] if baseline is None else [model, baseline]
    chosen = choose_layers(model, layers, kinds)
    theirs = _counterparts(baseline, layers, kinds) if baseline is not None else ()
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(placed(each, device))
        stack.enter_context(eval_mode(*models))
        views = open_views(data, models, batch_size, max_images, workers, classifiers=False)
        look = _Pass(chosen, theirs, parts, seed, sensitivity_images if "sensitivity" in parts else 0)
        look.run(model, baseline, views, on_progress)
        sensitivity, points = _sensitivity(model, look.held, layers, chosen, methods, sweep, seed, parts, on_progress)
        where = str(home_of(model)[0])
    baseline_name = baseline_name or (name_of(baseline) if baseline is not None else None)
    report = Report(
        provenance=Provenance(
            model=name or name_of(model),
            baseline=baseline_name,
            data=views.name,
            images=look.images,
            skipped=len(views.skipped) + look.left_out,
            batch_size=batch_size,
            seed=seed,
            device=where,
            labelled=look.labelled,
            max_images=max_images,
            command=command,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=time.perf_counter() - started,
            versions=_versions(),
            notes=look.notes(),
        ),
        statistics=look.statistics.results() if "statistics" in parts else None,
        baseline_statistics=look.baseline_statistics.results() if "statistics" in parts and baseline else None,
        similarity=look.similarity() if "similarity" in parts else None,
        comparison=look.comparison(baseline_name or "", "similarity" in parts) if baseline is not None else None,
        sensitivity=sensitivity,
        sweep=points,
    )
    return replace(report, findings=find(report))


@dataclass
class _Pass:
    """The one pass over the images, and everything that is summed up in it."""

    layers: tuple[Layer, ...]
    baseline_layers: tuple[Layer, ...]
    parts: tuple[str, ...]
    seed: int
    hold: int
    images: int = 0
    left_out: int = 0
    labelled: bool = False
    agreeing: int = 0
    kl: float = 0.0
    compared: int = 0
    held: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.statistics = StatisticsCollector(self.layers, self.seed)
        self.baseline_statistics = StatisticsCollector(self.baseline_layers, self.seed)
        self.kernels = Kernels(with_grids=True)
        self.baseline_kernels = Kernels()
        self.within, self.between = SimilarityCollector(), SimilarityCollector()
        self.pairs = PairCollector()

    def run(self, model: nn.Module, baseline: nn.Module | None, views: Views, progress: Progress | None) -> None:
        """Both networks over all images, batch by batch: the baseline first."""
        for images, labels in views:
            images, labels = self._finite(images, labels)
            count = len(images[0])
            if not count:
                continue
            self.labelled = labels is not None
            self._hold(images[0], labels)
            self.images += count
            self.pairs.begin(count)
            theirs = None
            if baseline is not None:
                kernels = self.baseline_kernels if self.similar else None
                receivers: list[Receiver] = [self.pairs.on_baseline]
                theirs = self._forward(
                    baseline, self.baseline_layers, images[-1], self.baseline_statistics, kernels, receivers
                )
            receivers = [self.pairs.on_output] if baseline is not None else []
            kernels = self.kernels if self.similar else None
            ours = self._forward(model, self.layers, images[0], self.statistics, kernels, receivers)
            self._agree(ours, theirs)
            if self.similar:
                self.within.add(self.kernels)
                if baseline is not None:
                    self.between.add(self.kernels, self.baseline_kernels)
            if progress is not None:
                progress("looking at layers", self.images + len(views.skipped), views.total)
        if not self.images:
            raise DataError(
                f"there are no images to analyze in {views.name}"
                + (f": all {self.left_out} hold values that are not finite" if self.left_out else "")
                + "; try another --data, or demo"
            )

    @property
    def similar(self) -> bool:
        """Whether similarity was asked for."""
        return "similarity" in self.parts

    def _forward(
        self,
        model: nn.Module,
        layers: tuple[Layer, ...],
        images: Tensor,
        statistics: StatisticsCollector,
        kernels: Kernels | None,
        receivers: list[Receiver],
    ) -> Tensor | None:
        counting = "statistics" in self.parts or bool(self.baseline_layers)
        if counting:
            statistics.begin(len(images))
            receivers = [*receivers, statistics.on_output]
        if kernels is not None:
            kernels.begin(len(images))
            receivers = [*receivers, kernels.on_output]

        def receive(layer: Layer, x: Tensor) -> None:
            for receiver in receivers:
                receiver(layer, x)

        device, dtype = home_of(model)
        images = images.to(device, dtype if images.is_floating_point() else None)
        # no_grad and not inference_mode: tensors must keep their version, which tells whether one was overwritten.
        with torch.no_grad(), captured(layers, receive, statistics.on_input if counting else None):
            return first_tensor(model(images))

    def _finite(self, images: tuple[Tensor, ...], labels: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The images whose pixels are all finite."""
        fine = torch.stack([view.isfinite().flatten(1).all(1) for view in images]).all(0)
        if fine.all():
            return images, labels
        self.left_out += int((~fine).sum())
        return tuple(view[fine] for view in images), labels[fine.to(labels.device)] if labels is not None else None

    def _hold(self, images: Tensor, labels: Tensor | None) -> None:
        room = self.hold - sum(len(held) for held, _ in self.held)
        if room > 0:
            self.held.append((images[:room].clone(), labels[:room].clone() if labels is not None else None))

    def _agree(self, ours: Tensor | None, theirs: Tensor | None) -> None:
        if ours is None or theirs is None or ours.ndim != 2 or ours.shape != theirs.shape:
            return
        same, kl = compare_logits(ours.cpu().double(), theirs.cpu().double())
        self.agreeing, self.kl, self.compared = self.agreeing + same, self.kl + kl, self.compared + len(ours)

    def similarity(self) -> Similarity:
        """The record of the layers' similarity within the model."""
        cka, cosine, gram_cosine = self.within.matrices()
        sizes = [self.kernels.sizes[name] for name in self.within.rows]
        within = self.within
        return Similarity(within.rows, cka, cosine, gram_cosine, within.images, within.smallest, within.notes(sizes))

    def comparison(self, baseline: str, similar: bool) -> Comparison:
        """The record of the model beside its baseline."""
        mine = {record.layer: record for record in self.statistics.results()}
        theirs = {record.layer: record for record in self.baseline_statistics.results()}
        rows = self.between.rows if similar else tuple(mine)
        columns = self.between.columns if similar else tuple(theirs)
        cka, _, gram_cosine = self.between.matrices() if similar else (None, None, None)
        notes: tuple[str, ...] = ()
        if not set(mine) & set(theirs):
            notes = ("no layer of the model has the name of one of the baseline's: only whole matrices compare",)
        rewritten = rewritten_layers(tuple(mine.values()), tuple(theirs.values()))
        if rewritten:
            notes += (
                f"{len(rewritten)} layers hand whitened features to a converted norm and differ from the baseline's by "
                "design: the norms and blocks after them tell what was lost",
            )
        pairs = self.pairs.results(rows, columns, mine, theirs, cka, gram_cosine)
        return Comparison(
            baseline=baseline,
            layers=rows,
            baseline_layers=columns,
            cka=cka,
            gram_cosine=gram_cosine,
            pairs=tuple(replace(pair, rewritten=pair.layer in rewritten) for pair in pairs),
            only_model=tuple(name for name in mine if name not in theirs),
            only_baseline=tuple(name for name in theirs if name not in mine),
            samples=self.images,
            agreement=self.agreeing / self.compared if self.compared else None,
            kl=max(self.kl / self.compared, 0.0) if self.compared else None,
            notes=notes,
        )

    def notes(self) -> tuple[str, ...]:
        """What a reader of the report must know about the pass."""
        found = []
        if self.left_out:
            images = "image holds" if self.left_out == 1 else "images hold"
            found.append(f"{self.left_out} {images} values that are not finite after pre-processing; left out")
        reached = {record.layer for record in self.statistics.results()}
        missed = [layer.name for layer in self.layers if layer.name not in reached]
        if reached and missed:
            found.append(f"{len(missed)} layers were never called ({missed[0]}{', …' if len(missed) > 1 else ''})")
        if self.images == 1:
            found.append("one image: nothing can be said about how images differ")
        return tuple(found)


def _sensitivity(
    model: nn.Module,
    held: list[tuple[Tensor, Tensor | None]],
    patterns: Sequence[str],
    chosen: tuple[Layer, ...],
    methods: tuple[str, ...],
    sweep: bool,
    seed: int,
    parts: tuple[str, ...],
    progress: Progress | None,
) -> tuple[tuple[Sensitivity, ...] | None, tuple[SweepPoint, ...]]:
    if "sensitivity" not in parts:
        return None, ()
    total = sum(len(images) for images, _ in held)

    def tell(method: str, done: int) -> None:
        if progress is not None:
            progress(f"sensitivity: {method.replace('_', ' ')}", done, total)

    owners = [layer.name for layer in chosen if next(layer.module.parameters(), None) is not None]
    found = measure_sensitivity(
        model, held, methods=methods, layers=owners if patterns else None, seed=seed, on_progress=tell
    )
    norms = [layer.name for layer in chosen if layer.kind == "norm"]
    points = sweep_norms(model, held, layers=norms if patterns else None, on_progress=tell) if sweep and norms else ()
    return found, points


def _counterparts(baseline: nn.Module, patterns: Sequence[str], kinds: Sequence[str]) -> tuple[Layer, ...]:
    """The baseline's layers that the same request names; a glob that matches none there is no error."""
    found: dict[str, Layer] = {}
    try:
        return choose_layers(baseline, patterns, kinds)
    except PatternError:
        for pattern in patterns:
            try:
                found |= {layer.name: layer for layer in choose_layers(baseline, [pattern])}
            except PatternError:
                continue
    return tuple(found.values())


def _check_parts(only: Sequence[str]) -> tuple[str, ...]:
    wanted = (only,) if isinstance(only, str) else tuple(only)
    for part in wanted:
        if part not in PARTS:
            close = difflib.get_close_matches(str(part), PARTS, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? It takes" if close else "it takes"
            raise UsageError(f"there is no part {part!r} of an analysis; {hint} any of {', '.join(PARTS)}")
    if not wanted:
        raise UsageError(f"nothing to analyze: name at least one of {', '.join(PARTS)}")
    return wanted


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {"normsurgeon": __version__, "python": platform.python_version()}
    for package in ("torch", "timm", "captum"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
