"""The layer table: everything that is known of a layer, in one row, and the columns that show it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normsurgeon.reporting.formatting import has_value, percent, shown, significant
from normsurgeon.reporting.records import LayerPair, LayerStatistics, Report, Score, Sensitivity


@dataclass(frozen=True)
class LayerRow:
    """One layer and what was measured of it; ``sensitivity`` is by the measure's label."""

    layer: str
    statistics: LayerStatistics | None = None
    baseline: LayerStatistics | None = None
    pair: LayerPair | None = None
    sensitivity: Mapping[str, Score] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``norm``, ``convolution``, …; empty without statistics."""
        return self.statistics.kind if self.statistics else ""


@dataclass(frozen=True)
class Column:
    """A column of the layer table. ``form`` is ``text``, ``number``, ``count`` or ``percent``."""

    key: str
    title: str
    hint: str
    form: str
    value: Callable[[LayerRow], Any]

    def text(self, row: LayerRow) -> str:
        """The cell in words."""
        value = self.value(row)
        if self.form == "percent":
            return percent(value)
        return significant(value) if self.form == "number" else shown(value)

    def sort_value(self, row: LayerRow) -> str:
        """What the page's table is sorted by; empty for a cell without a value."""
        value = self.value(row)
        return repr(value) if isinstance(value, (int, float)) and has_value(value) else ""


def measure_labels(measures: Sequence[Sensitivity] | None) -> tuple[str, ...]:
    """A name for each measure, with its loss where a method was run with several."""
    methods = [measure.method for measure in measures or ()]
    return tuple(
        measure.method if methods.count(measure.method) == 1 else f"{measure.method} ({measure.loss})"
        for measure in measures or ()
    )


def measure_key(measure: Sensitivity) -> str:
    """The measure as a stable field name: ``sensitivity_taylor_labels``."""
    return "sensitivity_" + re.sub(r"[^a-z0-9]+", "_", f"{measure.method}_{measure.loss}".lower()).strip("_")


def layer_rows(report: Report) -> tuple[LayerRow, ...]:
    """One row a layer, in the network's order. What only another part of the report knows comes last."""
    statistics = {entry.layer: entry for entry in report.statistics or ()}
    baseline = {entry.layer: entry for entry in report.baseline_statistics or ()}
    pairs = {pair.layer: pair for pair in report.comparison.pairs} if report.comparison else {}
    scores: dict[str, dict[str, Score]] = {}
    for label, measure in zip(measure_labels(report.sensitivity), report.sensitivity or (), strict=True):
        for score in measure.layers:
            scores.setdefault(score.name, {})[label] = score
    similar = report.similarity.layers if report.similarity and not statistics else ()
    rows = []
    for name in dict.fromkeys((*statistics, *similar, *pairs, *scores)):
        pair = pairs.get(name)
        counterpart = baseline.get(pair.baseline_layer if pair else name)
        rows.append(LayerRow(name, statistics.get(name), counterpart, pair, scores.get(name, {})))
    return tuple(rows)


def columns(report: Report, rows: Sequence[LayerRow]) -> tuple[Column, ...]:
    """The columns that have a value in any row, the most telling first."""
    measured = tuple(
        Column(f"sensitivity:{label}", f"{label}", "sensitivity of the loss", "number", _score(label))
        for label in measure_labels(report.sensitivity)
    )
    every = (*_NAMED, *_BASIC, *_COMPARED, *measured, *_FINER)
    return tuple(c for c in every if c.key == "layer" or any(has_value(c.value(row)) for row in rows))


def _statistic(name: str) -> Callable[[LayerRow], Any]:
    return lambda row: getattr(row.statistics, name) if row.statistics else None


def _pair(name: str) -> Callable[[LayerRow], Any]:
    return lambda row: getattr(row.pair, name) if row.pair else None


def _score(label: str) -> Callable[[LayerRow], Any]:
    return lambda row: row.sensitivity[label].score if label in row.sensitivity else None


def between_share(entry: LayerStatistics | None) -> float | None:
    """The share of a channel's variance that lies between images."""
    if entry is None or entry.between_var is None or entry.within_var is None:
        return None
    whole = entry.between_var + entry.within_var
    return entry.between_var / whole if whole > 0 else None


def non_finite(entry: LayerStatistics | None) -> int | None:
    """How many values were nan or infinite; None when none was."""
    return (entry.nan + entry.inf) or None if entry else None


_NAMED = (
    Column("layer", "layer", "module path", "text", lambda row: row.layer),
    Column("kind", "kind", "what the layer is", "text", lambda row: row.kind),
)
_BASIC = (
    Column("mean", "mean", "mean of all values", "number", _statistic("mean")),
    Column("std", "std", "standard deviation of all values", "number", _statistic("std")),
    Column("abs_mean", "mean |x|", "mean of the absolute values", "number", _statistic("abs_mean")),
    Column("zero_fraction", "zeros", "share of values that are exactly 0", "percent", _statistic("zero_fraction")),
    Column("effective_rank", "eff. rank", "exp of the entropy of the channel covariance's spectrum", "number",
           _statistic("effective_rank")),
    Column("dead_channels", "dead", "channels that never fire", "count", _statistic("dead_channels")),
    Column("nonfinite", "nan/inf", "values that are not finite", "count", lambda row: non_finite(row.statistics)),
)  # fmt: skip
_COMPARED = (
    Column("cka", "CKA", "linear CKA with the baseline's layer: 1 is the same information", "number", _pair("cka")),
    Column("relative_error", "rel. error", "‖a − b‖ / ‖b‖ against the baseline: 0 is the same function", "number",
           _pair("relative_error")),
    Column("cosine", "cosine", "mean cosine with the baseline's features", "number", _pair("cosine")),
)  # fmt: skip
_FINER = (
    Column("group_fluctuation", "group fluct.", "how far the group's std varies from image to image", "number",
           _statistic("group_fluctuation")),
    Column("mean_fluctuation", "mean fluct.", "how far the group's mean varies from image to image", "number",
           _statistic("mean_fluctuation")),
    Column("participation_ratio", "part. ratio", "(Σλ)² / Σλ² of the channel covariance", "number",
           _statistic("participation_ratio")),
    Column("dormant_channels", "dormant", "channels far quieter than the layer's average", "count",
           _statistic("dormant_channels")),
    Column("between_share", "between", "share of the channels' variance that lies between images", "percent",
           lambda row: between_share(row.statistics)),
    Column("min", "min", "least value", "number", _statistic("min")),
    Column("max", "max", "greatest value", "number", _statistic("max")),
    Column("kurtosis", "kurtosis", "excess kurtosis of all values", "number", _statistic("kurtosis")),
    Column("channels", "channels", "size of the channel dimension", "count", _statistic("channels")),
    Column("shape", "shape", "of one image's output", "text", _statistic("shape")),
    Column("class_name", "class", "Python class", "text", _statistic("class_name")),
)  # fmt: skip
