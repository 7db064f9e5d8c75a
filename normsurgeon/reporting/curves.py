"""Training curves out of a model's history: every number that was logged beside a step or an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_AXES = ("step", "epoch", "iteration")
_NAMES = ("event", "stage", "kind", "name")
_RUN = (
    ("steps", "loss", "training loss"),
    ("epochs", "top1", "held-out top-1"),
    ("epochs", "loss", "held-out loss"),
    ("epochs", "agreement", "held-out agreement"),
    ("epochs", "kl", "held-out KL"),
    ("steps", "lr", "learning rate"),
)
"""What is drawn of a fine-tuning: the rows it stands in, its key, and what it is called."""


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
    within an event. A fine-tuning has its ``curves``, a reconstruction its ``curve``, over the updates.
    """
    drawn = (*_of_runs(history), *_of_reconstructions(history))
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for source, entry in _entries(history, ""):
        axis = next((name for name in _AXES if is_number(entry.get(name))), None)
        if axis is None:
            continue
        for key, value in entry.items():
            if key not in _AXES and is_number(value):
                points.setdefault((source, axis, str(key)), []).append((float(entry[axis]), float(value)))
    sources = {source for source, _, _ in points}
    return *drawn, *(
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
        if not any(is_number(entry.get(name)) for name in _AXES)
    )


def _of_runs(history: Sequence[Any]) -> Iterator[Curve]:
    """The curves of each fine-tuning; numbered where there are several."""
    runs = [
        rows for entry in history if isinstance(entry, Mapping) and isinstance(rows := entry.get("curves"), Mapping)
    ]
    for number, rows in enumerate(runs, 1):
        for part, key, title in _RUN:
            entries = rows.get(part)
            pairs = [
                (row.get("step"), row.get(key))
                for row in (entries if isinstance(entries, (list, tuple)) else ())
                if isinstance(row, Mapping)
            ]
            yield from _curve(title if len(runs) == 1 else f"run {number}: {title}", pairs)


def _of_reconstructions(history: Sequence[Any]) -> Iterator[Curve]:
    for entry in history:
        points = entry.get("curve") if isinstance(entry, Mapping) else None
        if isinstance(points, (list, tuple)):
            pairs = [tuple(pair) for pair in points if isinstance(pair, (list, tuple)) and len(pair) == 2]
            yield from _curve("reconstruction KL", pairs)


def _curve(title: str, pairs: Sequence[tuple[Any, ...]]) -> Iterator[Curve]:
    """A curve over the updates, of the points that are finite; none of fewer than two."""
    known = [(float(x), float(y)) for x, y in pairs if is_number(x) and is_number(y)]
    if len(known) > 1:
        yield Curve(title, "update", tuple(x for x, _ in known), tuple(y for _, y in known))


def _entries(history: Iterable[Any], source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in history:
        if not isinstance(entry, Mapping):
            continue
        name = next((str(entry[key]) for key in _NAMES if isinstance(entry.get(key), str)), source)
        yield name, entry
        for value in entry.values():
            if isinstance(value, (list, tuple)):
                yield from _entries(value, name)


def is_number(value: Any) -> bool:
    """Whether that is a finite number, in a history that somebody else may have written."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
