"""Training curves out of a model's history: every number that was logged beside a step or an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_AXES = ("step", "epoch", "iteration")
_NAMES = ("event", "stage", "kind", "name")


@dataclass(frozen=True)
class Curve:
    """One logged quantity: ``y`` over ``x``, which counts what ``axis`` says."""

    title: str
    axis: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def curves(history: Sequence[Mapping[str, Any]]) -> tuple[Curve, ...]:
    """The curves of at least two points, in the order in which they appear.

    An entry is a dict with a ``step`` (or ``epoch``) and numbers beside it; entries may also stand in a list
    within an event.
    """
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for source, entry in _entries(history, ""):
        axis = next((name for name in _AXES if _number(entry.get(name))), None)
        if axis is None:
            continue
        for key, value in entry.items():
            if key not in _AXES and _number(value):
                points.setdefault((source, axis, str(key)), []).append((float(entry[axis]), float(value)))
    sources = {source for source, _, _ in points}
    return tuple(
        Curve(
            f"{source}: {key}" if source and len(sources) > 1 else key,
            axis,
            tuple(x for x, _ in pairs),
            tuple(y for _, y in pairs),
        )
        for (source, axis, key), pairs in points.items()
        if len(pairs) > 1
    )


def events(history: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The entries that are no points of a curve: what was done, without its log."""
    return tuple(
        {key: value for key, value in entry.items() if not isinstance(value, (list, tuple, dict))}
        for entry in history
        if not any(_number(entry.get(name)) for name in _AXES)
    )


def _entries(history: Iterable[Any], source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in history:
        if not isinstance(entry, Mapping):
            continue
        name = next((str(entry[key]) for key in _NAMES if isinstance(entry.get(key), str)), source)
        yield name, entry
        for value in entry.values():
            if isinstance(value, (list, tuple)):
                yield from _entries(value, name)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
