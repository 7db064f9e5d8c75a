"""An analysis' charts: over the depth of the network, of layers with layers, of sensitivity, settings and training."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normsurgeon.analysis.layer_table import LayerRow, Measures, Rows
from normsurgeon.analysis.records import Matrix, Score, SweepPoint
from normsurgeon.render.document import Bars, Chart, HeatMap, Line, Sparklines
from normsurgeon.render.formatting import exact, joined, significant
from normsurgeon.surgery.history import Curve, is_number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from normsurgeon.render.charts import Series

KINDS = ("norm", "convolution", "block", "linear", "", "", "other")
"""Kinds of layer, each at the place of its colour."""
MOST_BARS, MOST_SITES, MOST_IN_WORDS, MOST_LAYERS = 25, 5, 10, 20
MIN_CHANNELS = 8
"""Below which a histogram says nothing."""

_Spec = tuple[str, str, str, str, tuple[tuple[str, ...], ...]]
"""Id, title, note, scale, and the lines: key, label, and for a band the keys of its edges."""
_DASHES = ("solid", "dash", "dot")
_PROFILE: tuple[_Spec, ...] = (
    ("abs_mean", "Magnitude", "Mean |x| of each layer's output.", "log", (("abs_mean", "mean |x|"),)),
    ("moments", "Mean ± standard deviation", "Of all values of a layer's output.", "linear",
     (("mean", "mean ± std", "mean-std", "mean+std"),)),
    ("propagation", "Signal propagation", "Averages over channels: of the squared channel mean, and of the channel "
     "variance (Brock et al., 2021).", "log",
     (("channel_var", "channel variance"), ("squared_mean", "squared channel mean"))),
    ("channels", "Channel means", "Median over a layer's channels; the band holds 90 % of them.", "linear",
     (("channel_q50", "median", "channel_q05", "channel_q95"),)),
    ("zeros", "Zeros and dead channels", "Share of values that are 0, and of channels that never fire.", "percent",
     (("zero_fraction", "zeros"), ("dead_share", "dead channels"))),
    ("rank", "Effective rank", "How many directions the channels span: exp of the spectrum's entropy, and the "
     "participation ratio.", "log",
     (("effective_rank", "effective rank"), ("participation_ratio", "participation ratio"))),
    ("variance", "Variance between and within images", "A per-sample norm takes out what differs between images.",
     "log", (("between_var", "between"), ("within_var", "within"))),
    ("fluctuation", "Fluctuation of the group statistics", "At norm sites: how far what a per-sample norm divides by, "
     "and what it subtracts, varies from image to image.", "linear",
     (("group_fluctuation", "standard deviation"), ("mean_fluctuation", "mean"))),
)  # fmt: skip
_COMPARISON: tuple[_Spec, ...] = (
    ("error", "Relative error", "‖a − b‖ / ‖b‖ over all images: 0 is the same function.", "log",
     (("relative_error", "relative error"),)),
    ("likeness", "Likeness", "Each layer with its counterpart: 1 is the same information, whatever the scale.",
     "linear", (("cka", "CKA"), ("cosine", "cosine"), ("gram_cosine", "Gram cosine"))),
    *(("both-" + key, f"{title}, before and after", note, "log", ((key, "model"), (f"before: {key}", "baseline")))
      for key, title, note in (("abs_mean", "Magnitude", "Mean |x| in both networks."),
                               ("std", "Standard deviation", "Of all values, in both networks."),
                               ("effective_rank", "Effective rank", "In both networks."))),
    ("shift", "Shift of the channels", "Mean over channels of |mean − baseline's mean| / baseline's std.", "linear",
     (("mean_shift", "mean shift"),)),
)  # fmt: skip
_HOVER = {
    "mean": "mean", "std": "std", "abs_mean": "mean |x|", "min": "min", "max": "max", "zero_fraction": "zeros",
    "skewness": "skewness", "kurtosis": "kurtosis", "effective_rank": "eff. rank",
    "participation_ratio": "part. ratio", "channel_var": "ch. variance", "squared_mean": "sq. ch. mean",
    "between_var": "var. between", "within_var": "var. within", "dead_channels": "dead ch.",
    "dormant_channels": "dormant ch.", "group_fluctuation": "group fluct.", "mean_fluctuation": "mean fluct.",
    "nan": "nan", "inf": "inf", "cka": "CKA", "cosine": "cosine", "gram_cosine": "Gram cosine",
    "relative_error": "rel. error", "mean_shift": "mean shift", "before: std": "before: std",
    "before: abs_mean": "before: |x|", "before: effective_rank": "before: eff. rank",
}  # fmt: skip


def profile_charts(rows: Rows) -> tuple[Chart, ...]:
    """What the layers' outputs look like over the depth of the network."""
    return tuple(_depth_charts("profile", _PROFILE, rows))


def comparison_charts(rows: Rows) -> tuple[Chart, ...]:
    """How far each layer is from the baseline's layer of the same name, both profiles, and the channels of some."""
    return (*_depth_charts("comparison", _COMPARISON, rows), *_tree_chart(rows), *_channel_chart(rows))


def _tree_chart(rows: Rows) -> Iterator[Chart]:
    """The modules as a tree, each in the colour of the worst layer in it."""
    drift = {row.layer: row.pair.relative_error for row in rows if row.pair and not row.pair.rewritten}
    errors = {name: error for name, error in drift.items() if error is not None and math.isfinite(error)}
    if len(errors) < 2:
        return
    worst: dict[str, tuple[float, str]] = {}
    for name in errors:
        path = ""
        for part in name.split("."):
            path = f"{path}.{part}" if path else part
            worst[path] = max(worst.get(path, (-1.0, "")), (errors[name], name))
    most, where = max((error, name) for name, error in errors.items())
    root = "network"
    nodes = [(root, "", most, f"relative error at most {significant(most)}, at {where}")]
    for path, (error, name) in worst.items():
        number = errors.get(path, error)
        inside = f"\nworst inside: {name}" if path not in errors else ""
        parent = path.rpartition(".")[0]
        nodes.append(
            (
                f".{path}",
                f".{parent}" if parent else root,
                number,
                f"{path}\nrelative error {significant(number)}{inside}",
            )
        )

    def figure() -> Figure:
        from normsurgeon.render import charts

        return charts.tree(nodes, unit="relative error", high=max(most, 1e-6))

    note = "Each module in the colour of its own relative error, or of the worst inside it. A click opens a part."
    summary = f"a tree of {len(nodes) - 1} modules; the greatest relative error is {significant(most)}, at {where}"
    yield Chart("comparison-tree", "The network, coloured by its drift", summary, figure, note, wide=True)


def _channel_chart(rows: Rows) -> Iterator[Chart]:
    """Before and after, the channels' standard deviations of the layers that differ most; a choice of the layer."""
    found: list[tuple[float, str, list[float], list[float]]] = []
    for row in rows:
        if row.pair and not row.pair.rewritten and row.statistics and row.baseline:
            before, after = ([v for v in x.channel_stds if is_number(v)] for x in (row.baseline, row.statistics))
            error = row.pair.relative_error
            if min(len(before), len(after)) >= MIN_CHANNELS and error is not None and math.isfinite(error):
                found.append((error, row.layer, before, after))
    if not found:
        return
    found = sorted(found, key=lambda entry: -entry[0])[:MOST_LAYERS]

    def figure() -> Figure:
        from normsurgeon.render import charts

        return charts.choose({
            layer: charts.histograms({"baseline": before, "model": after}, x_title="standard deviation of a channel")
            for _, layer, before, after in found
        })  # fmt: skip

    note = f"The {len(found)} layers that are farthest from the baseline's; choose one."
    summary = f"histograms of the channels' standard deviations in both networks; first that of {found[0][1]}"
    yield Chart("comparison-channels", "Channels before and after", summary, figure, note, wide=True)


def heat_chart(
    name: str, title: str, note: str, rows: Sequence[str], across: Sequence[str], maps: Mapping[str, Matrix | None]
) -> tuple[Chart, ...]:
    """Layers with layers, with a choice of the measure; terminals show the CKA."""
    found = {label: values for label, values in maps.items() if values is not None and _finite(values)}
    if not found:
        return ()

    def figure() -> Figure:
        from normsurgeon.render import charts

        low = min(0.0, *(min(_finite(values)) for values in found.values()))
        return charts.choose({label: charts.heat(rows, across, values, low=low) for label, values in found.items()})

    label, first = next(iter(found.items()))
    known = _finite(first)
    summary = (
        f"heat map of {len(rows)} by {len(across)} layers; {label} from {significant(min(known))} to "
        f"{significant(max(known))}, on average {significant(sum(known) / len(known))}"
    )
    plain = HeatMap(tuple(rows), tuple(across), first, f"{label}: {title[:1].lower()}{title[1:]}")
    return (Chart(name, title, summary, figure, note, wide=True, plain=(plain,)),)


def sensitivity_charts(measures: Measures, rows: Rows) -> tuple[Chart, ...]:
    """The layers (or parameter tensors) that the loss cares about most, as bars; a choice of the measure."""
    parts = {
        label + suffix: (_highest(scores), measure.unit.split(":")[0])
        for label, measure in measures.items()
        for suffix, scores in (("", measure.layers), (", parameters", measure.parameters))
        if _highest(scores)
    }
    if not parts:
        return ()
    kinds = {row.layer: row.kind for row in rows}

    def tone(name: str) -> int:
        return _tone(kinds.get(name) or kinds.get(name.rpartition(".")[0], "other"))

    def bars(entries: Sequence[tuple[str, float, float | None]], unit: str) -> Figure:
        from normsurgeon.render import charts

        tones = [tone(name) for name, *_ in entries]
        return charts.bars(entries, unit=unit, tones=tones, keys=[(t, KINDS[t]) for t in dict.fromkeys(tones)])

    def figure() -> Figure:
        from normsurgeon.render import charts

        return charts.choose({label: bars(*part) for label, part in parts.items()})

    first, ((best, *_), _) = next(iter(parts.items()))
    plain = [
        Bars(tuple(parts[label][0][:MOST_IN_WORDS]), f"Highest by {label}") for label in measures if label in parts
    ]
    summary = f"bars; the highest score by {first} is that of {best[0]}, {significant(best[1])}"
    note = "The highest scores, at most 25. Whiskers are one standard error."
    return (Chart("sensitivity-bars", "Where the loss is sensitive", summary, figure, note, True, tuple(plain)),)


def sweep_charts(points: Sequence[SweepPoint]) -> tuple[Chart, ...]:
    """What each setting of each norm site does to the logits and the loss; a choice of the two."""
    effects = (("KL", "kl"), ("loss change", "loss_change"))
    views: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for point in points:
        for title, key in effects:
            if is_number(point.value) and is_number(effect := getattr(point, key)):
                sites = views.setdefault((point.setting, title), {})
                sites.setdefault(point.layer, []).append((point.value, effect))
    if not views:
        return ()
    # The sites that a setting does most to come first.
    ordered = {
        view: sorted(
            ((site, sorted(line)) for site, line in sites.items()), key=lambda s: -max(abs(y) for _, y in s[1])
        )
        for view, sites in views.items()
    }

    def figure() -> Figure:
        from normsurgeon.render import charts

        return charts.choose(
            {
                f"{setting}: {effect}": _sweep_figure(setting, effect, sites)
                for (setting, effect), sites in ordered.items()
            }
        )

    settings = dict.fromkeys(setting for setting, _ in ordered)
    shown = [(setting, "KL" if (setting, "KL") in ordered else "loss change") for setting in settings]
    plain = tuple(
        Sparklines(
            tuple(Line(site, tuple(y for _, y in line)) for site, line in ordered[view][:MOST_IN_WORDS]),
            f"{view[1]} over {view[0]}: {', '.join(f'{x:g}' for x in _tried(ordered[view]))}",
            ends=True,
        )
        for view in shown
    )
    count = len({point.layer for point in points})
    note = "One site changed at a time. The sites that matter most are in colour."
    summary = f"lines; {', '.join(settings)} varied at {count} sites"
    return (Chart("sweep-lines", "Settings of the norm layers", summary, figure, note, True, plain),)


def history_charts(curves: Sequence[Curve]) -> tuple[Chart, ...]:
    """What was logged while the network was trained, one chart a quantity."""

    def figure(curve: Curve) -> Figure:
        from normsurgeon.render import charts

        hover = [f"{curve.axis} {exact(x)}\n{exact(y)}" for x, y in zip(curve.x, curve.y, strict=True)]
        return charts.lines([charts.Series(curve.title, curve.x, curve.y, hover=hover)], x_title=curve.axis, height=220)

    return tuple(
        Chart(
            f"history-{i}",
            curve.title,
            f"from {significant(curve.y[0])} to {significant(curve.y[-1])} over {len(curve.y)} entries",
            functools.partial(figure, curve),
        )
        for i, curve in enumerate(curves)
    )


def _depth_charts(section: str, specs: Sequence[_Spec], rows: Rows) -> Iterator[Chart]:
    numbers = [_numbers(row) for row in rows]
    for name, title, note, scale, lines in specs:
        drawn = [line for line in lines if any(_drawable(entry.get(line[0]), scale) for entry in numbers)]
        if not drawn or (name.startswith("both") and len(drawn) < 2):
            continue
        summary = joined([_in_words(line, rows, numbers) for line in drawn], "; ")
        figure = functools.partial(_depth_figure, rows, numbers, drawn, scale)
        yield Chart(f"{section}-{name}", title, summary, figure, note)


def _depth_figure(
    rows: Rows, numbers: Sequence[dict[str, float]], lines: Sequence[tuple[str, ...]], scale: str
) -> Figure:
    from normsurgeon.render import charts

    hover = [_hover(row, entry) for row, entry in zip(rows, numbers, strict=True)]
    series: list[Series] = []
    # What a surgery rewrote differs by design, and would rule every chart: it is drawn on request.
    groups = [(row.kind, bool(row.pair and row.pair.rewritten)) for row in rows]
    for kind, rewritten in sorted(dict.fromkeys(groups), key=lambda group: group[1]):
        at = [i for i, group in enumerate(groups) if group == (kind, rewritten)]
        texts = [hover[i] for i in at]
        for dash, (key, _, *band) in zip(_DASHES, lines, strict=False):
            y, *edges = ([numbers[i].get(name) for i in at] for name in (key, *band))
            if any(v is not None for v in y):
                low, high = edges or ((), ())
                name = f"{kind or 'other'}, rewritten" if rewritten else kind or "other"
                series.append(charts.Series(name, at, y, low, high, texts, _tone(kind), dash, rewritten))
    keys = list(zip(_DASHES, (label for _, label, *_ in lines), strict=False)) if len(lines) > 1 else []
    at_parts = [(float(place), name) for place, name in charts.ticks([row.layer for row in rows])]
    return charts.lines(series, log_y=scale == "log", percent=scale == "percent", at=at_parts, keys=keys, height=300)


def _sweep_figure(setting: str, effect: str, sites: Sequence[tuple[str, list[tuple[float, float]]]]) -> Figure:
    from normsurgeon.render import charts

    def series(name: str, tone: int, chosen: Sequence[tuple[str, list[tuple[float, float]]]]) -> Series:
        """One line for several sites, with gaps between them: a trace for each would make a large page."""
        points = [(x, y, f"{site}\n{setting} {exact(x)}\n{effect} {exact(y)}") for site, line in chosen
                  for x, y in (*line, (None, None))]  # fmt: skip
        xs, ys, hover = zip(*points, strict=True)
        return charts.Series(name, xs, ys, hover=hover, tone=tone)

    drawn = [series("other sites", len(KINDS) - 1, sites[MOST_SITES:])] if len(sites) > MOST_SITES else []
    drawn += [series(site, i, [(site, line)]) for i, (site, line) in enumerate(sites[:MOST_SITES])]
    tried = _tried(sites)
    wide = min(tried) > 0 and max(tried) / min(tried) > 20
    return charts.lines(drawn, x_title=setting, y_title=effect, log_x=wide, height=380)


def _tried(sites: Sequence[tuple[str, list[tuple[float, float]]]]) -> list[float]:
    return sorted({x for _, line in sites for x, _ in line})


def _numbers(row: LayerRow) -> dict[str, float]:
    """Everything that is drawn of a layer, by name; what has no value is left out."""
    numbers: dict[str, Any] = {}
    if entry := row.statistics:
        numbers |= {key: getattr(entry, key, None) for key in _HOVER if key not in ("nan", "inf")}
        numbers |= {"nan": entry.nan or None, "inf": entry.inf or None}
        if entry.mean is not None and entry.std is not None:
            numbers |= {"mean-std": entry.mean - entry.std, "mean+std": entry.mean + entry.std}
        numbers["dead_share"] = entry.dead_channels / entry.channels if entry.channels else None
        means = sorted(m for m in entry.channel_means if is_number(m))
        if means:
            numbers |= {f"channel_q{q:02}": means[round(q / 100 * (len(means) - 1))] for q in (5, 50, 95)}
    if row.baseline:
        numbers |= {f"before: {key}": getattr(row.baseline, key) for key in ("abs_mean", "std", "effective_rank")}
    if row.pair:
        pair = ("cka", "cosine", "gram_cosine", "relative_error", "mean_shift")
        numbers |= {key: getattr(row.pair, key) for key in pair}
    # Six digits, so that three are still right when rounded again.
    return {key: float(f"{value:.6g}") for key, value in numbers.items() if is_number(value)}


def _hover(row: LayerRow, numbers: Mapping[str, float]) -> str:
    """All numbers of a layer, in every chart: three a line, since plotly drops what is too tall."""
    entry = row.statistics
    about = ""
    if entry is not None:
        shape = " × ".join(map(str, entry.shape))
        about = f"{entry.class_name}, {shape}" + (f", {entry.groups} groups" if entry.groups else "")
    texts = [f"{label} {exact(numbers[key])}" for key, label in _HOVER.items() if key in numbers]
    return joined([row.layer, about, *(" · ".join(texts[i : i + 3]) for i in range(0, len(texts), 3))], "\n")


def _in_words(line: tuple[str, ...], rows: Rows, numbers: Sequence[dict[str, float]]) -> str:
    known = [(entry[line[0]], row.layer) for entry, row in zip(numbers, rows, strict=True) if line[0] in entry]
    plain = {row.layer for row in rows if not (row.pair and row.pair.rewritten)}
    known = [pair for pair in known if pair[1] in plain] or known
    (low, at_low), (high, at_high) = min(known), max(known)
    return f"{line[1]} lies between {significant(low)} ({at_low}) and {significant(high)} ({at_high})"


def _drawable(value: float | None, scale: str) -> bool:
    return value is not None and (scale != "log" or value > 0)


def _finite(values: Matrix) -> list[float]:
    return [v for row in values for v in row if v is not None and math.isfinite(v)]


def _highest(scores: Sequence[Score]) -> list[tuple[str, float, float | None]]:
    known = [(s.name, s.score, s.stderr) for s in scores if s.score is not None and math.isfinite(s.score)]
    return sorted(known, key=lambda score: -abs(score[1]))[:MOST_BARS]


def _tone(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS and kind else len(KINDS) - 1
