"""The page's charts over the depth of the network, as plain data without colours; ``templates/charts.js`` draws them.

A chart over the network's depth names columns of one shared table, so that each number is in the page once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
