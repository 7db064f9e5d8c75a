"""What was done to a network, as its checkpoint holds it: each event in a line, and the curves that it logged.

An event is a dict with an ``event`` (convert, calibrate, reconstruct, finetune) and plain values. Files hold it as it
is, those of older versions and of other programs too, so nothing is taken for granted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normsurgeon.render.formatting import joined, percent, plural, shown, significant

Event = Mapping[str, Any]
_AXES = ("step", "epoch", "iteration")
_FINETUNE_CURVES = (
    ("steps", "loss", "training loss"),
    ("epochs", "top1", "held-out top-1"),
    ("epochs", "loss", "held-out loss"),
    ("epochs", "agreement", "held-out agreement"),
    ("epochs", "kl", "held-out KL"),
    ("steps", "lr", "learning rate"),
)
"""What is drawn of a fine-tuning: the rows that hold it, its key, and its title."""


@dataclass(frozen=True)
class Curve:
    """One logged quantity: ``y`` over ``x``, which counts what ``axis`` names."""

    title: str
    axis: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def summaries(history: Sequence[Event]) -> tuple[str, ...]:
    """A line for each event; entries that are points of a curve are left out."""
    events = [event for event in history if isinstance(event, Mapping) and _axis(event) is None]
    return tuple(line for event in events if (line := summary(event)))


def summary(event: Event) -> str:
    """One event with the numbers that matter most; of an unknown kind, everything that is no log.

    >>> summary({"event": "calibrate", "images": 512, "sites": 49, "worst_error": 4.31, "worst_site": "bn1"})
    'Calibrated on 512 images: 49 norms matched; largest error before 4.31 at bn1'
    """
    known = _SUMMARIES.get(str(event.get("event")))
    if known is not None and (line := known(event)):
        return line
    rest = {key: value for key, value in event.items() if not isinstance(value, (list, tuple, dict))}
    return shown(rest) if rest else ""


def curves(history: Sequence[Event]) -> tuple[Curve, ...]:
    """The curves of at least two points, in the order in which they appear.

    A fine-tuning has its ``curves``, a reconstruction its ``curve``, over the updates. Other entries with a ``step``
    (or ``epoch``) and numbers are points too, also in a list within an event.
    """
    points: dict[tuple[str, str, str], list[tuple[Any, Any]]] = {}
    for source, entry in _entries(history, ""):
        axis = _axis(entry)
        if axis is None:
            continue
        for key, value in entry.items():
            if key not in _AXES and is_number(value):
                points.setdefault((source, axis, str(key)), []).append((entry[axis], value))
    several = len({source for source, _, _ in points}) > 1
    logged = [
        curve
        for (source, axis, key), pairs in points.items()
        for curve in _curve(f"{source}: {key}" if source and several else key, axis, pairs)
    ]
    return *_of_runs(history), *_of_reconstructions(history), *logged


def is_number(value: Any) -> bool:
    """Whether that is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _convert(event: Event) -> str:
    if not is_number(event.get("converted")):
        return ""
    others = [f"{event[what]} {what}" for what in ("kept", "refused") if is_number(event.get(what)) and event[what]]
    return _line(f"Converted to {event.get('to') or 'several targets'}", [plural(event["converted"], "norm"), *others])


def _calibrate(event: Event) -> str:
    if not is_number(event.get("images")):
        return ""
    error = event.get("worst_error")
    largest = f"largest error before {significant(error)}" if is_number(error) else ""
    return _line(
        f"Calibrated on {plural(event['images'], 'image')}",
        [
            f"{plural(event['sites'], 'norm')} matched" if is_number(event.get("sites")) else "",
            f"{event['balanced']} balanced again" if is_number(event.get("balanced")) and event["balanced"] else "",
        ],
        [largest + (f" at {event['worst_site']}" if largest and event.get("worst_site") else ""), _duration(event)],
    )


def _reconstruct(event: Event) -> str:
    if not is_number(event.get("images")) or not is_number(event.get("steps")):
        return ""
    best = ""
    if is_number(event.get("best_step")):
        best = f", the best after {event['best_step']}" if event["best_step"] else ", none of which was kept"
    held = f" on {plural(event['held_out'], 'held-out image')}" if is_number(event.get("held_out")) else ""
    return _line(
        f"Reconstructed on {plural(event['images'], 'image')} in {plural(event['steps'], 'update')}{best}",
        [f"KL from the original {_change(event.get('kl_before'), event.get('kl'), significant)}{held}"],
        [_duration(event)],
    )


def _finetune(event: Event) -> str:
    if not is_number(event.get("steps")):
        return ""
    before, best = (value if isinstance(value := event.get(key), Mapping) else {} for key in ("before", "best"))
    measured = [
        f"{title} {_change(before.get(key), best[key], form)}"
        for key, title, form in (
            ("top1", "top-1", percent),
            ("agreement", "agreement", percent),
            ("kl", "KL", significant),
            ("loss", "loss", significant),
        )
        if is_number(best.get(key))
    ]
    after = f"the best after {plural(best['step'], 'update')}" if measured and is_number(best.get("step")) else ""
    data = f" on {event['data']}" if event.get("data") else ""
    return _line(f"Fine-tuned{data} for {plural(event['steps'], 'update')}", measured[:3], [after, _duration(event)])


_SUMMARIES: dict[str, Callable[[Event], str]] = {
    "convert": _convert,
    "calibrate": _calibrate,
    "reconstruct": _reconstruct,
    "finetune": _finetune,
}


def _line(what: str, numbers: Sequence[str], more: Sequence[str] = ()) -> str:
    """``what: number, number; more; more``, of those that there are."""
    rest = joined([joined(numbers, ", "), *more], "; ")
    return f"{what}: {rest}" if rest else what


def _change(before: Any, after: Any, form: Callable[[Any], str]) -> str:
    now = form(after) if is_number(after) else "not finite"
    return f"{form(before)} → {now}" if is_number(before) else now


def _duration(event: Event) -> str:
    return f"{event['seconds']:.0f} s" if is_number(event.get("seconds")) else ""


def _axis(entry: Event) -> str | None:
    return next((name for name in _AXES if is_number(entry.get(name))), None)


def _of_runs(history: Sequence[Any]) -> Iterator[Curve]:
    """The curves of each fine-tuning; numbered where there are several."""
    runs = [
        rows for event in history if isinstance(event, Mapping) and isinstance(rows := event.get("curves"), Mapping)
    ]
    for number, rows in enumerate(runs, 1):
        for part, key, title in _FINETUNE_CURVES:
            entries = [row for row in _list(rows.get(part)) if isinstance(row, Mapping)]
            pairs = [(row.get("step"), row.get(key)) for row in entries]
            yield from _curve(title if len(runs) == 1 else f"run {number}: {title}", "update", pairs)


def _of_reconstructions(history: Sequence[Any]) -> Iterator[Curve]:
    for event in history:
        points = _list(event.get("curve")) if isinstance(event, Mapping) else ()
        yield from _curve("reconstruction KL", "update", [tuple(p) for p in points if len(_list(p)) == 2])


def _curve(title: str, axis: str, pairs: Sequence[tuple[Any, ...]]) -> Iterator[Curve]:
    """A curve of the points that are finite; none of fewer than two."""
    known = [(float(x), float(y)) for x, y in pairs if is_number(x) and is_number(y)]
    if len(known) > 1:
        yield Curve(title, axis, tuple(x for x, _ in known), tuple(y for _, y in known))


def _entries(history: Iterable[Any], source: str) -> Iterator[tuple[str, Event]]:
    """Every entry and those in lists within it, each with the name of what logged it."""
    for entry in history:
        if isinstance(entry, Mapping):
            named = (entry[key] for key in ("event", "stage", "kind", "name") if isinstance(entry.get(key), str))
            name = next(named, source)
            yield name, entry
            for value in entry.values():
                yield from _entries(_list(value), name)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()
