"""The page's other charts as plain data: heat maps, bars, sweeps and training curves."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Sequence
from typing import Any

from normsurgeon.reporting.curves import curves
from normsurgeon.reporting.figures import Chart, rounded, ticks
from normsurgeon.reporting.formatting import significant
from normsurgeon.reporting.layers import measure_labels
from normsurgeon.reporting.records import Comparison, Matrix, Report, Score

NO_VALUE = -32768


def similarity_chart(report: Report) -> Chart | None:
    """How alike the layers of the network are, as a heat map with a switch."""
    if report.similarity is None:
        return None
    it = report.similarity
    kinds = (("CKA", it.cka), ("Gram cosine", it.gram_cosine), ("cosine", it.cosine))
    note = f"Every layer with every layer, from {it.samples} images in batches of {it.batch_size}."
    return _heat_map("similarity-map", "Similarity of the layers", note, it.layers, it.layers, kinds)


def comparison_map(comparison: Comparison | None) -> Chart | None:
    """Every layer of the model with every layer of the baseline."""
    if comparison is None:
        return None
    kinds = (("CKA", comparison.cka), ("Gram cosine", comparison.gram_cosine))
    note = "Rows are the model's layers, columns the baseline's. A bright diagonal: the same thing is computed there."
    names = (comparison.layers, comparison.baseline_layers)
    return _heat_map("comparison-map", "Model against baseline, layer by layer", note, *names, kinds)


def _heat_map(
    name: str,
    title: str,
    note: str,
    rows: Sequence[str],
    across: Sequence[str],
    kinds: Sequence[tuple[str, Matrix | None]],
) -> Chart | None:
    maps = {label: found for label, found in kinds if found is not None and _any(found)}
    if not maps:
        return None
    values = [v for row in next(iter(maps.values())) for v in row if v is not None and math.isfinite(v)]
    return Chart(
        name,
        title,
        note,
        f"heat map of {len(rows)} by {len(across)} layers; {next(iter(maps))} from {significant(min(values))} to "
        f"{significant(max(values))}, on average {significant(sum(values) / len(values))}",
        {
            "type": "heat",
            "rows": list(rows),
            "columns": None if rows == across else list(across),
            "rowTicks": ticks(rows, few=16),
            "columnTicks": ticks(across, few=16),
            "low": min(0.0, *(rounded(v) or 0.0 for m in maps.values() for row in m for v in row)),
            "maps": {label: packed(found) for label, found in maps.items()},
        },
        switches=(("map", "measure", tuple(maps)),) if len(maps) > 1 else (),
        wide=True,
    )


def _any(values: Matrix) -> bool:
    return any(v is not None and math.isfinite(v) for row in values for v in row)


def packed(values: Matrix) -> str:
    """A matrix as base64 of little-endian 16-bit ten-thousandths: a tenth of its size as JSON."""
    cells = array("h")
    for row in values:
        cells.extend(
            NO_VALUE if v is None or not math.isfinite(v) else max(-32767, min(32767, round(v * 10000))) for v in row
        )
    if array("H", [1]).tobytes()[0] == 0:
        cells.byteswap()
    return base64.b64encode(cells.tobytes()).decode("ascii")


def sensitivity_chart(report: Report) -> Chart | None:
    """The layers (or parameter tensors) that the loss cares about most, as bars; a switch for the measure."""
    measures: dict[str, dict[str, Any]] = {}
    for label, measure in zip(measure_labels(report.sensitivity), report.sensitivity or (), strict=True):
        entry = {"layers": _scores(measure.layers), "parameters": _scores(measure.parameters), "unit": measure.unit}
        if entry["layers"] or entry["parameters"]:
            measures[label] = entry
    if not measures:
        return None
    levels = tuple(level for level in ("layers", "parameters") if any(m[level] for m in measures.values()))
    switches = [("measure", "measure", tuple(measures))] if len(measures) > 1 else []
    switches += [("level", "of", levels)] if len(levels) > 1 else []
    first = next(iter(measures))
    best = max(measures[first][levels[0]], key=lambda score: abs(score[1]), default=None)
    return Chart(
        "sensitivity-bars",
        "Where the loss is sensitive",
        "The highest scores, at most 25. Whiskers are one standard error.",
        f"bars; the highest score by {first} is that of {best[0]}, {significant(best[1])}" if best else "bars",
        {"type": "bars", "measures": measures, "levels": list(levels)},
        switches=tuple(switches),
        wide=True,
    )


def _scores(scores: Sequence[Score]) -> list[list[Any]]:
    return [[s.name, rounded(s.score), rounded(s.stderr)] for s in scores if rounded(s.score) is not None]


def sweep_chart(report: Report) -> Chart | None:
    """What each setting of each norm site does to the loss and the logits."""
    settings: dict[str, dict[str, list[list[float | None]]]] = {}
    for point in report.sweep:
        if rounded(point.value) is not None:
            line = settings.setdefault(point.setting, {}).setdefault(point.layer, [])
            line.append([rounded(point.value), rounded(point.kl), rounded(point.loss_change)])
    for lines in settings.values():
        for line in lines.values():
            line.sort(key=lambda entry: entry[0] or 0.0)
    effects = tuple(
        label
        for i, label in ((1, "KL"), (2, "loss change"))
        if any(entry[i] is not None for lines in settings.values() for line in lines.values() for entry in line)
    )
    if not effects:
        return None
    switches = [("setting", "setting", tuple(settings))] if len(settings) > 1 else []
    switches += [("effect", "effect", effects)] if len(effects) > 1 else []
    return Chart(
        "sweep-lines",
        "Settings of the norm layers",
        "One site changed at a time. The sites that matter most are in colour.",
        f"lines; {', '.join(settings)} varied at {len({p.layer for p in report.sweep})} sites",
        {"type": "sweep", "settings": settings, "effects": list(effects)},
        switches=tuple(switches),
        wide=True,
    )


def history_charts(report: Report) -> tuple[Chart, ...]:
    """What was logged while the model was trained, one chart a quantity."""
    return tuple(
        Chart(
            f"history-{i}",
            curve.title,
            "",
            f"from {significant(curve.y[0])} to {significant(curve.y[-1])} over {len(curve.y)} entries",
            {
                "type": "curve",
                "x": [rounded(v) for v in curve.x],
                "y": [rounded(v) for v in curve.y],
                "axis": curve.axis,
            },
        )
        for i, curve in enumerate(curves(report.history))
    )
