"""``trade_off``: how many sites can get the norm that was asked for, and what each more costs.

Damages of single sites roughly add up (``SwapSensitivity.total`` against ``all_damage``). So sites are taken in the
order of what each adds, which makes a family of plans, each with one site more than the one before; a few of them are
run as a whole, and what they do is what counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from normsurgeon._util.progress import OnProgress
from normsurgeon.data.label_ways import Labels
from normsurgeon.errors import ConversionError, DataError
from normsurgeon.inference.run import eval_mode, placed
from normsurgeon.inference.views import Data
from normsurgeon.render.document import Chart, Column, Document, Facts, Line, Notes, Section, Sparklines, Table
from normsurgeon.render.presentable import Presentable
from normsurgeon.selection.budget import Budget
from normsurgeon.selection.damage import Damage
from normsurgeon.selection.family import Family, Runs, alternatives, fixed_sites, ordered
from normsurgeon.selection.sweep import SweptBatches
from normsurgeon.selection.switching import Switchable
from normsurgeon.surgery.plan import ConversionPlan, plan

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CURVE_POINTS = 9
"""Plans of the family that are run as a whole for the curve, the first and the last included."""

LEAST_IMAGES = 8
"""Half of them choose and half of them judge; with fewer, no order of sites can be told from chance."""


@dataclass(frozen=True)
class TradePoint:
    """One plan of the family, run as a whole.

    converted  sites that have the norm that was asked for
    kl, lost   mean KL to the original in nats, and share of the answers (with labels: of the right ones) lost; None of
               what is no classifier
    error      relative error of the outputs (root mean square); None of a classifier
    stderr     standard error over the images, of each of them
    predicted  the sum of the single sites' damages: KL, or squared error
    """

    converted: int
    kl: float | None
    lost: float | None
    error: float | None
    stderr: Mapping[str, float]
    predicted: float


@dataclass(frozen=True)
class TradeOff(Presentable):
    """Sites in the target norm against function kept: what ``trade_off`` gives.

    to       the norm that was asked for; ``among`` the others that sites may get
    sites    how many could get it
    images   on which the plans were run as a whole; ``chosen_on`` those by which the sites were ordered
    points   by number of sites
    """

    model: str
    to: str
    among: tuple[str, ...]
    sites: int
    images: int
    chosen_on: int
    labelled: bool
    points: tuple[TradePoint, ...]
    family: Family = field(repr=False, compare=False)
    damages: Mapping[int, Damage] = field(repr=False, compare=False)

    def plan(self, budget: Budget | str | float) -> ConversionPlan:
        """The plan with the most sites in the target norm, of those that were run, that stays within a budget: what it
        uses, with one standard error, is at most the limit.

        :raises ConversionError: when none does, with how close one can get.
        :raises UsageError: a budget that is none, or not of this kind of network.
        """
        budget = budget if isinstance(budget, Budget) else Budget.parse(budget)
        spent = {k: budget.spent(damage) for k, damage in self.damages.items()}
        best = max((k for k, damage in self.damages.items() if budget.holds(damage)), default=0)
        if not best:
            least = min((k for k in spent if k), key=lambda k: sum(spent[k]))
            used, error = spent[least]
            raise ConversionError(
                f"no plan with {self.to} stays within {budget}: the nearest has {least} of {self.sites} sites and uses "
                f"{_in_words(budget, used, error)} on {self.images} images; try a larger budget, or another norm"
            )
        note = (
            f"budget {budget}: {best} of {self.sites} sites have {self.to} and use "
            f"{_in_words(budget, *spent[best])} on {self.images} images that did not choose them"
        )
        return self.family.made(best, [note])

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "model": self.model, "to": self.to, "among": list(self.among), "sites": self.sites,
            "images": self.images, "chosen_on": self.chosen_on, "labelled": self.labelled,
            "order": [{"site": name, "cost": self.family.costs[name]} for name in self.family.order],
            "points": [{**vars(point), "stderr": dict(point.stderr)} for point in self.points],
        }  # fmt: skip

    def document(self) -> Document:
        """The curve and its points."""
        columns = (
            Column("sites", "text", f"sites that are {self.to}"),
            Column("KL", "number", "mean KL to the original, nats"),
            Column("± KL", "number"),
            Column("lost", "percent", "right answers lost" if self.labelled else "images with another answer"),
            Column("± lost", "percent"),
            Column("error", "percent", "relative error of the outputs"),
            Column("± error", "percent"),
            Column("predicted", "number", "sum of the single sites' damages"),
        )
        rows = tuple(
            (
                f"{p.converted} of {self.sites}", p.kl, p.stderr.get("kl"), p.lost, p.stderr.get("lost"), p.error,
                p.stderr.get("error"), p.predicted,
            )
            for p in self.points
        )  # fmt: skip
        damage = tuple(p.kl if p.kl is not None else p.error for p in self.points)
        words = "KL (nats)" if self.points and self.points[0].kl is not None else "error of the outputs"
        chart = Chart(
            "curve",
            "Damage by sites converted",
            f"{words} against the number of sites in {self.to}",
            partial(_figure, self.points, words),
            plain=(Sparklines((Line(words, damage, form="number"),), ends=True),),
        )
        notes = Notes((f"Sites are ordered by {self.chosen_on} images; the damages are of {self.images} others.",))
        title = f"{self.model}: sites in {self.to} against function kept"
        facts = (("sites", str(self.sites)), ("the others", ", ".join(self.among) or "stay"))
        section = Section("curve", "Curve", (chart, Table(columns, rows), notes))
        return Document("normsurgeon", title, (section,), facts=(Facts(facts),))


def trade_off(
    model: nn.Module,
    data: Data,
    *,
    to: str = "gn",
    among: Sequence[str] = ("affine",),
    budget: Budget | str | float | None = None,
    must: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    keep: Sequence[str] = (),
    groups: int | Literal["auto"] = "auto",
    eps: float | None = None,
    points: int = CURVE_POINTS,
    labels: Labels = "by-name",
    batch_size: int = 32,
    max_images: int | None = 300,
    device: str | torch.device | None = None,
    workers: int = 0,
    example_inputs: Any = None,
    name: str | None = None,
    on_progress: OnProgress | None = None,
) -> TradeOff:
    """How many sites can be ``to``, and what that costs: a curve, and a plan for any budget.

    to, groups, eps  the norm that as many sites as possible are to get, as in ``normsurgeon.plan``
    among     what the other sites may get, whichever of them does least damage: ``affine`` (the batch norm itself, with
              fixed statistics), ``ln``, ``rms``, …; and other groups for the norm that was asked for: with ``gn:4``, a
              site that is to be ``gn`` gets 4 groups where that does less damage. ``affine`` if no other norm is named
    budget    look for the plan that uses it up; without one, a plan for each of ``points`` numbers of sites is run
    must      {glob: target} for sites that are given; ``keep``: globs of sites that stay batch norms
    data, labels  as for ``evaluate``; without labels, an answer is lost where it is not the original's
    max_images  every third batch of them orders the sites; plans are run on the others

    :raises UsageError: a budget that is none, or too few images.
    :raises PatternError: a glob that matches no site.
    :raises TargetError: an unknown target.
    :raises ConversionError: no site that ``to`` would change.

    >>> import timm
    >>> net = timm.create_model("test_resnet").eval()
    >>> batches = [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    >>> curve = trade_off(net, [(x, None) for x in batches], to="ln", points=3)
    >>> [point.converted for point in curve.points]
    [0, 8, 15]
    """
    budget = budget if budget is None or isinstance(budget, Budget) else Budget.parse(budget)
    batches = SweptBatches.open(model, data, batch_size, max_images, workers, labels)
    example = batches.example() if example_inputs is None else example_inputs
    pairs = list(must.items()) if isinstance(must, Mapping) else list(must)
    first = plan(model, to, groups=groups, eps=eps, keep=keep, set=pairs, example_inputs=example, name=name)
    if all(text.partition(":")[0] == first.target for text in among):
        among = (*among, "affine")
    fixed = fixed_sites(first, [*keep, *(pattern for pattern, _ in pairs)])
    with placed(model, device), eval_mode(model):
        board = Switchable(model, [first, *alternatives(first, among, fixed)])
        inputs = list(batches.labelled())
        images = sum(len(x) for x, _ in inputs)
        if images < LEAST_IMAGES or len(inputs) < 2:
            raise DataError(
                f"{images} images in {len(inputs)} batches are too few: some choose the sites, others judge the plan; "
                f"give {LEAST_IMAGES} or more, in at least two batches"
            )
        choosing, judging = inputs[::3], [batch for i, batch in enumerate(inputs) if i % 3]
        family = ordered(board, fixed, choosing, on_progress)
        runs = Runs(board, family, judging, on_progress)
        if budget is None:
            count = max(2, min(points, len(family.order) + 1))
            for k in sorted({round(i * len(family.order) / (count - 1)) for i in range(count)}):
                runs.damage(k)
        else:
            runs.search(budget)
    return TradeOff(
        model=first.model,
        to=to,
        among=tuple(among),
        sites=len(family.order),
        images=sum(len(x) for x, _ in judging),
        chosen_on=sum(len(x) for x, _ in choosing),
        labelled=any(before.labels is not None for _, before in runs.batches),
        points=tuple(_point(k, runs.known[k], family) for k in sorted(runs.known)),
        family=family,
        damages=dict(runs.known),
    )


def _point(k: int, damage: Damage, family: Family) -> TradePoint:
    spent = {
        measure: Budget(measure, 1.0).spent(damage) for measure in (("kl", "top1") if damage.classes else ("error",))
    }
    return TradePoint(
        converted=k,
        kl=spent["kl"][0] if damage.classes else None,
        lost=spent["top1"][0] if damage.classes else None,
        error=None if damage.classes else spent["error"][0],
        stderr={"lost" if measure == "top1" else measure: error for measure, (_, error) in spent.items()},
        predicted=family.predicted(k),
    )


def _in_words(budget: Budget, used: float, error: float) -> str:
    if budget.measure == "kl":
        return f"{used:.3g} ± {error:.1g} nats"
    return f"{100 * used:.2g} ± {100 * error:.1g} %"


def _figure(points: Sequence[TradePoint], words: str) -> Figure:
    from normsurgeon.render.charts import Series, lines

    measure = "kl" if points[0].kl is not None else "error"
    y = [p.kl if p.kl is not None else p.error or 0.0 for p in points]
    errors = [p.stderr[measure] for p in points]
    x = [p.converted for p in points]
    measured = Series(
        "measured",
        x,
        y,
        [v - e for v, e in zip(y, errors, strict=True)],
        [v + e for v, e in zip(y, errors, strict=True)],
    )
    series = [measured]
    if measure == "kl":
        series.append(Series("sum of single sites", x, [p.predicted for p in points], tone=1, dash="dash"))
    return lines(series, x_title="sites converted", y_title=words)
