"""A report as a file: the page, the JSON document or the layer table, by the name's ending."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from normsurgeon._util.files import check_writable, write_text
from normsurgeon.errors import UsageError
from normsurgeon.reporting.layers import LayerRow, layer_rows, measure_key, measure_labels
from normsurgeon.reporting.records import LayerPair, LayerStatistics, Report

_NO_SCALARS = {"layer", "dead", "dormant", "channel_means", "channel_stds"}
_STATISTICS = (*(f.name for f in fields(LayerStatistics) if f.name not in _NO_SCALARS), "std")
_TEXTS = {"kind", "class_name", "shape", "channels", "groups"}  # the same in the baseline, or said by its own report
_BASELINE = tuple(name for name in _STATISTICS if name not in _TEXTS)
_PAIR = tuple(f.name for f in fields(LayerPair) if f.name not in ("layer", "baseline_layer"))


def save(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the report as ``.html``, ``.json`` or ``.csv``, whole or not at all; the path comes back.

    :raises UsageError: another ending.
    :raises NormSurgeonError: the file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".html", ".json", ".csv"):
        raise UsageError(
            f"cannot tell how to write {path}: a report's name ends in .html (a page), .json or .csv (the layer table)"
        )
    check_writable(path)  # before the page is made
    if ending == ".html":
        from normsurgeon.reporting.html import page

        text = page(report)
    else:
        text = json_text(report) if ending == ".json" else csv_text(report)
    write_text(path, text)
    return path


def json_text(report: Report) -> str:
    """The documented JSON (docs/report.md), as text."""
    return json.dumps(report.to_dict(), allow_nan=False, ensure_ascii=False) + "\n"


def csv_text(report: Report) -> str:
    """The layer table: one row a layer, numbers in full, an empty cell for what has no value."""
    rows = layer_rows(report)
    measures = tuple(zip(measure_labels(report.sensitivity), report.sensitivity or (), strict=True))
    header = ["layer"]
    header += _STATISTICS if report.statistics is not None else ()
    header += [f"baseline_{name}" for name in _BASELINE] if report.baseline_statistics is not None else ()
    header += ["baseline_layer", *_PAIR] if report.comparison else ()
    for _, measure in measures:
        header += [measure_key(measure), f"{measure_key(measure)}_stderr"]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = _cells(row)
        for label, measure in measures:
            if score := row.sensitivity.get(label):
                key = measure_key(measure)
                cells |= {key: score.score, f"{key}_stderr": score.stderr}
        writer.writerow({name: _scalar(value) for name, value in cells.items()})
    return text.getvalue()


def _cells(row: LayerRow) -> dict[str, Any]:
    cells: dict[str, Any] = {"layer": row.layer}
    if row.statistics:
        cells |= {name: getattr(row.statistics, name) for name in _STATISTICS}
    if row.baseline:
        cells |= {f"baseline_{name}": getattr(row.baseline, name) for name in _BASELINE}
    if row.pair:
        cells |= {name: getattr(row.pair, name) for name in ("baseline_layer", *_PAIR)}
    return cells


def _scalar(value: Any) -> Any:
    """A shape as ``64x7x7``; nan and infinity, which not every reader takes, as nothing."""
    if isinstance(value, tuple):
        return "x".join(str(inner) for inner in value)
    if value is None or (isinstance(value, float) and value - value != 0):
        return ""
    return value
