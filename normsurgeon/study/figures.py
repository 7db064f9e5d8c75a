"""The report's charts: accuracy over batch sizes and learning rates, differences, training, layers, similarity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from normsurgeon._util.estimates import points
from normsurgeon.render import charts
from normsurgeon.render.charts import Interval, Series
from normsurgeon.render.document import Chart, HeatMap, Line, Sparklines
from normsurgeon.render.formatting import joined, percent, plural
from normsurgeon.study.findings import cell_label, setting_label
from normsurgeon.study.records import Outcome, Results
from normsurgeon.study.statistics import (
    Comparison,
    Crossing,
    Point,
    RateCurve,
    axis_order,
    crossing,
    mean_curves,
    rate_curves,
    setting_axes,
    setting_of,
    unscaled,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_VIEWS = 60
"""Settings that a chart's menu offers, and differences that one chart shows."""
METRICS = (("accuracy", "accuracy"), ("loss", "held-out loss"), ("train_loss", "training loss"))
STATISTICS = (
    ("std", "std", True), ("mean", "mean", False), ("effective_rank", "effective rank", True),
    ("sensitivity", "sensitivity", True), ("zero_fraction", "zeros", False), ("dead_fraction", "dead channels", False),
    ("group_fluctuation", "group fluctuation", False),
)  # fmt: skip
"""Of a layer: the field, its name, and whether it spans decades."""
_WHISKERS = (
    "Mean over the seeds; whiskers are 95 % intervals, cut off if they would dwarf the means. A diverged run counts as "
    "0 right."
)


def batch_chart(results: Results, by_size: Crossing) -> Chart:
    """Accuracy over the batch size, one line for each norm, with 95 % intervals."""
    sizes = axis_order("batch_size", (level for level, _ in by_size.cells))
    curves = _by_norm(by_size)
    words = "; ".join(f"{norm} {percent(at[0].mean)} to {percent(at[-1].mean)}" for norm, at in curves.items())

    def draw(part: Results) -> Figure:
        found = _by_norm(crossing(part, "batch_size")).items()
        return _lines([_series(results, norm, at, "batch size") for norm, at in found], "batch size", "accuracy", True)

    return Chart(
        "batch-lines", "Accuracy against batch size", f"lines from batch size {sizes[0]} to {sizes[-1]}: {words}",
        lambda: _in_contexts(results, ("batch_size", "lr"), draw),  # the rate may follow from the batch size
        _WHISKERS, wide=True,
    )  # fmt: skip


def _by_norm(by_size: Crossing) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for (size, norm), (it, diverged) in by_size.cells.items():
        if it.mean is not None:
            found.setdefault(norm, []).append(Point(size, it.mean, it.ci, it.n, diverged))
    return found


def rate_chart(results: Results) -> Chart:
    """Accuracy over the learning rate, one line for each norm and start, with 95 % intervals."""
    results, size = unscaled(results)
    curves = rate_curves(results)
    title = f"learning rate, for batches of {size}" if size else "learning rate"
    dotted = {curve.start for curve in curves} == {"scratch", "converted"}

    def draw(part: Results) -> Figure:
        found = rate_curves(part)
        series = [
            _series(results, curve.norm, curve.points, "learning rate", rate_label(curve, found),
                    "dot" if dotted and curve.start == "scratch" else "solid")
            for curve in found
        ]  # fmt: skip
        return _lines(series, title, "accuracy", True)

    lines = tuple(
        Line(rate_label(curve, curves), tuple(point.mean for point in curve.points), form="percent") for curve in curves
    )
    rates = [point.x for point in curves[0].points]
    words = "; ".join(f"{rate_label(curve, curves)} best at {curve.best.x:g}" for curve in curves)
    return Chart(
        "rate-lines", "Accuracy against learning rate", f"lines from {rates[0]:g} to {rates[-1]:g}: {words}",
        lambda: _in_contexts(results, ("lr", "start"), draw),
        _WHISKERS + (" Dotted: from random weights." if dotted else ""), wide=True,
        plain=(Sparklines(lines, "Accuracy over the learning rates, from the lowest to the highest", ends=True),),
    )  # fmt: skip


def rate_label(curve: RateCurve, curves: Sequence[RateCurve]) -> str:
    """A curve's norm, with its start if there are several."""
    return f"{curve.norm}, {curve.start}" if len({each.start for each in curves}) > 1 else curve.norm


def difference_chart(compared: Sequence[Comparison]) -> Chart | None:
    """Every two norms' difference and its interval: zero within is no difference shown."""
    names = {"overall": "overall", "best lr": "at the best rates", "batch size": "per doubling of the batch size",
             "setting": "by setting"}  # fmt: skip
    views = {name: [c for c in compared if c.scope == scope and c.difference is not None]
             for scope, name in names.items()}  # fmt: skip
    views = {name: found for name, found in views.items() if 0 < len(found) <= MAX_VIEWS}
    if not views:
        return None

    def draw() -> Figure:
        parts = {name: map(_interval, found) for name, found in views.items()}
        return charts.choose({name: charts.intervals(list(rows), unit="points") for name, rows in parts.items()})

    words = "; ".join(f"{c.a} − {c.b} {points(c.difference, signed=True)}" for c in next(iter(views.values())))
    note = "Points of accuracy with 95 % intervals, not adjusted; filled dots are significant after Holm's adjustment."
    return Chart("differences", "Differences between norms", f"dots with intervals, in points: {words}", draw, note,
                 wide=True)  # fmt: skip


def _interval(c: Comparison) -> Interval:
    name = f"{c.a} − {c.b}" + (f", {setting_label(c.setting)}" if c.setting else "")
    low, high = (100 * c.ci[0], 100 * c.ci[1]) if c.ci else (None, None)
    p = "–" if c.p_holm is None else f"{c.p_holm:.3g}"
    hover = f"{name}\n{points(c.difference)} points\nHolm p {p}, n = {c.n}"
    return Interval(name, 100 * (c.difference or 0.0), low, high, c.significant, hover)


def curve_chart(results: Results) -> Chart | None:
    """Training curves, the mean over the seeds that finished, one line for each norm."""
    found = {name: curves for metric, name in METRICS if (curves := mean_curves(results, metric))}
    if not found:
        return None
    accuracy = found.get("accuracy", {})

    def draw() -> Figure:
        figures = {}
        for name, curves in found.items():
            for setting in list(dict.fromkeys(setting for setting, _ in curves))[:MAX_VIEWS]:
                series = [_series(results, norm, at, "epoch") for (of, norm), at in curves.items() if of == setting]
                words = joined((name, setting_label(setting)), ", ")
                figures[words] = charts.lines(series, x_title="epoch", y_title=name, percent=name == "accuracy",
                                              height=380)  # fmt: skip
        return charts.choose(figures)

    lines = tuple(
        Line(joined((norm, setting_label(setting)), ", "), tuple(p.mean for p in at), form="percent")
        for (setting, norm), at in accuracy.items()
    )
    return Chart(
        "training-curves", "Training curves", f"{plural(sum(map(len, found.values())), 'curve')} over the epochs", draw,
        "Mean over the seeds that finished; bands are 95 % intervals.", wide=True,
        plain=(Sparklines(lines, "Accuracy over the epochs, the mean over seeds", ends=True),) if lines else (),
    )  # fmt: skip


def layer_chart(results: Results) -> Chart:
    """A statistic of every layer over the depth, one line for each network that was analysed."""
    runs = [run for run in results.outcomes if run.analysis and run.analysis.layers]
    names = list(dict.fromkeys(layer.layer for run in runs if run.analysis for layer in run.analysis.layers))
    groups: dict[str, list[Outcome]] = {}
    for run in runs:
        groups.setdefault(run_label(results, run, norm=False), []).append(run)

    def draw() -> Figure:
        figures = {}
        for group, members in groups.items():
            for key, name, log in STATISTICS:
                series = [made for run in members if (made := _over_depth(results, run, names, key)).x]
                if series:
                    label = f"{name}, {group}" if len(groups) > 1 else name
                    figures[label] = charts.lines(
                        series, y_title=name, log_y=log, percent=key.endswith("fraction"), at=charts.ticks(names, 16),
                        height=380,
                    )  # fmt: skip
        return charts.choose(figures)

    plain = []
    for run in runs:
        lines = []
        for key, name, log in STATISTICS:
            values = tuple(getattr(layer, key) for layer in run.analysis.layers) if run.analysis else ()
            if sum(value is not None for value in values) > 1:
                lines.append(Line(name, values, log))
        plain.append(Sparklines(tuple(lines), f"Layers of {run_label(results, run)}, over the depth", ends=True))
    return Chart(
        "layers-lines", "Statistics of the layers",
        f"lines over {plural(len(names), 'layer')} of {plural(len(runs), 'network')}", draw,
        "Over the depth of the trained networks, one line for each norm. Sensitivity is the trace of the empirical "
        "Fisher.", wide=True, plain=tuple(plain),
    )  # fmt: skip


def _over_depth(results: Results, run: Outcome, names: Sequence[str], key: str) -> Series:
    assert run.analysis is not None
    at = {layer.layer: getattr(layer, key) for layer in run.analysis.layers}
    drawn = [(i, at[name], name) for i, name in enumerate(names) if at.get(name) is not None]
    hover = [f"{run.cell.norm}: {value:.3g}\n{name}" for _, value, name in drawn]
    return Series(run.cell.norm, [i for i, *_ in drawn], [value for _, value, _ in drawn], hover=hover,
                  tone=_tone(results, run.cell.norm))  # fmt: skip


def similarity_charts(results: Results) -> Iterator[Chart]:
    """CKA between the layers of each network that was analysed, as heat maps of equal layers with a menu."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for run in results.outcomes:
        if run.analysis and run.analysis.cka:
            groups.setdefault(run.analysis.cka_layers, {})[run_label(results, run)] = run.analysis.cka
    for i, (names, maps) in enumerate(groups.items()):
        plain = tuple(HeatMap(names, names, m, f"CKA of the layers: {label}") for label, m in maps.items())
        note = "Linear CKA of every two layers: 1 is the same information."
        note += f" {next(iter(maps))}." if len(maps) == 1 else ""
        words = f"heat map of {len(names)} by {len(names)} layers, for {plural(len(maps), 'network')}"
        draw = partial(_heat_maps, names, maps)
        yield Chart(f"cka-{i}", "Similarity of the layers", words, draw, note, wide=True, plain=plain)


def _heat_maps(names: Sequence[str], maps: dict[str, Any]) -> Figure:
    return charts.choose({name: charts.heat(names, names, matrix) for name, matrix in maps.items()})


def run_label(results: Results, run: Outcome, norm: bool = True) -> str:
    """A run's norm, setting and seed in words."""
    label = cell_label(run.cell, [axis for axis in results.varying() if axis != "norm"], norm)
    return joined((label, f"seed {run.cell.seed}"), ", ")


def _in_contexts(results: Results, shown: Sequence[str], draw: Callable[[Results], Figure]) -> Figure:
    """The figure of all results, and of each setting of the axes that the chart does not show itself."""
    axes = [axis for axis in setting_axes(results) if axis not in shown]
    contexts = list(dict.fromkeys(setting_of(outcome.cell, axes) for outcome in results.outcomes))
    figures = {"average of all": draw(results)}
    if 1 < len(contexts) <= MAX_VIEWS:
        for context in contexts:
            part = tuple(outcome for outcome in results.outcomes if setting_of(outcome.cell, axes) == context)
            figures[setting_label(context)] = draw(replace(results, outcomes=part))
    return charts.choose({name: figure for name, figure in figures.items() if figure.data})


def _lines(series: Sequence[Series], x: str, y: str, log: bool) -> Figure:
    return charts.lines(series, x_title=x, y_title=y, log_x=log, percent=True, band=False, height=380)


def _series(results: Results, norm: str, at: Sequence[Point], x: str, name: str = "", dash: str = "solid") -> Series:
    hover = []
    for point in at:
        ci = f"\n95 %: {percent(point.ci[0])} to {percent(point.ci[1])}" if point.ci and x != "epoch" else ""
        lost = f", {point.diverged} diverged" if point.diverged else ""
        value = percent(point.mean) if x != "epoch" else f"{point.mean:.3g}"
        hover.append(f"{name or norm} {value}{ci}\n{x} {point.x:g}, n = {point.n}{lost}")
    low, high = ([None if point.ci is None else point.ci[side] for point in at] for side in (0, 1))
    if not any(point.ci for point in at):
        low = high = []
    return Series(name or norm, [p.x for p in at], [p.mean for p in at], low, high, hover, _tone(results, norm), dash)


def _tone(results: Results, norm: str) -> int:
    return axis_order("norm", (outcome.cell.norm for outcome in results.outcomes)).index(norm)
