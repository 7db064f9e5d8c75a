"""The one pass over the images, in which statistics, similarity and comparison are summed up together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon._util.stopping import Stop
from normsurgeon.analysis.answers import AnswerCollector
from normsurgeon.analysis.choosing import Layer
from normsurgeon.analysis.comparison import PairCollector
from normsurgeon.analysis.records import Comparison, Similarity
from normsurgeon.analysis.similarity import Kernels, SimilarityCollector
from normsurgeon.analysis.statistics import StatisticsCollector
from normsurgeon.calls import on, outputs_of
from normsurgeon.data.labels import class_names_for
from normsurgeon.distributed import gather
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.hooks import Tap, listening
from normsurgeon.inference.run import first_tensor, home_of
from normsurgeon.inference.views import Views

Receiver = Callable[[Layer, Tensor], None]


@contextmanager
def captured(layers: Sequence[Layer], on_output: Receiver, on_input: Receiver | None = None) -> Iterator[None]:
    """While inside, ``on_output(layer, tensor)`` is called right after each call of each layer, in calling order.

    Right after means before anything that follows can overwrite the tensor: an in-place activation changes it a
    moment later, so it must be read at once and not kept. ``on_input`` is called before each call of a norm layer,
    with its input. Outputs without a floating-point tensor are passed over.
    """

    def tap(layer: Layer, side: Literal["input", "output"], receive: Receiver) -> Tap:
        def give(tensor: Tensor) -> None:
            if tensor.is_floating_point() and tensor.ndim >= 1 and tensor.numel():
                receive(layer, tensor)

        return layer.module, side, give

    taps = [tap(layer, "output", on_output) for layer in layers]
    if on_input is not None:
        taps += [tap(layer, "input", on_input) for layer in layers if layer.kind == "norm"]
    with listening(taps):
        yield


@dataclass
class Pass:
    """The one pass over the images, and everything that is summed up in it; of several processes, all know it then."""

    layers: tuple[Layer, ...]
    baseline_layers: tuple[Layer, ...]
    parts: tuple[str, ...]
    seed: int
    hold: int
    images: int = 0
    labelled: bool = False
    skipped: int = 0
    held: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.statistics = StatisticsCollector(self.layers, self.seed)
        self.baseline_statistics = StatisticsCollector(self.baseline_layers, self.seed)
        self.kernels = Kernels(with_grids=True)
        self.baseline_kernels = Kernels()
        self.within, self.between = SimilarityCollector(), SimilarityCollector()
        self.pairs, self.answers = PairCollector(), AnswerCollector()

    def run(
        self, model: nn.Module, baseline: nn.Module | None, views: Views, on_progress: OnProgress | None, stop: Stop
    ) -> None:
        """Both networks over all images, or until a signal stops it, batch by batch: the baseline first."""
        self.answers.config = views.config
        for first, (images, labels) in views.numbered():
            count = len(images[0])
            if not count:
                continue
            self.labelled = labels is not None
            self._hold(first, images[0], labels)
            self.images += count
            if not self.shared:  # the images to hold are all that is wanted
                if self.images >= self.hold:
                    self.images = self.hold or count
                    break
                continue
            self.pairs.begin(count)
            theirs = None
            if baseline is not None:
                sums = self.baseline_statistics, self.baseline_kernels
                theirs = self._forward(baseline, images[-1], first, *sums, self.pairs.on_baseline)
            ours = self._forward(model, images[0], first, self.statistics, self.kernels, self.pairs.on_output)
            if ours is not None and theirs is not None and ours.ndim == 2 and ours.shape == theirs.shape:
                if not self.answers.images:
                    self.answers.names = class_names_for(model, ours.shape[1])
                self.answers.update(first, images[0], ours, theirs, labels)
            if self.similar:
                self.within.update(self.kernels)
                if baseline is not None:
                    self.between.update(self.kernels, self.baseline_kernels)
            if on_progress is not None:
                on_progress(Progress("reading layers", self.images + len(views.skipped), views.total))
            if stop:
                break
        self.skipped = len(views.skipped)
        failures = self._gather_(views.failure()) if self.shared else []
        if not self.images:
            raise next(iter(failures), None) or DataError(
                f"there are no images to analyze in {views.name}; try another --data, or demo"
            )

    @property
    def shared(self) -> bool:
        """Whether processes share the images. Where only some are wanted to hold, each takes all of those."""
        return self.counting or self.similar

    @property
    def similar(self) -> bool:
        """Whether similarity is wanted."""
        return "similarity" in self.parts

    @property
    def counting(self) -> bool:
        """Whether statistics are needed: for themselves, or for a comparison."""
        return "statistics" in self.parts or bool(self.baseline_layers)

    def _forward(
        self,
        model: nn.Module,
        images: Tensor,
        first: int,
        statistics: StatisticsCollector,
        kernels: Kernels,
        compare: Receiver,
    ) -> Tensor | None:
        receivers = [compare]
        if self.counting:
            statistics.begin(len(images), first)
            receivers.append(statistics.on_output)
        if self.similar:
            kernels.begin(len(images))
            receivers.append(kernels.on_output)

        def receive(layer: Layer, x: Tensor) -> None:
            for receiver in receivers:
                receiver(layer, x)

        images = on(images, *home_of(model))
        # no_grad and not inference_mode: tensors must keep their version, which shows whether one was overwritten.
        with torch.no_grad(), captured(statistics.layers, receive, statistics.on_input if self.counting else None):
            return first_tensor(outputs_of(model, images))

    def _hold(self, first: int, images: Tensor, labels: Tensor | None) -> None:
        room = self.hold - sum(len(held) for _, held, _ in self.held)
        if room > 0 and not isinstance(images, Tensor):
            raise UsageError(
                "sensitivity is measured on images, and the batches hold dicts or tuples of a model's arguments; "
                "try only=['statistics', 'similarity']"
            )
        if room > 0:
            self.held.append((first, images[:room].clone(), labels[:room].clone() if labels is not None else None))

    @property
    def first_images(self) -> list[tuple[Tensor, Tensor | None]]:
        """The images to measure sensitivity with, and their labels."""
        return [(images, labels) for _, images, labels in self.held]

    def _gather_(self, failure: DataError | None) -> list[DataError]:
        """Add what the other processes saw; what they found wrong with their images."""
        counts = (self.images, self.skipped)
        sums = (self.within, self.between, self.answers)
        found = gather((counts, self.labelled, failure, self.kernels.sizes, sums))
        if len(found) == 1:
            return []
        self.images, self.skipped = (sum(each) for each in zip(*(part[0] for part in found), strict=True))
        self.labelled = any(part[1] for part in found)
        self.within, self.between, self.answers = SimilarityCollector(), SimilarityCollector(), AnswerCollector()
        for *_, sizes, (within, between, answers) in found:
            self.kernels.sizes |= sizes
            self.within.merge(within)
            self.between.merge(between)
            self.answers.merge(answers)
        self.statistics.gather_()
        self.baseline_statistics.gather_()
        self.pairs.gather_([layer.name for layer in self.layers])
        self._gather_held_()
        return [part[2] for part in found if part[2] is not None]

    def _gather_held_(self) -> None:
        """The first images of all processes' together: only those are sent."""
        everyones = sorted(pair for pairs in gather([(first, len(x)) for first, x, _ in self.held]) for pair in pairs)
        wanted, room = {}, self.hold
        for first, count in everyones:
            if room > 0:
                wanted[first] = min(room, count)
            room -= count
        sent = [
            (first, images[:count], labels[:count] if labels is not None else None)
            for first, images, labels in self.held
            if (count := wanted.get(first, 0))
        ]
        self.held = sorted((piece for part in gather(sent) for piece in part), key=lambda piece: piece[0])

    def similarity(self) -> Similarity:
        """The record of the layers' similarity within the model."""
        cka, cosine, gram_cosine = self.within.compute()
        sizes = [self.kernels.sizes[name] for name in self.within.rows]
        within = self.within
        return Similarity(within.rows, cka, cosine, gram_cosine, within.images, within.smallest, within.notes(sizes))

    def comparison(self, baseline: str, rewritten: Set[str]) -> Comparison:
        """The record of the model next to its baseline; ``rewritten`` layers are marked."""
        similar = self.similar
        mine = {record.layer: record for record in self.statistics.compute()}
        theirs = {record.layer: record for record in self.baseline_statistics.compute()}
        rows = self.between.rows if similar else tuple(mine)
        columns = self.between.columns if similar else tuple(theirs)
        cka, _, gram_cosine = self.between.compute() if similar else (None, None, None)
        notes: tuple[str, ...] = ()
        if not set(mine) & set(theirs):
            notes = ("no layer of the model has the name of one of the baseline's: only whole matrices compare",)
        if rewritten:
            notes += (
                f"{len(rewritten)} layers took in the norm after them, or its whitening, and differ from the "
                "baseline's by design: the norms and blocks after them show what was lost",
            )
        agreement, kl, answers = self.answers.compute()
        return Comparison(
            baseline=baseline,
            layers=rows,
            baseline_layers=columns,
            cka=cka,
            gram_cosine=gram_cosine,
            pairs=self.pairs.compute(rows, columns, mine, theirs, cka, gram_cosine, rewritten),
            only_model=tuple(name for name in mine if name not in theirs),
            only_baseline=tuple(name for name in theirs if name not in mine),
            samples=self.images,
            agreement=agreement,
            kl=kl,
            answers=answers,
            notes=notes,
        )

    def notes(self) -> tuple[str, ...]:
        """What a reader of the report must know about the pass."""
        found = []
        reached = {record.layer for record in self.statistics.compute()}
        missed = [layer.name for layer in self.layers if layer.name not in reached]
        if reached and missed:
            found.append(f"{len(missed)} layers were never called ({missed[0]}{', …' if len(missed) > 1 else ''})")
        if self.images == 1:
            found.append("one image: nothing can be said about how images differ")
        return tuple(found)
