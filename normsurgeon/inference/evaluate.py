"""How well a classifier does, and how far it is from another one: ``evaluate``."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgeon._util.plain import plain
from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon.data.label_ways import Labels
from normsurgeon.data.labels import check_labels
from normsurgeon.distributed import gather, own_device, own_shard, together
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.run import eval_mode, fetched_logits, name_of, placed
from normsurgeon.inference.views import Data, open_views
from normsurgeon.surgery.agreement import Agreement


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found. Shares are 0 to 1; what could not be measured is None.

    model              what the model is called
    images             how many were scored
    skipped            how many could not be decoded; ``skipped_files`` are their names
    top1, top5         share of images whose label is (among the five) most probable; None without labels
    top1_stderr        the binomial standard error of ``top1``
    loss               mean cross-entropy in nats; nan where some logits were not finite
    images_per_second  of the model's forward alone, without the first batch where there are several; of several
                       processes, all together
    agreement          share of images on which the model and the baseline put the same class first
    kl                 mean KL(baseline ‖ model) of their softmaxes in nats; nan where logits were not finite
    nonfinite          how many images got logits that were not finite: those count as wrong
    """

    model: str
    images: int
    images_per_second: float
    skipped: int = 0
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    agreement: float | None = None
    kl: float | None = None
    top1_stderr: float | None = None
    nonfinite: int = 0
    skipped_files: tuple[str, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON, which knows no nan: that becomes None."""
        values: dict[str, Any] = plain(asdict(self))
        return values


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    baseline: nn.Module | None = None,
    labels: Labels = "by-name",
    batch_size: int = 32,
    max_images: int | None = None,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Score a classifier on images: top-1, top-5, loss, speed, and nearness to ``baseline``.

    data         a data spec (see :func:`~normsurgeon.data.sources.open_source`), an ImageSource, or batches
                 ``(images (N, C, H, W), labels (N,) or None)`` that are pre-processed already
    baseline     a second classifier with the same classes, usually the original; it sees the same images, in
                 its own pre-processing (the model's, where it carries none)
    labels       ``by-name``: classes get the numbers that their names have in the network, and classes that are not the
                 network's are an error; ``by-position``: their order's; ``none``: no accuracy is wanted
    max_images   only that many: of a source, spread evenly over it; of batches, the first ones
    device       where to run; both models are put back afterwards. Default: where each model is
    workers      processes that decode images; 0: this one
    on_progress  called with a Progress after each batch; of several processes, each counts its own images

    Both models are in eval mode meanwhile; every module's ``training`` flag is put back, also after an error. Under
    ``torchrun`` or ``accelerate launch`` every process calls this alike, sees its share of the images, and gets the
    same answer; ``with normsurgeon.distributed.alone():`` is for one that evaluates by itself.

    :raises DataError: no images, none that can be read, one that is not finite, or labels that the head cannot have.
    :raises ProcessError: another of several processes failed.
    :raises UsageError: a model that is not a classifier, or a baseline with other classes.

    >>> import timm
    >>> net = timm.create_model("test_resnet")
    >>> evaluate(net, [(torch.zeros(2, 3, 64, 64), None)], baseline=net).agreement
    1.0
    """
    models = [model] if baseline is None else [model, baseline]
    with ExitStack() as stack:
        stack.enter_context(together())
        for each in models:
            stack.enter_context(placed(each, own_device(device)))
        stack.enter_context(eval_mode(*models))
        stack.enter_context(torch.inference_mode())
        views = open_views(data, models, batch_size, max_images, workers, shard=own_shard(), labels=labels)
        scores = _Scores()
        for images, numbers in views:
            begin = time.perf_counter()
            logits = fetched_logits(model, images[0])
            seconds = time.perf_counter() - begin
            if numbers is not None:
                numbers = numbers.cpu()
                check_labels(numbers, *logits.shape)
            reference = None
            if baseline is not None:
                reference = fetched_logits(baseline, images[-1])
                _check_baseline(logits, reference)
            scores.update(logits, numbers, reference, seconds)
            if on_progress is not None:
                on_progress(Progress("evaluating", scores.images + len(views.skipped), views.total))
        found = gather((scores, views.skipped, views.failure()))
    scores, skipped, failures = _Scores(), [], []
    for part, unread, failure in found:
        scores.merge(part)
        skipped += unread
        failures += [failure] if failure is not None else []
    if not scores.images:
        raise next(
            iter(failures),
            DataError("there are no images to evaluate on; the batches are empty (was an iterator used up before?)"),
        )
    return scores.compute(name_of(model), tuple(skipped))


_MIXED = "some batches have labels and others have none; try one data set at a time"


@dataclass
class _Scores:
    """The sums behind an Evaluation, in float64, batch by batch."""

    images: int = 0
    labelled: bool | None = None
    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    agreement: Agreement = field(default_factory=Agreement)
    nonfinite: int = 0
    timings: list[tuple[int, float]] = field(default_factory=list)
    speed: float = 0.0

    def update(self, logits_NK: Tensor, labels_N: Tensor | None, reference_NK: Tensor | None, seconds: float) -> None:
        """Add one batch, all on the CPU; ``seconds`` is what the model's forward took."""
        finite = logits_NK.isfinite().all(dim=1)
        if self.labelled not in (None, labels_N is not None):
            raise DataError(_MIXED)
        self.labelled = labels_N is not None
        self.images += len(logits_NK)
        self.nonfinite += int((~finite).sum())
        self.timings.append((len(logits_NK), seconds))
        if labels_N is not None:
            best = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices
            hits = (best == labels_N[:, None]) & finite[:, None]
            self.top1 += int(hits[:, 0].sum())
            self.top5 += int(hits.sum())
            loss = F.cross_entropy(logits_NK, labels_N.long(), reduction="sum").item()
            self.loss += loss if finite.all() else math.nan
        if reference_NK is not None:
            self.agreement.update(logits_NK, reference_NK)

    def merge(self, other: _Scores) -> None:
        """Add another process's sums. Their speeds add up: they work at the same time."""
        if not other.images:
            return
        if self.labelled not in (None, other.labelled):
            raise DataError(_MIXED)
        self.labelled = other.labelled
        for name in ("images", "top1", "top5", "loss", "nonfinite"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.agreement.merge(other.agreement)
        timings = other.timings[1:] or other.timings  # the first batch also pays for allocation and kernel choice
        seconds = sum(spent for _, spent in timings)
        self.speed += sum(count for count, _ in timings) / max(seconds, 1e-9)

    def compute(self, name: str, skipped: tuple[str, ...]) -> Evaluation:
        """The sums as means."""
        top1 = self.top1 / self.images
        agreement, kl = self.agreement.compute()
        return Evaluation(
            model=name,
            images=self.images,
            skipped=len(skipped),
            top1=top1 if self.labelled else None,
            top5=self.top5 / self.images if self.labelled else None,
            loss=self.loss / self.images if self.labelled else None,
            images_per_second=self.speed,
            agreement=agreement,
            kl=kl,
            top1_stderr=math.sqrt(top1 * (1 - top1) / self.images) if self.labelled else None,
            nonfinite=self.nonfinite,
            skipped_files=skipped,
        )


def _check_baseline(logits: Tensor, reference: Tensor) -> None:
    if logits.shape != reference.shape:
        raise UsageError(
            f"the model gives {tuple(logits.shape)} and the baseline {tuple(reference.shape)}; "
            "try a baseline with the same classes"
        )
