"""The page's charts as plain data, which ``study.js`` draws: accuracy over batch sizes and rates, differences, layers.

A chart with switches has one *view* for each choice of options, keyed by the options joined with ``|``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from normsurgeon.reporting.figures import Chart, rounded, ticks
from normsurgeon.reporting.formatting import percent, plural
from normsurgeon.reporting.maps_and_bars import packed
from normsurgeon.study.answer import Answer
from normsurgeon.study.pairing import Setting, axis_order, setting_axes
from normsurgeon.study.panels import rate_label, run_label
from normsurgeon.study.quantities import Comparison
from normsurgeon.study.rates import rate_curves, unscaled
from normsurgeon.study.records import Results
from normsurgeon.study.statistics import crossing
from normsurgeon.study.training_curves import METRICS, mean_curves
from normsurgeon.study.wording import points, setting_label

AVERAGE = "average of all"
_MOST_CONTEXTS = 60
_MOST_DIFFERENCES = 60

Switches = list[tuple[str, str, tuple[str, ...]]]


def batch_chart(answer: Answer) -> Chart | None:
    """Accuracy over the batch size, one line a norm, with 95 % intervals."""
    results = answer.results
    if "batch_size" not in setting_axes(results):
        return None
    sizes = axis_order("batch_size", (outcome.cell.batch_size for outcome in results.outcomes))
    # The rate may follow from the batch size.
    views = _in_contexts(results, ("batch_size", "lr"), lambda part: _batch_lines(answer, part))
    if not views:
        return None
    first = next(iter(views.values()))
    said = "; ".join(f"{line['name']} {percent(line['y'][0])} to {percent(line['y'][-1])}" for line in first)
    return Chart(
        "batch-lines",
        "Accuracy against batch size",
        "Mean over the seeds; whiskers are 95 % intervals, cut off where they would dwarf the means. A diverged run "
        "counts as 0 right.",
        f"lines from batch size {sizes[0]} to {sizes[-1]}: {said}",
        {
            "type": "lines",
            "views": views,
            "x": "batch size",
            "y": "accuracy",
            "log": True,
            "at": sizes,
            "percent": True,
        },
        switches=(("view", "setting", tuple(views)),) if len(views) > 1 else (),
        wide=True,
    )  # fmt: skip


def rate_chart(answer: Answer) -> Chart | None:
    """Accuracy over the learning rate, one line for each norm and start, with 95 % intervals."""
    results, size = unscaled(answer.results)
    views = _in_contexts(results, ("lr", "start"), lambda part: _rate_lines(answer, part))
    if not views:
        return None
    rates = sorted({rate for lines in views.values() for line in lines for rate in line["x"]})
    first = next(iter(views.values()))
    best = "; ".join(f"{line['name']} best at {line['x'][line['y'].index(max(line['y']))]:g}" for line in first)
    return Chart(
        "rate-lines",
        "Accuracy against learning rate",
        "Mean over the seeds; whiskers are 95 % intervals, cut off where they would dwarf the means. A diverged run "
        "counts as 0 right." + (" Dotted: from random weights." if any("dash" in line for line in first) else ""),
        f"lines from learning rate {rates[0]:g} to {rates[-1]:g}: {best}",
        {
            "type": "lines",
            "views": views,
            "x": f"learning rate, for batches of {size}" if size else "learning rate",
            "y": "accuracy",
            "log": True,
            "at": rates,
            "percent": True,
        },
        switches=(("view", "setting", tuple(views)),) if len(views) > 1 else (),
        wide=True,
    )


def difference_chart(answer: Answer) -> Chart | None:
    """Every two norms' difference and its interval: zero within is no difference shown."""
    said = (("overall", "overall"), ("best lr", "at the best rates"), ("batch size", "per doubling of the batch size"),
            ("setting", "by setting"))  # fmt: skip
    views = {}
    for scope, label in said:
        found = [c for c in answer.scope(scope) if c.difference is not None]
        if found and len(found) <= _MOST_DIFFERENCES:
            views[label] = [_difference(c) for c in found]
    if not views:
        return None
    first = next(iter(views.values()))
    summary = "; ".join(f"{line['name']} {points(line['x'], signed=True)}" for line in first)
    return Chart(
        "differences",
        "Differences between norms",
        "Points of accuracy with 95 % intervals, not adjusted; filled dots are significant after Holm's adjustment.",
        f"dots with intervals, in points: {summary}",
        {"type": "differences", "views": views},
        switches=(("view", "what", tuple(views)),) if len(views) > 1 else (),
        wide=True,
    )


def curve_chart(answer: Answer) -> Chart | None:
    """Training curves, the mean over the seeds that finished, one line a norm."""
    found = mean_curves(answer.results)
    if not found:
        return None
    settings = list(dict.fromkeys(setting_label(curve.setting) or "all" for curve in found))
    metrics = [(key, label) for key, label in METRICS if any(curve.metric == key for curve in found)]
    views: dict[str, list[dict[str, Any]]] = {
        "|".join(x for x in ((setting,) if len(settings) > 1 else ()) + ((label,) if len(metrics) > 1 else ())): [
            _line(
                answer,
                curve.norm,
                [(p.epoch, p.mean, p.ci, f"n = {p.n}") for p in curve.points],
            )
            for curve in found
            if curve.metric == key and (setting_label(curve.setting) or "all") == setting
        ]
        for setting in settings
        for key, label in metrics
    }
    switches: Switches = [("setting", "setting", tuple(settings))] if len(settings) > 1 else []
    switches += [("metric", "measure", tuple(label for _, label in metrics))] if len(metrics) > 1 else []
    spec = {"type": "lines", "views": views, "x": "epoch", "band": True, "choices": _choices(switches),
            "percents": ["accuracy"]}  # fmt: skip
    if len(metrics) == 1:
        spec |= {"y": metrics[0][1], "percent": metrics[0][0] == "accuracy"}
    return Chart(
        "training-curves",
        "Training curves",
        "Mean over the seeds that finished; bands are 95 % intervals.",
        f"{plural(len(found), 'curve')} over the epochs",
        spec,
        switches=tuple(switches),
        wide=True,
    )


STATISTICS = (
    ("std", "std", "log"), ("mean", "mean", "linear"), ("effective_rank", "effective rank", "log"),
    ("sensitivity", "sensitivity", "log"), ("zero_fraction", "zeros", "percent"),
    ("dead_fraction", "dead channels", "percent"), ("group_fluctuation", "group fluctuation", "linear"),
)  # fmt: skip


def layer_chart(answer: Answer) -> Chart | None:
    """A statistic of every layer over the depth, one line a network that was looked at."""
    runs = [run for run in answer.results.outcomes if run.looked and run.looked.layers]
    if not runs:
        return None
    names = list(dict.fromkeys(layer.layer for run in runs if run.looked for layer in run.looked.layers))
    groups: dict[str, list[Any]] = {}
    for run in runs:
        groups.setdefault(_context_label(answer, run), []).append(run)
    used = [s for s in STATISTICS if any(getattr(layer, s[0]) is not None for r in runs if r.looked
                                         for layer in r.looked.layers)]  # fmt: skip
    views: dict[str, list[dict[str, Any]]] = {}
    for group, members in groups.items():
        for key, label, _ in used:
            lines = []
            for run in members:
                at = {layer.layer: getattr(layer, key) for layer in run.looked.layers}
                drawn = [(i, at[name], None, name) for i, name in enumerate(names) if at.get(name) is not None]
                lines.append(_line(answer, run.cell.norm, drawn))
            views["|".join((group, label) if len(groups) > 1 else (label,))] = lines
    switches: Switches = [("group", "networks", tuple(groups))] if len(groups) > 1 else []
    switches.append(("statistic", "statistic", tuple(label for _, label, _ in used)))
    return Chart(
        "layers-lines",
        "Statistics of the layers",
        "Over the depth of the trained networks, one line a norm. Sensitivity is the trace of the empirical Fisher.",
        f"lines over {plural(len(names), 'layer')} of {plural(len(runs), 'network')}",
        {"type": "lines", "views": views, "names": names, "ticks": ticks(names), "choices": _choices(switches),
         "scales": {label: scale for _, label, scale in used}},
        switches=tuple(switches),
        wide=True,
    )  # fmt: skip


def similarity_charts(answer: Answer) -> tuple[Chart, ...]:
    """CKA between the layers of each network that was looked at, as heat maps of equal layers with a switch."""
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for run in answer.results.outcomes:
        if run.looked and run.looked.cka:
            label = f"{run_label(answer, run)}, seed {run.cell.seed}"
            groups.setdefault(run.looked.cka_layers, {})[label] = packed(run.looked.cka)
    charts = []
    for i, (names, maps) in enumerate(groups.items()):
        spec = {"type": "heat", "rows": list(names), "columns": None, "rowTicks": ticks(names, few=16),
                "columnTicks": ticks(names, few=16), "low": 0.0, "maps": maps}  # fmt: skip
        note = "Linear CKA of every two layers: 1 is the same information." + (
            f" {next(iter(maps))}." if len(maps) == 1 else ""
        )
        said = f"heat map of {len(names)} by {len(names)} layers, for {plural(len(maps), 'network')}"
        switches = (("map", "network", tuple(maps)),) if len(maps) > 1 else ()
        charts.append(Chart(f"cka-{i}", "Similarity of the layers", note, said, spec, switches=switches, wide=True))
    return tuple(charts)


def _batch_lines(answer: Answer, results: Results) -> list[dict[str, Any]]:
    made = crossing(results, "batch_size")
    lines = []
    for norm in made.norms:
        drawn = [
            (size, mean, ci, f"n = {n}" + (f", {diverged} diverged" if diverged else ""))
            for size, of, mean, ci, n, diverged in made.cells
            if of == norm and mean is not None
        ]
        if drawn:
            lines.append(_line(answer, norm, drawn))
    return lines


def _rate_lines(answer: Answer, results: Results) -> list[dict[str, Any]]:
    curves = rate_curves(results)
    lines = []
    for curve in curves:
        drawn = [
            (p.rate, p.mean, p.ci, f"n = {p.n}" + (f", {p.diverged} diverged" if p.diverged else ""))
            for p in curve.points
        ]
        label = rate_label(curve, curves)
        dash = {"dash": "dot"} if label != curve.norm and curve.start == "scratch" else {}
        lines.append({**_line(answer, curve.norm, drawn), "name": label, **dash})
    return lines


def _in_contexts(
    results: Results, shown: Sequence[str], lines: Callable[[Results], list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The lines of all results, and those of each setting of the axes that the chart does not show itself."""
    views = {AVERAGE: lines(results)}
    contexts = _contexts(results, shown)
    if 1 < len(contexts) <= _MOST_CONTEXTS:
        for context in contexts:
            part = [o for o in results.outcomes if all(getattr(o.cell, axis) == value for axis, value in context)]
            views[setting_label(context)] = lines(replace(results, outcomes=tuple(part)))
    return {name: made for name, made in views.items() if made}


def _contexts(results: Results, shown: Sequence[str]) -> list[Setting]:
    """Every setting of the axes that vary, but for those that are shown."""
    axes = [axis for axis in setting_axes(results) if axis not in shown]
    return list(dict.fromkeys(tuple((axis, getattr(o.cell, axis)) for axis in axes) for o in results.outcomes))


def _choices(switches: Switches) -> list[list[str]]:
    """Each choice's name and its first option."""
    return [[name, options[0]] for name, _, options in switches]


def _context_label(answer: Answer, run: Any) -> str:
    axes = [axis for axis in answer.results.varying() if axis != "norm"]
    said = setting_label(tuple((axis, getattr(run.cell, axis)) for axis in axes))
    return f"{said}, seed {run.cell.seed}" if said else f"seed {run.cell.seed}"


def _line(answer: Answer, norm: str, drawn: Sequence[tuple[float, float, Any, str]]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "name": norm,
        "tone": answer.norms.index(norm),
        "x": [rounded(x) for x, _, _, _ in drawn],
        "y": [rounded(y) for _, y, _, _ in drawn],
        "said": [said for _, _, _, said in drawn],
    }
    if any(ci is not None for _, _, ci, _ in drawn):
        line["low"] = [rounded(ci[0]) if ci else None for _, _, ci, _ in drawn]
        line["high"] = [rounded(ci[1]) if ci else None for _, _, ci, _ in drawn]
    return line


def _difference(c: Comparison) -> dict[str, Any]:
    return {
        "name": f"{c.a} − {c.b}" + (f", {setting_label(c.setting)}" if c.setting else ""),
        "x": rounded(c.difference),
        "low": rounded(c.ci[0]) if c.ci else None,
        "high": rounded(c.ci[1]) if c.ci else None,
        "significant": c.significant,
        "p": rounded(c.p_holm),
        "n": c.n,
    }
