"""``trade_off``: how many sites can get the norm that was asked for, and what each more costs.

Damages of single sites roughly add up (``SwapSensitivity.total`` against ``all_damage``). So sites are taken in the
order of what each adds, which makes a family of plans, each with one site more than the one before; a few of them are
run as a whole, and what they do is what counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from normsurgeon._util.progress import OnProgress, counter
from normsurgeon.errors import ConversionError, DataError
from normsurgeon.inference.run import eval_mode, placed
from normsurgeon.inference.views import Data
from normsurgeon.patterns import select
from normsurgeon.render.document import Chart, Column, Document, Facts, Line, Notes, Section, Sparklines, Table
from normsurgeon.render.presentable import Presentable
from normsurgeon.selection.budget import Budget
from normsurgeon.selection.damage import Damage
from normsurgeon.selection.sweep import Change, Sweep, SweptBatches, damages_of, original_answers
from normsurgeon.selection.switching import Option, Switchable
from normsurgeon.surgery.deciding import decide, parse_target
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
class Family:
    """Plans, each with one site more in the norm that was asked for: the first ``k`` of ``order`` have it."""

    plan: ConversionPlan
    order: tuple[str, ...]
    main: Mapping[str, Option]
    others: Mapping[str, Option | None]
    fixed: Mapping[str, Option | None]
    costs: Mapping[str, float]
    base: float

    def chosen(self, k: int) -> dict[str, Option | None]:
        """What each site gets."""
        first = {name: self.main[name] for name in self.order[:k]}
        return {**self.fixed, **{name: self.others[name] for name in self.order[k:]}, **first}

    def predicted(self, k: int) -> float:
        """The sum of the single damages."""
        return self.base + sum(self.costs[name] for name in self.order[:k])

    def made(self, k: int, notes: Sequence[str] = ()) -> ConversionPlan:
        """The plan for it."""
        chosen = self.chosen(k)
        exact = {name for name, option in chosen.items() if option is None}
        given = {name: option.decision for name, option in chosen.items() if option is not None}
        decisions = []
        for decision in self.plan.decisions:
            if decision.name in given:
                decision = given[decision.name]
            elif decision.name in exact and decision.name in self.others:
                decision = decide(decision.site, parse_target("affine", self.plan.request))
            decisions.append(decision)
        return replace(self.plan, decisions=tuple(decisions), notes=(*self.plan.notes, *notes))


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
        spent = {k: budget.spent(damage) for k, damage in sorted(self.damages.items())}
        within = [k for k, (used, error) in spent.items() if used + error <= budget.limit]
        if not within or (max(within) == 0 and self.sites):
            least = min((k for k in spent if k), key=lambda k: sum(spent[k]), default=0)
            used, error = spent[least]
            raise ConversionError(
                f"no plan with {self.to} stays within {budget}: the nearest has {least} of {self.sites} sites and uses "
                f"{_in_words(budget, used, error)} on {self.images} images; try a larger budget, or another norm"
            )
        best = max(within)
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
    batch_size: int = 32,
    max_images: int | None = 300,
    device: str | torch.device | None = None,
    workers: int = 0,
    example_inputs: Any = None,
    on_progress: OnProgress | None = None,
) -> TradeOff:
    """How many sites can be ``to``, and what that costs: a curve, and a plan for any budget.

    to, groups, eps  the norm that as many sites as possible are to get, as in ``normsurgeon.plan``
    among     what the other sites may get, whichever of them does least damage: ``affine`` (the batch norm itself, with
              fixed statistics), ``ln``, ``gn:8``, …
    budget    look for the plan that uses it up; without one, a plan for each of ``points`` numbers of sites is run
    must      {glob: target} for sites that are given; ``keep``: globs of sites that stay batch norms
    data      a data spec, an ImageSource or batches; labels count where there are any that the model's classes are
    max_images  a third of them, by number of batches, order the sites; plans are run on the others

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
    plans = _plans(model, to, among, must, keep, groups, eps, example_inputs)
    with placed(model, device), eval_mode(model):
        board = Switchable(model, plans)
        batches = SweptBatches.open(model, data, batch_size, max_images, workers)
        inputs = list(batches.labelled())
        images = sum(len(x) for x, _ in inputs)
        if images < LEAST_IMAGES or len(inputs) < 2:
            raise DataError(
                f"{images} images in {len(inputs)} batches are too few: some choose the sites, others judge the plan; "
                f"give {LEAST_IMAGES} or more, in at least two batches"
            )
        choosing, judging = inputs[: max(1, len(inputs) // 3)], inputs[max(1, len(inputs) // 3) :]
        family = _ordered(board, dict(must), choosing, on_progress)
        runs = _Runs(board, family, judging, on_progress)
        if budget is None:
            count = max(2, min(points, len(family.order) + 1))
            for k in sorted({round(i * len(family.order) / (count - 1)) for i in range(count)}):
                runs.damage(k)
        else:
            runs.search(budget)
    return TradeOff(
        model=plans[0].model,
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


def _plans(
    model: nn.Module,
    to: str,
    among: Sequence[str],
    must: Mapping[str, str] | Sequence[tuple[str, str]],
    keep: Sequence[str],
    groups: int | Literal["auto"],
    eps: float | None,
    example_inputs: Any,
) -> list[ConversionPlan]:
    """The plan for ``to``, those for the others, and last the one for what is given."""
    first = plan(model, to, groups=groups, eps=eps, keep=keep, example_inputs=example_inputs)
    names = [d.name for d in first.decisions]
    kept = {name for pattern in keep for name in select(pattern, names)}
    plans = [first]
    for text in among:
        request = parse_target(text, replace(first.request, groups=None))
        decisions = (d if d.name in kept else decide(d.site, request) for d in first.decisions)
        plans.append(replace(first, request=request, decisions=tuple(decisions)))
    given = first
    for pattern, text in must.items() if isinstance(must, Mapping) else must:
        given = given.set(pattern, text)
    return [*plans, given]


def _ordered(
    board: Switchable, must: Mapping[str, str], choosing: Sequence[Any], on_progress: OnProgress | None
) -> Family:
    """The sites in the order of what each adds to the damage."""
    main_plan, *other_plans, given = board.plans
    names = [d.name for d in main_plan.decisions]
    fixed_names = {name for pattern in must for name in select(pattern, names)}

    def options_of(made: ConversionPlan) -> dict[str, Option]:
        return {d.name: o for d in made.decisions for o in board.options.get(d.name, ()) if o.decision == d}

    main = {name: o for name, o in options_of(main_plan).items() if name not in fixed_names}
    if not main:
        raise ConversionError(
            f"{main_plan.model} has no site that {main_plan.target} would change; see normsurgeon.plan"
        )
    exact = {d.name for made in other_plans for d in made.decisions if d.status == "converted" and d.target == "affine"}
    found = [options_of(made) for made in other_plans]
    candidates = {name: [options[name] for options in found if name in options] for name in main}
    changes = {Change(name, o) for name in main for o in (main[name], *candidates[name])}
    sweep = Sweep(board, {}, sorted(changes, key=lambda c: (c.site, str(c.option))))
    count = counter("trying single sites", len(changes) * len(choosing), on_progress)
    for inputs, labels in choosing:
        sweep.update(inputs, original_answers(board, inputs, labels), count)

    def damage(name: str, option: Option | None) -> float:
        seen = sweep.found.get(Change(name, option))
        return 0.0 if option is None or seen is None else seen.compute()[0]

    others: dict[str, Option | None] = {}
    for name in main:
        least = min(candidates[name], key=lambda o: damage(name, o), default=None)
        others[name] = None if name in exact or least is None else least
    costs = {name: damage(name, main[name]) - damage(name, others[name]) for name in main}
    return Family(
        plan=main_plan,
        order=tuple(sorted(main, key=lambda name: (costs[name], names.index(name)))),
        main=main,
        others=others,
        fixed={name: option for name, option in options_of(given).items() if name in fixed_names},
        costs=costs,
        base=sum(damage(name, others[name]) for name in main),
    )


class _Runs:
    """Plans of a family, each run as a whole on the same images at most once."""

    def __init__(
        self, board: Switchable, family: Family, judging: Sequence[Any], on_progress: OnProgress | None
    ) -> None:
        self.board, self.family = board, family
        self.batches = [(inputs, original_answers(board, inputs, labels)) for inputs, labels in judging]
        self.known: dict[int, Damage] = {}
        self._count = counter("running whole plans", None, on_progress)

    def damage(self, k: int) -> Damage:
        """Of the plan with ``k`` sites."""
        if k not in self.known:
            found = Damage()
            for inputs, before in self.batches:
                found.update(*damages_of(self.board, self.family.chosen(k), inputs, before))
            self.known[k] = found
            self._count(1)
        return self.known[k]

    def search(self, budget: Budget) -> None:
        """Run plans towards the largest within the budget: by halves, since damage grows with the number of sites."""

        def within(k: int) -> bool:
            used, error = budget.spent(self.damage(k))
            return used + error <= budget.limit

        low, high = 0, len(self.family.order)
        if within(high):
            return
        if not within(low):
            self.damage(1)
            return
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        self.damage(max(1, low))


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
