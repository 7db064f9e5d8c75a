"""``swap_sensitivity``: what each batch norm's conversion does to the network, one at a time, and all but one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from scipy.stats import spearmanr
from torch import nn

from normsurgeon._util.progress import OnProgress, counter
from normsurgeon.errors import ConversionError, DataError, UsageError
from normsurgeon.inference.run import eval_mode, placed
from normsurgeon.inference.views import Data
from normsurgeon.render.document import Bars, Column, Document, Facts, Notes, Section, Table
from normsurgeon.render.presentable import Presentable
from normsurgeon.selection.damage import mean_and_error
from normsurgeon.selection.predictors import elements_per_pool, predict
from normsurgeon.selection.swap_sums import Resumable, fingerprint
from normsurgeon.selection.sweep import Change, Sweep, SweptBatches, damages_of, original_answers
from normsurgeon.selection.switching import Switchable
from normsurgeon.surgery.deciding import Request, parse_target
from normsurgeon.surgery.plan import plan

HARMLESS = 1e-3
"""Damage below which, with three standard errors, a site is measured no further."""

SHOWN = 12

PREDICTORS = ("elements", "norm_error", "taylor")


@dataclass(frozen=True)
class SwapPoint:
    """What one site's conversion does.

    site, target  the module path, and the norm in short: ``gn:8``
    damage        mean KL(original ‖ changed) in nats over the images; of what is no classifier, the mean squared error
                  of the outputs relative to the original's deviations from their mean
    stderr        its standard error over the images
    lost          of a classifier, the share of images whose answer is another one, or None
    images        that it was measured on: fewer where the site was clearly harmless
    left_out      how much less damage the conversion of all sites does without this one; None where not measured
    elements      values that share a mean and a variance, or None
    norm_error    the norm's error at the site: root mean square, relative to the batch norm's own deviations
    taylor        the damage that is predicted from the norm's error and the outputs' gradients
    """

    site: str
    target: str
    damage: float
    stderr: float
    lost: float | None
    images: int
    left_out: float | None = None
    elements: int | None = None
    norm_error: float | None = None
    taylor: float | None = None


@dataclass(frozen=True)
class SwapSensitivity(Presentable):
    """The sites' ``points`` in the order of the data; ``all_damage`` is of all sites together.

    measure  "KL (nats)", or "squared error" of what is no classifier
    """

    model: str
    measure: str
    images: int
    points: tuple[SwapPoint, ...]
    all_damage: float
    all_stderr: float

    @property
    def total(self) -> float:
        """The sum of the single damages: near ``all_damage`` where damages add up."""
        return sum(point.damage for point in self.points)

    def rank_correlation(self, predictor: Literal["elements", "norm_error", "taylor"]) -> float | None:
        """Spearman's correlation of a predictor with the measured damage; None for fewer than three sites."""
        pairs = [(getattr(p, predictor), p.damage) for p in self.points if getattr(p, predictor) is not None]
        if len(pairs) < 3:
            return None
        predicted, measured = zip(*pairs, strict=True)
        sign = -1 if predictor == "elements" else 1
        found = sign * float(spearmanr(predicted, measured).statistic)
        return found if math.isfinite(found) else None

    @property
    def correlations(self) -> dict[str, float | None]:
        """``rank_correlation`` of every predictor."""
        return {name: self.rank_correlation(name) for name in PREDICTORS}  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "model": self.model,
            "measure": self.measure,
            "images": self.images,
            "all": {"damage": self.all_damage, "stderr": self.all_stderr},
            "sum": self.total,
            "rank_correlation": self.correlations,
            "sites": [asdict(point) for point in self.points],
        }

    def document(self) -> Document:
        """The sites, the most damaging first."""
        return Document("normsurgeon", f"Swap sensitivity of {self.model}", self.sections())

    def sections(self) -> tuple[Section, ...]:
        """What a report shows of it."""
        columns = (
            Column("site"),
            Column("to"),
            Column("damage", "number", f"{self.measure} when this site alone is converted"),
            Column("±", "number", "standard error over the images"),
            Column("left out", "number", "damage of all sites less that of all but this one"),
            Column("lost", "percent", "images with another answer than the original's"),
            Column("Taylor", "number", "damage predicted from gradients"),
            Column("norm error", "percent", "the norm's own error, relative"),
            Column("elements", "count", "values that share a mean and a variance"),
            Column("images", "count"),
        )
        worst = sorted(self.points, key=lambda point: -point.damage)
        rows = tuple(
            (p.site, p.target, p.damage, p.stderr, p.left_out, p.lost, p.taylor, p.norm_error, p.elements, p.images)
            for p in worst
        )
        known = [f"{name.replace('_', ' ')} {rho:.2f}" for name, rho in self.correlations.items() if rho is not None]
        facts = Facts(
            (
                ("measure", f"{self.measure} to the original, {self.images} images"),
                ("all sites", f"{self.all_damage:.3g} ± {self.all_stderr:.1g}; single ones add up to {self.total:.3g}"),
                ("rank correlation with the damage", ", ".join(known) or "too few sites"),
            )
        )
        bars = Bars(tuple((p.site, p.damage, p.stderr) for p in worst[:SHOWN]), f"Damage of the worst, {self.measure}")
        table = Table(columns, rows, searchable=True, noun="sites", shaded=True, terminal_rows=20)
        notes = Notes(("A site that is clearly harmless is measured on fewer images.",))
        return (Section("swap", "Swap sensitivity", (facts, bars, table, notes)),)


def swap_sensitivity(
    model: nn.Module,
    data: Data,
    *,
    to: str = "gn",
    groups: int | Literal["auto"] = "auto",
    eps: float | None = None,
    set: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    all_but_one: bool = True,
    harmless: float = HARMLESS,
    batch_size: int = 32,
    max_images: int | None = 128,
    device: str | torch.device | None = None,
    workers: int = 0,
    example_inputs: Any = None,
    resume: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> SwapSensitivity:
    """What converting one batch norm at a time does to the outputs, and what leaving one out of all of them does.

    A run for one site begins at that site: what comes before is remembered (``selection.replay``). On
    EfficientNet-Lite0 that takes a third of the time of full passes, with the same answer up to rounding.

    data         a data spec, an ImageSource, or batches; labels are ignored
    to, groups, eps, set, example_inputs  as in ``normsurgeon.plan``; ``to`` may be ``gn:8``, too; the example is by
                 default an image of the data
    all_but_one  whether to measure ``left_out``, too; doubles the time
    harmless     a site is measured no further once its damage is below this with three standard errors; 0: never
    resume       a file that is written after each batch; a run with the same network, images and settings goes on

    :raises UsageError: a negative ``harmless``, a file to resume from that is of other settings or images.
    :raises CheckpointError: a file to resume from that is none.
    :raises ConversionError: no site that could be converted.
    :raises DataError: no images, or only one.

    >>> import timm
    >>> net = timm.create_model("test_resnet").eval()
    >>> images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> found = swap_sensitivity(net, [(images, None)], to="ln", all_but_one=False)
    >>> len(found.points), found.measure
    (15, 'KL (nats)')
    """
    if not harmless >= 0:
        raise UsageError(f"harmless={harmless} must not be negative")
    request = parse_target(to, Request(None))
    batches = SweptBatches.open(model, data, batch_size, max_images, workers)
    made = plan(
        model,
        str(request.target),
        groups=request.groups or groups,
        eps=eps,
        set=set,
        example_inputs=batches.example() if example_inputs is None else example_inputs,
    )
    with placed(model, device), eval_mode(model):
        board = Switchable(model, [made])
        chosen = {site: options[0] for site, options in board.options.items()}
        if not chosen:
            raise ConversionError(f"{made.model} has no site that {to} would change; see its plan")
        settings = [made.to_dict(), harmless, all_but_one, batch_size, max_images, fingerprint(model)]
        file = Resumable.open(resume, settings, list(chosen))
        sums = file.sums
        ones = Sweep(board, {}, {Change(site, option): sums.ones[site] for site, option in chosen.items()}, harmless)
        others = Sweep(board, chosen, {Change(site, None): sums.others[site] for site in chosen})
        sweeps = [ones, others] if all_but_one else [ones]
        count = counter("swapping", batches.steps(len(chosen) * len(sweeps)), on_progress)
        for inputs in batches:
            if file.skips(inputs):
                count(len(chosen) * len(sweeps))
                continue
            before = original_answers(board, inputs)
            sums.whole.update(*damages_of(board, chosen, inputs, before))
            for sweep in sweeps:
                sweep.update(inputs, before, count)
            sums.predicted(predict(board, chosen, inputs))
            file.add(inputs)
    if sums.whole.images < 2:
        raise DataError(f"{sums.whole.images} image: a damage and its standard error need at least two")
    all_damage, all_stderr = sums.whole.compute()
    points = []
    for site, option in chosen.items():
        found, left = sums.ones[site], sums.others[site]
        if not found.images:
            continue  # no call reaches it
        damage, stderr = found.compute()
        points.append(
            SwapPoint(
                site=site,
                target=option.label,
                damage=damage,
                stderr=stderr,
                lost=mean_and_error(found.lost)[0] if found.lost else None,
                images=found.images,
                left_out=all_damage - left.compute()[0] if left.images else None,
                elements=elements_per_pool(option),
                norm_error=math.sqrt(mean_and_error(sums.errors[site])[0]) if site in sums.errors else None,
                taylor=mean_and_error(sums.taylors[site])[0] if site in sums.taylors else None,
            )
        )
    measure = "KL (nats)" if sums.whole.classes else "squared error"
    return SwapSensitivity(made.model, measure, sums.whole.images, tuple(points), all_damage, all_stderr)
