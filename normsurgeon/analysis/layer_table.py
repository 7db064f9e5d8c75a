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
_Source = str | Callable[[LayerRow], Any]
_Column = tuple[str, Form, str, _Source]
"""Title, form, hint, and what is shown."""
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
    scores: list[_Column] = [(label, "number", "sensitivity of the loss", _score(label)) for label in measures]
    columns = (*_NAMED, *_BASIC, *_COMPARED, *scores, *_FINER)
    return Table(
        tuple(Column(title, form, hint) for title, form, hint, _ in columns),
        tuple(tuple(_value(row, source) for *_, source in columns) for row in rows),
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


def _value(row: LayerRow, source: _Source) -> Any:
    """What a column shows of a layer: ``statistics.mean`` and the like, or what a function makes of it."""
    if not isinstance(source, str):
        return source(row)
    part, _, name = source.rpartition(".")
    return getattr(getattr(row, part) if part else row, name, None)


def _score(label: str) -> Callable[[LayerRow], Any]:
    return lambda row: row.sensitivity[label].score if label in row.sensitivity else None


def _between_share(row: LayerRow) -> float | None:
    entry = row.statistics
    if entry is None or entry.between_var is None or entry.within_var is None:
        return None
    whole = entry.between_var + entry.within_var
    return entry.between_var / whole if whole > 0 else None


def _shape(row: LayerRow) -> str | None:
    return shown(row.statistics.shape) if row.statistics else None


def _not_finite(row: LayerRow) -> int | None:
    return (row.statistics.nan + row.statistics.inf) or None if row.statistics else None


_NAMED: tuple[_Column, ...] = (
    ("layer", "text", "module path", "layer"),
    ("kind", "text", "what the layer is", "kind"),
)
_BASIC: tuple[_Column, ...] = (
    ("mean", "number", "mean of all values", "statistics.mean"),
    ("std", "number", "standard deviation of all values", "statistics.std"),
    ("mean |x|", "number", "mean of the absolute values", "statistics.abs_mean"),
    ("zeros", "percent", "share of values that are exactly 0", "statistics.zero_fraction"),
    ("eff. rank", "number", "exp of the entropy of the channel covariance's spectrum", "statistics.effective_rank"),
    ("dead", "count", "channels that never fire", "statistics.dead_channels"),
    ("nan/inf", "count", "values that are not finite", _not_finite),
)
_COMPARED: tuple[_Column, ...] = (
    ("CKA", "number", "linear CKA with the baseline's layer: 1 is the same information", "pair.cka"),
    ("rel. error", "number", "‖a − b‖ / ‖b‖ against the baseline: 0 is the same function", "pair.relative_error"),
    ("cosine", "number", "mean cosine with the baseline's features", "pair.cosine"),
)
_FINER: tuple[_Column, ...] = (
    ("group fluct.", "number", "how far the group's std varies from image to image", "statistics.group_fluctuation"),
    ("mean fluct.", "number", "how far the group's mean varies from image to image", "statistics.mean_fluctuation"),
    ("part. ratio", "number", "(Σλ)² / Σλ² of the channel covariance", "statistics.participation_ratio"),
    ("dormant", "count", "channels far quieter than the layer's average", "statistics.dormant_channels"),
    ("between", "percent", "share of the channels' variance that lies between images", _between_share),
    ("min", "number", "least value", "statistics.min"),
    ("max", "number", "greatest value", "statistics.max"),
    ("kurtosis", "number", "excess kurtosis of all values", "statistics.kurtosis"),
    ("channels", "count", "size of the channel dimension", "statistics.channels"),
    ("shape", "text", "of one image's output", _shape),
    ("class", "text", "Python class", "statistics.class_name"),
)
