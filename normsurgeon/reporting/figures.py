"""The page's charts over the depth of the network, as plain data without colours; ``templates/charts.js`` draws them.

A chart over the network's depth names columns of one shared table, so that each number is in the page once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from normsurgeon.reporting.formatting import significant
from normsurgeon.reporting.layers import LayerRow
from normsurgeon.reporting.records import LayerStatistics

_MOST_TICKS = 9


@dataclass(frozen=True)
class Series:
    """One line over the depth: a column of the shared table, and for a band the columns of its edges."""

    key: str
    label: str
    dash: str = "solid"
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True)
class Chart:
    """One figure of the page. ``summary`` says in words what it shows; ``spec`` is what the script draws."""

    id: str
    title: str
    note: str
    summary: str
    spec: dict[str, Any]
    legend: tuple[Series, ...] = ()
    switches: tuple[tuple[str, str, tuple[str, ...]], ...] = field(default=())
    """(name of the choice, its label, the options); the first option is shown at first."""
    wide: bool = False


def table(rows: Sequence[LayerRow]) -> dict[str, Any]:
    """The columns that depth charts and hover texts read, one entry a layer."""
    entries = [_numbers(row) for row in rows]
    keys = dict.fromkeys(key for entry in entries for key in entry)
    return {
        "names": [row.layer for row in rows],
        "kinds": [row.kind or "other" for row in rows],
        "about": [_about(row) for row in rows],
        "ticks": ticks([row.layer for row in rows]),
        "columns": {key: [rounded(entry.get(key)) for entry in entries] for key in keys},
    }


def profile_charts(columns: dict[str, Any]) -> tuple[Chart, ...]:
    """What the layers' outputs look like over the depth of the network."""
    line, dashed = "solid", "dash"
    specs: tuple[tuple[str, str, str, str, tuple[Series, ...]], ...] = (
        ("abs_mean", "Magnitude", "Mean |x| of each layer's output.", "log", (Series("abs_mean", "mean |x|"),)),
        ("moments", "Mean ± standard deviation", "Of all values of a layer's output.", "linear",
         (Series("mean", "mean ± std", line, "mean-std", "mean+std"),)),
        ("propagation", "Signal propagation", "Averages over channels: of the squared channel mean, and of the "
         "channel variance (Brock et al., 2021).", "log",
         (Series("channel_var", "channel variance", line), Series("squared_mean", "squared channel mean", dashed))),
        ("channels", "Channel means", "Median over a layer's channels; the band holds 90 % of them.", "linear",
         (Series("channel_q50", "median", line, "channel_q05", "channel_q95"),)),
        ("zeros", "Zeros and dead channels", "Share of values that are 0, and of channels that never fire.", "percent",
         (Series("zero_fraction", "zeros", line), Series("dead_share", "dead channels", dashed))),
        ("rank", "Effective rank", "How many directions the channels span: exp of the spectrum's entropy, and the "
         "participation ratio.", "log",
         (Series("effective_rank", "effective rank", line), Series("participation_ratio", "participation ratio",
                                                                   dashed))),
        ("variance", "Variance between and within images", "A per-sample norm takes out what differs between images.",
         "log", (Series("between_var", "between", line), Series("within_var", "within", dashed))),
        ("fluctuation", "Fluctuation of the group statistics", "At norm sites: how far what a per-sample norm divides "
         "by, and what it subtracts, varies from image to image.", "linear",
         (Series("group_fluctuation", "standard deviation", line), Series("mean_fluctuation", "mean", dashed))),
    )  # fmt: skip
    return tuple(_depth_charts("profile", specs, columns))


def comparison_charts(columns: dict[str, Any]) -> tuple[Chart, ...]:
    """How far each layer is from the baseline's layer of the same name, and both profiles."""
    line, dashed, dots = "solid", "dash", "dot"

    def both(key: str) -> tuple[Series, ...]:
        return Series(key, "model", line), Series(f"baseline:{key}", "baseline", dashed)

    specs: tuple[tuple[str, str, str, str, tuple[Series, ...]], ...] = (
        ("error", "Relative error", "‖a − b‖ / ‖b‖ over all images: 0 is the same function.", "log",
         (Series("relative_error", "relative error"),)),
        ("likeness", "Likeness", "Each layer with its counterpart: 1 is the same information, whatever the scale.",
         "linear", (Series("cka", "CKA", line), Series("cosine", "cosine", dashed),
                    Series("gram_cosine", "Gram cosine", dots))),
        ("both-abs", "Magnitude, before and after", "Mean |x| in both networks.", "log", both("abs_mean")),
        ("both-std", "Standard deviation, before and after", "Of all values, in both networks.", "log", both("std")),
        ("both-rank", "Effective rank, before and after", "In both networks.", "log", both("effective_rank")),
        ("shift", "Shift of the channels", "Mean over channels of |mean − baseline's mean| / baseline's std.", "linear",
         (Series("mean_shift", "mean shift"),)),
    )  # fmt: skip
    return tuple(_depth_charts("comparison", specs, columns))


def _depth_charts(section: str, specs: Sequence[tuple[Any, ...]], columns: dict[str, Any]) -> Iterator[Chart]:
    for name, title, note, scale, series in specs:
        drawable = [s for s in series if _drawable(columns["columns"].get(s.key), scale)]
        if not drawable or (name.startswith("both") and len(drawable) < 2):
            continue
        lines = [{"key": s.key, "dash": s.dash, "low": s.low, "high": s.high} for s in drawable]
        yield Chart(
            f"{section}-{name}",
            title,
            note,
            "; ".join(_in_words(s.label, columns["columns"][s.key], columns["names"]) for s in drawable),
            {"type": "depth", "scale": scale, "series": lines},
            tuple(drawable) if len(series) > 1 else (),
        )


def _drawable(values: list[float | None] | None, scale: str) -> bool:
    return any(v is not None and (scale != "log" or v > 0) for v in values or ())


def _in_words(label: str, values: list[float | None], names: list[str]) -> str:
    known = [(v, name) for v, name in zip(values, names, strict=True) if v is not None]
    (low, at_low), (high, at_high) = min(known), max(known)
    return f"{label} lies between {significant(low)} ({at_low}) and {significant(high)} ({at_high})"


def ticks(names: Sequence[str], few: int = 0) -> list[list[Any]]:
    """Where the network's parts begin, (position, name): as deep in the module tree as gives some of them.

    Up to ``few`` names are all given.
    """
    if len(names) <= few:
        return [[i, name] for i, name in enumerate(names)]
    starts: list[int] = []
    for depth in (1, 2, 3):
        parts = [".".join(name.split(".")[:depth]) for name in names]
        starts = [i for i, part in enumerate(parts) if part not in parts[:i]]
        if len(starts) >= 3 or len(starts) == len(names):
            break
    if len(starts) <= _MOST_TICKS and len(starts) >= 3:
        return [[i, parts[i]] for i in starts]
    step = max(1, math.ceil(len(names) / _MOST_TICKS))
    return [[i, names[i]] for i in range(0, len(names), step)]


def rounded(value: float | None) -> float | None:
    """Six significant digits, so that three are still right when rounded again; None for nan and infinity."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


_FROM_STATISTICS = (
    "mean", "std", "abs_mean", "min", "max", "zero_fraction", "skewness", "kurtosis", "effective_rank",
    "participation_ratio", "squared_mean", "channel_var", "between_var", "within_var", "group_fluctuation",
    "mean_fluctuation", "dead_channels", "dormant_channels",
)  # fmt: skip
_FROM_BASELINE = ("abs_mean", "std", "effective_rank")
_FROM_PAIR = ("cka", "cosine", "gram_cosine", "relative_error", "mean_shift", "std_ratio")


def _numbers(row: LayerRow) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    if entry := row.statistics:
        numbers |= {key: getattr(entry, key) for key in _FROM_STATISTICS}
        if entry.mean is not None and entry.std is not None:
            numbers |= {"mean-std": entry.mean - entry.std, "mean+std": entry.mean + entry.std}
        numbers |= {"nan": entry.nan or None, "inf": entry.inf or None}
        numbers["dead_share"] = entry.dead_channels / entry.channels if entry.channels else None
        numbers |= _quantiles(entry)
    if row.baseline:
        numbers |= {f"baseline:{key}": getattr(row.baseline, key) for key in _FROM_BASELINE}
    if row.pair:
        numbers |= {key: getattr(row.pair, key) for key in _FROM_PAIR}
    return {key: value for key, value in numbers.items() if value is not None}


def _quantiles(entry: LayerStatistics) -> dict[str, float | None]:
    means = sorted(m for m in entry.channel_means if m is not None and math.isfinite(m))
    if not means:
        return {}
    return {f"channel_q{100 * q:02.0f}": means[round(q * (len(means) - 1))] for q in (0.05, 0.5, 0.95)}


def _about(row: LayerRow) -> str:
    entry = row.statistics
    if entry is None:
        return ""
    shape = " × ".join(str(size) for size in entry.shape)
    groups = f", {entry.groups} groups" if entry.groups else ""
    return f"{entry.class_name}, {shape}{groups}"
