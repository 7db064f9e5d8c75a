"""What was done to a model, one line an event: its conversion, calibration, reconstruction and fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normsurgeon.reporting.curves import events, is_number
from normsurgeon.reporting.formatting import percent, plural, shown, significant

Event = Mapping[str, Any]


def deeds(history: Sequence[Event]) -> tuple[str, ...]:
    """A line for each event, with the numbers that tell most; of an unknown kind, everything that is no log.

    >>> deeds([{"event": "calibrate", "images": 512, "sites": 49, "worst_error": 4.31, "worst_site": "bn1"}])
    ('Calibrated on 512 images: 49 norms matched; worst error before 4.31 at bn1',)
    """
    kept = [entry for entry in history if isinstance(entry, Mapping) and events((entry,))]
    return tuple(line for entry in kept if (line := _told(entry)))


def _told(entry: Event) -> str:
    known = _KNOWN.get(str(entry.get("event")))
    if known is not None and (line := known(entry)):
        return line
    (rest,) = events((entry,))
    return shown(dict(rest)) if rest else ""


def _convert(event: Event) -> str:
    if not is_number(event.get("converted")):
        return ""
    others = [f"{event[what]} {what}" for what in ("kept", "refused") if is_number(event.get(what)) and event[what]]
    return _line(f"Converted to {event.get('to') or 'several targets'}", [plural(event["converted"], "norm"), *others])


def _calibrate(event: Event) -> str:
    if not is_number(event.get("images")):
        return ""
    worst = f"worst error before {significant(event['worst_error'])}" if is_number(event.get("worst_error")) else ""
    where = f" at {event['worst_site']}" if worst and event.get("worst_site") else ""
    return _line(
        f"Calibrated on {plural(event['images'], 'image')}",
        [
            f"{plural(event['sites'], 'norm')} matched" if is_number(event.get("sites")) else "",
            f"{event['balanced']} balanced anew" if is_number(event.get("balanced")) and event["balanced"] else "",
        ],
        [worst + where, _duration(event)],
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
        [f"KL from the original {_change(event, event, 'kl_before', 'kl', significant)}{held}"],
        [_duration(event)],
    )


def _finetune(event: Event) -> str:
    if not is_number(event.get("steps")):
        return ""
    before, best = (value if isinstance(value := event.get(key), Mapping) else {} for key in ("before", "best"))
    data = f" on {event['data']}" if event.get("data") else ""
    judged = [
        f"{title} {_change(before, best, key, key, form)}"
        for key, title, form in (
            ("top1", "top-1", percent),
            ("agreement", "agreement", percent),
            ("kl", "KL", significant),
            ("loss", "loss", significant),
        )
        if is_number(best.get(key))
    ]
    after = f"the best after {plural(best['step'], 'update')}" if is_number(best.get("step")) else ""
    return _line(
        f"Fine-tuned{data} for {plural(event['steps'], 'update')}",
        judged[:3],
        [after if judged else "", _duration(event)],
    )


_KNOWN: dict[str, Callable[[Event], str]] = {
    "convert": _convert,
    "calibrate": _calibrate,
    "reconstruct": _reconstruct,
    "finetune": _finetune,
}


def _line(what: str, numbers: Sequence[str], more: Sequence[str] = ()) -> str:
    """``what: number, number; more; more``, of those that there are."""
    told = "; ".join(part for part in (", ".join(part for part in numbers if part), *more) if part)
    return f"{what}: {told}" if told else what


def _change(before: Event, after: Event, first: str, last: str, form: Callable[[Any], str]) -> str:
    was, now = before.get(first), after.get(last)
    now = form(now) if is_number(now) else "not finite"
    return f"{form(was)} → {now}" if is_number(was) else now


def _duration(event: Event) -> str:
    return f"{event['seconds']:.0f} s" if is_number(event.get("seconds")) else ""
