"""The layers that stand out, and why: named by a finding, or far from the others of their kind."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median

from normsurgeon.reporting.formatting import exact, has_value, significant
from normsurgeon.reporting.layers import LayerRow
from normsurgeon.reporting.records import Finding, Report

FAR = 4.0
"""Robust standard deviations (1.4826 times the median absolute deviation) from the median of its kind."""

_FEWEST = 8  # layers of one kind, below which a median says little
_METRICS = (("abs_mean", "mean |x|"), ("std", "std"), ("kurtosis", "kurtosis"), ("group_fluctuation", "group fluct."))


@dataclass(frozen=True)
class Standout:
    """A layer and the reasons to look at it, in words. ``severity`` is the gravest finding's, or ``notice``."""

    layer: str
    severity: str
    reasons: tuple[str, ...]
    strength: float = 0.0


def standouts(report: Report, rows: tuple[LayerRow, ...], most: int = 12) -> tuple[Standout, ...]:
    """At most ``most`` layers: those with findings first, then the farthest from their kind.

    A finding's reason is its metric and number, as the words stand in the findings already.
    """
    found: dict[str, Standout] = {}
    for finding in report.findings:
        if finding.layer is not None and finding.severity != "good":
            before = found.get(finding.layer, Standout(finding.layer, finding.severity, ()))
            found[finding.layer] = replace(before, reasons=(*before.reasons, reason(finding)), strength=math.inf)
    for name, title in _METRICS:
        for layer, distance, value, typical in _outliers(rows, name):
            before = found.get(layer, Standout(layer, "notice", ()))
            way = "high" if value > typical else "low"
            text = f"{title} {significant(value)} is {way} (its kind's median: {significant(typical)})"
            found[layer] = replace(before, reasons=(*before.reasons, text), strength=max(before.strength, distance))
    return tuple(sorted(found.values(), key=lambda entry: -entry.strength)[:most])


def reason(finding: Finding) -> str:
    """The number behind a finding, with its name."""
    name = finding.metric.replace("_", " ")
    return f"{name} {exact(finding.value)}" if has_value(finding.value) else name


def _outliers(rows: tuple[LayerRow, ...], name: str) -> list[tuple[str, float, float, float]]:
    """Layers whose logarithm lies far from its kind's median: (layer, distance, value, typical value)."""
    kinds: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        value = getattr(row.statistics, name) if row.statistics else None
        if value is not None and math.isfinite(value) and value > 0:
            kinds.setdefault(row.kind, []).append((row.layer, value))
    far = []
    for entries in kinds.values():
        if len(entries) < _FEWEST:
            continue
        logs = [math.log(value) for _, value in entries]
        middle = median(logs)
        spread = max(1.4826 * median(abs(x - middle) for x in logs), 0.05)
        for (layer, value), log in zip(entries, logs, strict=True):
            if (distance := abs(log - middle) / spread) > FAR:
                far.append((layer, distance, value, math.exp(middle)))
    return far
