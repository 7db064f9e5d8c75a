"""Everything that is known of a layer in one row, and the columns that show it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from normsurgeon.analysis.records import Comparison, LayerPair, LayerStatistics, Score, Sensitivity, Similarity
from normsurgeon.render.document import Column, Form, Table
from normsurgeon.render.formatting import shown

_NO_SCALARS = {"layer", "dead", "dormant", "channel_means", "channel_stds"}
_STATISTICS = (*(f.name for f in fields(LayerStatistics) if f.name not in _NO_SCALARS), "std")
_TEXTS = {"kind", "class_name", "shape", "channels", "groups"}  # the same in the baseline, or part of its own report
_BASELINE = tuple(name for name in _STATISTICS if name not in _TEXTS)
_PAIR = tuple(f.name for f in fields(LayerPair) if f.name not in ("layer", "baseline_layer"))
_TERMINAL_ROWS = 40


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


Rows = tuple[LayerRow, ...]
Measures = Mapping[str, Sensitivity]
"""Each measure of sensitivity by its label."""


def labelled(measures: Sequence[Sensitivity] | None) -> Measures:
    """The measures by their method, with the loss where a method was run with several."""
    methods = [measure.method for measure in measures or ()]
    return {
        measure.method if methods.count(measure.method) == 1 else f"{measure.method} ({measure.loss})": measure
        for measure in measures or ()
    }


def layer_rows(
    statistics: Sequence[LayerStatistics] | None,
    baseline: Sequence[LayerStatistics] | None,
    similarity: Similarity | None,
    comparison: Comparison | None,
    measures: Measures,
) -> Rows:
    """One row a layer, in the network's order. What only another part of the report knows comes last."""
    known = {entry.layer: entry for entry in statistics or ()}
    before = {entry.layer: entry for entry in baseline or ()}
    pairs = {pair.layer: pair for pair in comparison.pairs} if comparison else {}
    scores: dict[str, dict[str, Score]] = {}
    for label, measure in measures.items():
        for score in measure.layers:
            scores.setdefault(score.name, {})[label] = score
    similar = similarity.layers if similarity and not known else ()
    rows = []
    for name in dict.fromkeys((*known, *similar, *pairs, *scores)):
        pair = pairs.get(name)
        counterpart = before.get(pair.baseline_layer if pair else name)
        rows.append(LayerRow(name, known.get(name), counterpart, pair, scores.get(name, {})))
    return tuple(rows)


def layer_table(rows: Rows, measures: Measures, important: frozenset[str]) -> Table:
    """The layers as they are shown, the most telling columns first."""
    scores = [_column(label, "sensitivity of the loss", "number", _score(label)) for label in measures]
    columns = (*_NAMED, *_BASIC, *_COMPARED, *scores, *_FINER)
    return Table(
        tuple(column for column, _ in columns),
        tuple(tuple(value(row) for _, value in columns) for row in rows),
        searchable=True,
        select="kind",
        noun="layers",
        terminal_rows=_TERMINAL_ROWS,
        important=important or frozenset({rows[0].layer}),
    )


def records(
    rows: Rows, measures: Measures, with_statistics: bool, with_baseline: bool, with_pairs: bool
) -> tuple[list[str], list[dict[str, Any]]]:
    """The layers in full, for files: the header, and a dict of plain values for each layer."""
    header = ["layer"]
    header += _STATISTICS if with_statistics else ()
    header += [f"baseline_{name}" for name in _BASELINE] if with_baseline else ()
    header += ["baseline_layer", *_PAIR] if with_pairs else ()
    keys = {label: _measure_key(measure) for label, measure in measures.items()}
    header += [name for key in keys.values() for name in (key, f"{key}_stderr")]
    return header, [_record(row, keys) for row in rows]


def _record(row: LayerRow, keys: Mapping[str, str]) -> dict[str, Any]:
    cells: dict[str, Any] = {"layer": row.layer}
    if row.statistics:
        cells |= {name: getattr(row.statistics, name) for name in _STATISTICS}
    if row.baseline:
        cells |= {f"baseline_{name}": getattr(row.baseline, name) for name in _BASELINE}
    if row.pair:
        cells |= {name: getattr(row.pair, name) for name in ("baseline_layer", *_PAIR)}
    for label, score in row.sensitivity.items():
        cells |= {keys[label]: score.score, f"{keys[label]}_stderr": score.stderr}
    return {name: _scalar(value) for name, value in cells.items()}


def _scalar(value: Any) -> Any:
    """A shape as ``64x7x7``; nan and infinity, which not every reader takes, as nothing."""
    if isinstance(value, tuple):
        return "x".join(str(inner) for inner in value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measure_key(measure: Sensitivity) -> str:
    """The measure as a stable field name: ``sensitivity_taylor_labels``."""
    return "sensitivity_" + re.sub(r"[^a-z0-9]+", "_", f"{measure.method}_{measure.loss}".lower()).strip("_")


def _column(
    title: str, hint: str, form: Form, value: Callable[[LayerRow], Any]
) -> tuple[Column, Callable[[LayerRow], Any]]:
    return Column(title, form, hint), value


def _statistic(name: str) -> Callable[[LayerRow], Any]:
    return lambda row: getattr(row.statistics, name) if row.statistics else None


def _pair(name: str) -> Callable[[LayerRow], Any]:
    return lambda row: getattr(row.pair, name) if row.pair else None


def _score(label: str) -> Callable[[LayerRow], Any]:
    return lambda row: row.sensitivity[label].score if label in row.sensitivity else None


def _between_share(row: LayerRow) -> float | None:
    entry = row.statistics
    if entry is None or entry.between_var is None or entry.within_var is None:
        return None
    whole = entry.between_var + entry.within_var
    return entry.between_var / whole if whole > 0 else None


def _not_finite(row: LayerRow) -> int | None:
    return (row.statistics.nan + row.statistics.inf) or None if row.statistics else None


_NAMED = (
    _column("layer", "module path", "text", lambda row: row.layer),
    _column("kind", "what the layer is", "text", lambda row: row.kind),
)
_BASIC = (
    _column("mean", "mean of all values", "number", _statistic("mean")),
    _column("std", "standard deviation of all values", "number", _statistic("std")),
    _column("mean |x|", "mean of the absolute values", "number", _statistic("abs_mean")),
    _column("zeros", "share of values that are exactly 0", "percent", _statistic("zero_fraction")),
    _column("eff. rank", "exp of the entropy of the channel covariance's spectrum", "number",
            _statistic("effective_rank")),
    _column("dead", "channels that never fire", "count", _statistic("dead_channels")),
    _column("nan/inf", "values that are not finite", "count", _not_finite),
)  # fmt: skip
_COMPARED = (
    _column("CKA", "linear CKA with the baseline's layer: 1 is the same information", "number", _pair("cka")),
    _column("rel. error", "‖a − b‖ / ‖b‖ against the baseline: 0 is the same function", "number",
            _pair("relative_error")),
    _column("cosine", "mean cosine with the baseline's features", "number", _pair("cosine")),
)  # fmt: skip
_FINER = (
    _column("group fluct.", "how far the group's std varies from image to image", "number",
            _statistic("group_fluctuation")),
    _column("mean fluct.", "how far the group's mean varies from image to image", "number",
            _statistic("mean_fluctuation")),
    _column("part. ratio", "(Σλ)² / Σλ² of the channel covariance", "number", _statistic("participation_ratio")),
    _column("dormant", "channels far quieter than the layer's average", "count", _statistic("dormant_channels")),
    _column("between", "share of the channels' variance that lies between images", "percent", _between_share),
    _column("min", "least value", "number", _statistic("min")),
    _column("max", "greatest value", "number", _statistic("max")),
    _column("kurtosis", "excess kurtosis of all values", "number", _statistic("kurtosis")),
    _column("channels", "size of the channel dimension", "count", _statistic("channels")),
    _column("shape", "of one image's output", "text",
            lambda row: shown(row.statistics.shape) if row.statistics else None),
    _column("class", "Python class", "text", _statistic("class_name")),
)  # fmt: skip
